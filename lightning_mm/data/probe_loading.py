"""Batches of probe rows, dealt out to the ranks.

Data flow: the rows of a ``ProbeSet`` -> whole batches of rows of like length -> ``ProbeCollator`` -> ``taps``.
"""

from collections.abc import Sequence

from lightning_mm.data.loader import GuardedLoader, evaluation_loader, ranks
from lightning_mm.data.probe_collator import ProbeCollator
from lightning_mm.data.probe_rows import ProbeRow
from lightning_mm.data.probe_sets import ProbeBatch
from lightning_mm.decisions import decide


def load_probes(
    rows: Sequence[ProbeRow], collator: ProbeCollator, *, batch_size: int, num_workers: int
) -> GuardedLoader:
    """This rank's share of the rows, each row once over all ranks, rows of like length together.

    Whole batches are dealt out, so that which rows share one, and with it every digit of what is read, does not depend
    on the number of ranks.

    Args:
        rows: Of a probe set.
        collator: Makes a batch of them.
        batch_size: Most rows of a batch.
        num_workers: Processes that prepare batches.
    """
    rows = sorted(rows, key=lambda row: (row.role, len(row.text), row.id))
    collator.say_what_is_missing(rows)
    size = max(1, min(batch_size, len(rows) // ranks()[1]))
    if size < batch_size:
        decide("data.probes", f"batches of {size} rows", f"{len(rows)} rows, {ranks()[1]} ranks")
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return evaluation_loader(batches, _WholeBatch(collator), batch_size=1, num_workers=num_workers)


class _WholeBatch:
    """Collates what is a batch already; a class, for workers are sent it."""

    def __init__(self, collate: ProbeCollator) -> None:
        self._collate = collate

    def __call__(self, batches: list[list[ProbeRow]]) -> ProbeBatch:
        return self._collate(batches[0])
