"""Rejected samples: everything that is not used of the data, and why.

Data flow: ``readers``, ``images`` (at setup), ``Batch.rejected`` (while running) -> ``RejectedSamples`` ->
``ledger.jsonl`` of the run directory, and counts in the report.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from lightning_mm.core.distributed import all_gather_object, rank_and_world_size
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_atomically
from lightning_mm.data.sample import Rejection


class RejectedSamples:
    """Rejections in order of arrival, each once (an epoch may repeat them).

    Args:
        max_bad_fraction: Largest fraction of dropped rows among all rows read, 0 to 1; more stop the run.

    Attributes:
        num_rows: Number of rows read; readers add to it.
    """

    def __init__(self, max_bad_fraction: float = 0.01) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.num_rows = 0
        self._entries: dict[Rejection, None] = {}

    def __iter__(self) -> Iterator[Rejection]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, rejections: Iterable[Rejection]) -> None:
        """Add rejections; known ones are ignored."""
        self._entries.update(dict.fromkeys(rejections))

    @property
    def num_dropped(self) -> int:
        """Number of rows that are not used at all, each counted once."""
        return len({entry.origin for entry in self if entry.kind == "dropped"})

    def counts(self) -> dict[str, int]:
        """Category (reason up to its colon) -> number of rejections, the most frequent first."""
        return dict(Counter(entry.reason.partition(":")[0] for entry in self).most_common())

    def check(self) -> None:
        """Stop if too many rows are dropped.

        Raises:
            UserError: The dropped rows are more than ``max_bad_fraction`` of the rows read.
        """
        if self.num_dropped <= self.max_bad_fraction * self.num_rows:
            return
        first = [f"{entry.origin}: {entry.reason}" for entry in self if entry.kind == "dropped"][:5]
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.counts().items())
        raise UserError(
            f"{self.num_dropped} of {self.num_rows} rows cannot be used, the limit is {self.max_bad_fraction:.2%}.",
            f"{reasons}. The first of them:\n    " + "\n    ".join(first),
            "Mend these rows, or allow more with data.max_bad_fraction; ledger.jsonl of a run that goes on lists all.",
        )

    def gather(self) -> None:
        """Add the rejections of all other ranks; a collective call of every rank."""
        if rank_and_world_size()[1] == 1:
            return
        for part in all_gather_object(list(self)):
            self.add(part)

    def write(self, path: Path) -> None:
        """Write one JSON object per line: origin, reason, kind."""
        write_atomically(path, "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in self))
