"""One folder per run, ``runs/<name>/``, and the names of its files.

Data flow: the command line or the run's callbacks create it; module and callbacks write into it; ``report`` reads it,
alone, without the run.
"""

import errno
import os
import re
import shutil
import sys
import uuid
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json, write_json

if sys.platform != "win32":
    import fcntl

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run and the names of its files.

    In a run of several processes rank 0 creates it, and the others open the path that rank 0 tells them.

    Args:
        path: The folder.
    """

    path: Path

    @classmethod
    def create(
        cls, root: str | Path = "runs", name: str | None = None, default: str = "run", kind: str = ""
    ) -> "RunDirectory":
        """Make a new folder that no other run has, before anything heavy is loaded.

        Args:
            root: The folder of all runs.
            name: What the user calls this run; a name that is taken gets -2, -3, ...
            default: The name where the user gives none.
            kind: What it is a run of, such as 'fit'.

        Raises:
            UserError: If the name is no plain folder name, or nothing can be written under ``root``.
        """
        wanted = _plain(default if name is None else name)
        path = Path(root).absolute() / wanted
        attempt = 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while not _made(path):
                attempt += 1
                path = path.with_name(f"{wanted}-{attempt}")
            identity = {"name": path.name, "id": uuid.uuid4().hex[:8], "created": _now(), "begun": None, "kind": kind}
            write_json(path / "run.json", identity)
        except OSError as error:
            fix = "Name a folder that you may write to, or free some space."
            raise UserError(f"The run directory {path} cannot be written.", str(error), fix) from error
        if attempt > 1:
            log_decision("run.name", path.name, f"{wanted} exists already")
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """Open the folder of an earlier run, to resume or to report.

        Raises:
            UserError: If there is no such folder.
        """
        found = Path(path).absolute()
        if not found.is_dir():
            near = sorted(p.name for p in found.parent.iterdir() if p.is_dir()) if found.parent.is_dir() else []
            raise UserError(
                f"There is no run directory {found}.",
                f"Folders beside it: {', '.join(near[:10]) or 'none'}.",
                "Name the folder of a run, such as runs/intermediate-only.",
            )
        return cls(found)

    def claim(self) -> bool:
        """Hold the folder until ``release_claims`` or the end of this process; False if another process holds it.

        On systems and file systems without locks every folder is free. The lock is on the folder itself, so that no
        file stays.
        """
        if self.path in _CLAIMS or sys.platform == "win32":
            return True
        try:
            held = os.open(self.path, os.O_RDONLY)
        except OSError:
            return True
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(held)
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        _CLAIMS[self.path] = held
        return True

    def remove_temporary_files(self) -> None:
        """Remove what a killed process was writing; the files that it was to replace are whole."""
        for path in self.path.rglob(".*.tmp"):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all that a run has left, which is to begin anew here."""
        for path in self.path.iterdir():
            if path.name != "run.json":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write_json(self.path / "run.json", {**self._identity(), "begun": None})

    def begin(self) -> None:
        """Note that the run's first batch is reached: a run that fails before leaves no folder."""
        write_json(self.path / "run.json", {**self._identity(), "begun": _now()})

    @property
    def has_begun(self) -> bool:
        """Whether the run reached its first batch; True for a folder that was not made by ``create``."""
        return self._identity().get("begun", "unknown") is not None

    @property
    def kind(self) -> str:
        """What it is a run of; empty where that is not known."""
        return str(self._identity().get("kind") or "")

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def id(self) -> str:
        """Eight hex digits of this folder, a resumed run's too; empty for one that was not made by ``create``."""
        return str(self._identity().get("id", ""))

    def _identity(self) -> dict[str, str | None]:
        try:
            found = read_json(self.path / "run.json")
        except UserError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def census(self) -> Path:
        return self.path / "census.json"

    @property
    def hyperparameters(self) -> Path:
        return self.path / "hyperparameters.json"

    @property
    def decisions(self) -> Path:
        return self.path / "decisions.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def sources(self) -> Path:
        return self.path / "sources.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples.json"

    @property
    def pictures(self) -> Path:
        return self.path / "samples"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def layers(self) -> Path:
        return self.path / "layers.csv"

    @property
    def matrices(self) -> Path:
        return self.path / "matrices.json"

    @property
    def probes(self) -> Path:
        return self.path / "probes.json"

    @property
    def inspections(self) -> Path:
        return self.path / "inspections.json"

    @property
    def inspection(self) -> Path:
        return self.path / "inspection.json"

    @property
    def selection(self) -> Path:
        return self.path / "selection.json"

    @property
    def nonfinite(self) -> Path:
        return self.path / "nonfinite"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


class WritesToRun:
    """A callback that writes into the folder of the run, which the run sets before training starts.

    Attributes:
        run: The folder; None outside of a run.
    """

    run: RunDirectory | None = None


_CLAIMS: dict[Path, int] = {}
"""Folders that this process holds -> file descriptor with the lock."""


def release_claims() -> None:
    """Let go of the folders that this process holds."""
    while _CLAIMS:
        os.close(_CLAIMS.popitem()[1])


# A worker of a loader may outlive a killed run for seconds, and must not hold its folder.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=release_claims)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _plain(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a run.",
            "It becomes one folder: letters, digits, dot, dash and underscore, beginning with a letter or digit.",
            "Use a name such as intermediate-only.",
        )
    return name


def _made(path: Path) -> bool:
    """Make the folder; False where it exists. One system call, so two runs that start together never share a folder."""
    try:
        path.mkdir()
        return True
    except FileExistsError:
        return False
