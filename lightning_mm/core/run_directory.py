"""One folder per run, ``runs/<name>/``: where each file lies, and how it is written so that a kill leaves no half file.

Data flow: the command line creates it; module and callbacks write into it; ``local`` reads it, alone, without the run.
"""

import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError

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
    def create(cls, root: str | Path = "runs", name: str | None = None, default: str = "run") -> "RunDirectory":
        """Make a new folder that no other run has, before anything heavy is loaded.

        Args:
            root: The folder of all runs.
            name: What the user calls this run; a name that is taken gets -2, -3, ...
            default: The name where the user gives none.

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
            created = datetime.now().astimezone().isoformat(timespec="seconds")
            write_json(path / "run.json", {"name": path.name, "id": uuid.uuid4().hex[:8], "created": created})
        except OSError as error:
            fix = "Name a folder that you may write to, or free some space."
            raise UserError(f"The run directory {path} cannot be written.", str(error), fix) from error
        if attempt > 1:
            from lightning_mm.core.decisions import (
                decide,  # here, for it imports lightning, which the report does without
            )

            decide("run.name", path.name, f"{wanted} exists already")
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

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def id(self) -> str:
        """Eight hex digits of this folder, a resumed run's too; empty for one that was not made by ``create``."""
        try:
            identity = read_json(self.path / "run.json")
        except UserError:
            return ""
        return str(identity.get("id", "")) if isinstance(identity, dict) else ""

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def census(self) -> Path:
        return self.path / "census.json"

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
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all; numbers that are not finite become null, which every reader knows."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(_strict(value), file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append_jsonl(path: Path, rows: Iterable[object]) -> None:
    """Append one JSON line per row, in one write, so that a kill cuts at most the last line."""
    lines = "".join(json.dumps(_strict(row), allow_nan=False) + "\n" for row in rows)
    if lines:
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: If it is missing or broken, saying which.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.name} is missing.", f"There is no {path}.", "Let the run write it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read.", str(error), "Let the run write it again.") from error


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the rows of a JSON-lines file, and count the lines that hold none (a kill can cut the last one).

    Raises:
        UserError: If the file is missing or cannot be read at all.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path.name} is missing.", str(error), "Let the run write it.") from error
    rows = [_row(line) for line in text.split("\n") if line.strip()]
    kept = [row for row in rows if row is not None]
    return kept, len(rows) - len(kept)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


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


def _strict(value: object) -> object:
    """What JSON can hold: dataclasses become dicts, paths strings, and non-finite numbers null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return _strict(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, Path) else value
