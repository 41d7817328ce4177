"""metrics.csv: one row per logged step, appended immediately and kept when a run is resumed.

Lightning's CSVLogger deletes the file of an earlier start in the same folder, and a resumed run is such a start.

Data flow: the Trainer logs -> a row of metrics.csv -> the curves of the report.
"""

import csv
import io
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from lightning_mm.core.io import write_atomically


class ResumableCSVLogger(Logger):
    """A Lightning logger that appends to one CSV file.

    Args:
        path: The file, such as ``RunDirectory.metrics``; rows of an earlier start are kept. None (default): the run
            sets it by ``write_to``.
        keys: Columns known beforehand, as ``metric_names.declare`` gives them; none by default. Others widen the file
            when they are first logged.
    """

    def __init__(self, path: str | Path | None = None, keys: Iterable[str] = ()) -> None:
        super().__init__()
        self._keys = list(dict.fromkeys(["step", "epoch", *keys]))
        self.write_to(path)

    def write_to(self, path: str | Path | None) -> None:
        """Log to this file from now on."""
        self._path = None if path is None else Path(path)
        self._columns, self._ready = list(self._keys), False

    @property
    def name(self) -> str:
        return "" if self._path is None else self._path.parent.name

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str | None:
        return None if self._path is None else str(self._path.parent)

    @property
    def log_dir(self) -> str | None:
        """The folder with ``metrics.csv``, under the name that Lightning's CSVLogger gives it."""
        return self.save_dir

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row; values are numbers or tensors of one element."""
        assert self._path is not None, "the run has not said where its metrics go"
        row = {"step": "" if step is None else step} | {key: f"{float(value):.9g}" for key, value in metrics.items()}
        missing = [key for key in row if key not in self._columns]
        if missing or not self._ready:
            self._columns += missing
            self._widen()
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerow(row)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the configuration is saved as config.yaml."""

    def _widen(self) -> None:
        """Rewrite the file atomically with all columns; a last line that a kill cut is dropped."""
        assert self._path is not None
        rows: list[dict[str, str]] = []
        if self._path.exists():
            old = self._path.read_text(encoding="utf-8")
            reader = csv.DictReader(old[: old.rfind("\n") + 1].splitlines())
            rows = list(reader)
            self._columns += [key for key in reader.fieldnames or () if key not in self._columns]
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, text.getvalue())
        self._ready = True
