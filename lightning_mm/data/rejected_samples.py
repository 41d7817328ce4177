"""Rejected samples: everything that is not used of the data, and why.

Data flow: ``split`` (before a run), ``Batch.rejected`` (while running) -> ``RejectedSamples`` -> ``ledger.jsonl`` of
the run directory, and counts in the report.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

from lightning_mm.core.distributed import all_gather_object, rank_and_world_size
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_jsonl, write_atomically
from lightning_mm.data.sample import Rejection

MIN_ROWS = 1000
"""Rows of a stream that are read before too many that cannot be used end a run."""


class RejectedSamples:
    """Rejections in order of arrival, each once (an epoch may repeat them).

    Args:
        max_bad_fraction: Largest fraction of dropped rows among all rows read of a split, 0 to 1; more stop the run.

    Attributes:
        num_rows: Split -> number of rows read; readers add to it.
        is_counted: Split -> whether that is all of its rows; it is not while they are streamed.
    """

    def __init__(self, max_bad_fraction: float = 0.01) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.num_rows: Counter[str] = Counter()
        self.is_counted: dict[str, bool] = {}
        self._entries: dict[Rejection, None] = {}

    def __iter__(self) -> Iterator[Rejection]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, rejections: Iterable[Rejection], split: str = "") -> None:
        """Add rejections; known ones are ignored.

        Args:
            rejections: What is not used.
            split: Of those that do not say it: train, val, test or predict.
        """
        for each in rejections:
            self._entries[each if each.split or not split else replace(each, split=split)] = None

    def dropped(self, split: str | None = None) -> dict[tuple[str, str, str], Rejection]:
        """The first rejection of each row that is not used at all, of one split or of all, by split, source, origin."""
        found: dict[tuple[str, str, str], Rejection] = {}
        for entry in self:
            if entry.kind == "dropped" and split in (None, entry.split):
                found.setdefault((entry.split, entry.source, entry.origin), entry)
        return found

    @property
    def num_dropped(self) -> int:
        """Number of rows that are not used at all, each counted once."""
        return len(self.dropped())

    def counts(self) -> dict[str, int]:
        """Category (reason up to its colon) -> number of rejections, the most frequent first."""
        return _by_reason(self)

    def check(self, ledger: Path | None = None) -> None:
        """Stop if too many rows of a split are dropped; of one that is streamed, once ``MIN_ROWS`` were read.

        Args:
            ledger: File to write all rejections to before it stops; None: the run has one.

        Raises:
            UserError: The dropped rows of a split are more than ``max_bad_fraction`` of its rows.
        """
        for split, num_rows in self.num_rows.items():
            if not self.is_counted.get(split, True) and num_rows < MIN_ROWS:
                continue
            dropped = self.dropped(split)
            if len(dropped) <= self.max_bad_fraction * num_rows:
                continue
            if ledger is not None:
                ledger.parent.mkdir(parents=True, exist_ok=True)
                self.write(ledger)
            entries = list(dropped.values())
            first = [f"{entry.origin}: {entry.reason}" for entry in entries[:5]]
            reasons = ", ".join(f"{count} x {reason}" for reason, count in _by_reason(entries).items())
            name = f"data.{split}" if split in ("train", "val", "test", "predict") else split
            raise UserError(
                f"{len(dropped)} of {num_rows} rows{f' of {name}' if name else ''} cannot be used, "
                f"the limit is {self.max_bad_fraction:.2%}.",
                f"{reasons}. The first of them:\n    " + "\n    ".join(first),
                f"{_fix(entries)}, or allow more with data.max_bad_fraction. "
                f"All are listed in {ledger or 'ledger.jsonl of the run'}.",
            )

    def gather(self) -> None:
        """Add the rejections of all other ranks; a collective call of every rank."""
        if rank_and_world_size()[1] == 1:
            return
        for part in all_gather_object(list(self)):
            self.add(part)

    def read(self, path: Path) -> None:
        """Add what ``write`` wrote, of the same run before it went on; nothing where there is no file."""
        rows = read_jsonl(path)[0] if path.is_file() else []
        known = {field.name for field in fields(Rejection)}
        self.add(Rejection(**row) for row in rows if {"origin", "reason"} <= row.keys() <= known)

    def write(self, path: Path) -> None:
        """Write one JSON object per line: origin, reason, kind, split, source."""
        lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in self)
        write_atomically(path, lines.encode("utf-8", "backslashreplace"))  # names of files need not be UTF-8


def _fix(entries: Iterable[Rejection]) -> str:
    if all(entry.reason.startswith("too long") for entry in entries):
        return "Raise data.max_length, or give data.max_pixels, so that pictures take fewer tokens"
    return "Mend these rows"


def _by_reason(entries: Iterable[Rejection]) -> dict[str, int]:
    return dict(Counter(entry.reason.partition(":")[0] for entry in entries).most_common())
