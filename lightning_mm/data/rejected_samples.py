"""What was not used, and why: the one list of everything that fell out of the data.

Data flow: ``sources`` adds at set-up, the loops add ``Batch.rejected`` while running; the run directory gets
``ledger.jsonl`` and the dashboards the counts.
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


class Ledger:
    """Rejections in the order they came; one that returns every epoch is kept once.

    Args:
        max_bad_fraction: More dropped rows than this, of all rows read, stop the run.
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
        """Note down what fell out."""
        self._entries.update(dict.fromkeys(rejections))

    @property
    def num_dropped(self) -> int:
        """Rows that are not used at all, each counted once whatever the number of its faults."""
        return len({entry.origin for entry in self if entry.kind == "dropped"})

    def counts(self) -> dict[str, int]:
        """Entries by category (a reason up to its colon), the most frequent first."""
        return dict(Counter(entry.reason.partition(":")[0] for entry in self).most_common())

    def check(self) -> None:
        """Stop where too much of the data is lost.

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
            "Mend these rows, or allow more with data.max_bad_fraction; ledger.jsonl of the run lists all of them.",
        )

    def gather(self) -> None:
        """Take in what the other ranks noted; every rank must call it."""
        if rank_and_world_size()[1] == 1:
            return
        for part in all_gather_object(list(self)):
            self.add(part)

    def write(self, path: Path) -> None:
        """One JSON object per line: origin, reason, kind."""
        write_atomically(path, "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in self))
