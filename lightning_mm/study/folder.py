"""The folder of a study: what is small and kept, and under work/ what is large and can be made again.

Data flow: ``StudySettings`` -> study.json, compared by each later sitting; an arm's results are complete when its
result.json is there, which is written last.

    study.json  questions.csv.gz  study.md  study.html
    seed0/middle/result.json  answers.csv.gz  layers.csv.gz  causes.csv.gz
    work/   inputs, runs, checkpoints, exported models, locks
"""

import csv
import gzip
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json, write_atomically, write_json
from lightning_mm.core.layer_table import LayerRow, layers_text, parse_layers
from lightning_mm.study.settings import StudySettings, differences

_FREE = ("roles", "resamples", "keep_checkpoints", "save_every", "seeds", "arms")
"""Options that do not change what a finished arm measured; arms and seeds are compared one by one."""


@dataclass(frozen=True)
class Job:
    """One model of the study: an arm, or the model that all arms of a seed begin from.

    Args:
        arm: Name of the arm; ``stage1``: what they begin from.
        seed: Of the study's seeds.
    """

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class StudyFolder:
    """Names of the files of a study.

    Args:
        path: The folder.
    """

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "study.json"

    @property
    def questions(self) -> Path:
        return self.path / "questions.csv.gz"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def inputs(self) -> Path:
        return self.work / "inputs"

    def results(self, job: Job) -> Path:
        """The folder of the small files of a job."""
        return self.path / f"seed{job.seed}" / job.arm

    def result(self, job: Job) -> Path:
        """The file that says that a job is complete."""
        return self.results(job) / "result.json"

    def is_complete(self, job: Job) -> bool:
        """Whether all of a job is measured."""
        return self.result(job).is_file()

    def of_job(self, job: Job) -> Path:
        """The folder of the large files of a job."""
        return self.work / f"seed{job.seed}" / job.arm

    def lock(self, job: Job) -> Path:
        """The file that the process holds that works at a job."""
        return self.work / "locks" / f"seed{job.seed}-{job.arm}.lock"

    def start(self, settings: StudySettings, seed: int) -> str:
        """What the arms of a seed begin from."""
        return settings.model if settings.stage1 is None else str(self.of_job(Job("stage1", seed)) / "export")

    def open(self, settings: StudySettings) -> None:
        """Make the folder, or check that what was measured in it belongs to these settings.

        Raises:
            UserError: An option has changed that finished arms depend on.
        """
        new = settings.to_dict()
        if self.settings.is_file():
            old = read_json(self.settings)["settings"]
            changed = [] if old == new else _binding(old, new)
            if changed:
                raise UserError(
                    f"{self.path} belongs to another study.",
                    f"Changed: {'; '.join(changed[:5])}.",
                    "Undo the change, or give another --out; arms and seeds may be added.",
                )
            if old == new:
                return
            log_decision("study", "goes on with other options", "; ".join(differences(old, new)[:5]))
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.settings, {"settings": new})


def _binding(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Changes of options that finished arms depend on; arms may be added and taken away."""
    arms = [
        f"arms.{change}"
        for name in old["arms"].keys() & new["arms"].keys()
        for change in differences({name: old["arms"][name]}, {name: new["arms"][name]})
    ]
    main = old["roles"]["main"], new["roles"]["main"]
    arms += [f"roles.main: {main[0]}, now {main[1]}"] if main[0] != main[1] else []
    before, now = ({key: value for key, value in each.items() if key not in _FREE} for each in (old, new))
    return [*differences(before, now), *arms]


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a gzipped CSV file atomically; equal rows give equal bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    _write_packed(path, text.getvalue())


def write_layers(path: Path, rows: Iterable[LayerRow]) -> None:
    """Write rows as layers.csv has them, gzipped and atomically."""
    _write_packed(path, layers_text(rows))


def read_layers(path: Path) -> list[LayerRow]:
    """The rows that ``write_layers`` wrote; none where there is no such file.

    Raises:
        UserError: It cannot be read.
    """
    if not path.is_file():
        return []
    try:
        return parse_layers(gzip.decompress(path.read_bytes()).decode())[0]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read.", str(error), "Let the study write it again.") from error


def _write_packed(path: Path, text: str) -> None:
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
        file.write(text.encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, packed.getvalue())


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a gzipped CSV file, by column.

    Raises:
        UserError: It is missing or cannot be read.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    except (OSError, EOFError, csv.Error) as error:
        raise UserError(f"{path} cannot be read.", str(error), "Let the study write it again.") from error
