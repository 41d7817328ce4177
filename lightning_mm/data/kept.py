"""Batches of rows whose frozen prefix is known: nothing is decoded, resized or tokenized again.

Data flow: Samples -> ``RowKeys`` -> what the store holds of them; the others through the model's own collator -> one
``Batch`` of all rows, with what is known in ``Batch.kept`` and the rest beside it, to be computed and kept.

Shapes: B rows, L tokens after padding, D hidden size.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_mm.data.batch import Batch, Kept
from lightning_mm.data.collator import Collator
from lightning_mm.data.encoded import Inseparable, Record, cut, joined
from lightning_mm.data.keys import RowKeys
from lightning_mm.data.sample import Rejection, Sample
from lightning_mm.data.store import RecordStore

STATES = "hidden"
"""What a record calls the (T, D) states of its row."""

_CUT = "note"
"""What a record calls the reasons why its row is not whole: a JSON list in UTF-8."""


class KeptCollator:
    """Makes training batches, of known rows without their pictures.

    Args:
        collator: Of the model, for rows that are not known.
        store: What is known, by ``RowKeys``.
        width: D.
        dtype: Of the states in a batch.
    """

    def __init__(self, collator: Collator, store: RecordStore, width: int, dtype: torch.dtype) -> None:
        self._collator, self._store, self._width, self._dtype = collator, store, width, dtype
        self._pad = int(collator.processing.processor.tokenizer.pad_token_id)
        self._key = RowKeys()

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Make a batch of what can be used. Raises UserError where nothing can."""
        keys = {id(sample): self._key(sample) for sample in samples}
        known = {key: record for key in keys.values() if (record := self._store.get(key, self._dtype)) is not None}
        unknown = [sample for sample in samples if keys[id(sample)] not in known]
        rejected: list[Rejection] = []
        fresh = self._collator.usable(unknown, rejected) if unknown else None
        try:
            encoded = cut(fresh) if fresh is not None else []
        except Inseparable:
            return self._collator(samples)
        if not known and not encoded:
            return self._collator(samples)
        made = {id(s): record for s, record in zip(fresh.samples if fresh else (), encoded, strict=True)}
        usable = [s for s in samples if keys[id(s)] in known or id(s) in made]
        records = [made.get(id(s)) or known[keys[id(s)]] for s in usable]
        batch = joined(records, usable, self._pad)
        cuts: dict[str, list[str]] = {}
        for each in rejected:
            if each.kind == "cut":
                cuts.setdefault(each.origin, []).append(each.reason)
        rejected += [note for s in usable if id(s) not in made for note in notes(known[keys[id(s)]], s)]
        kept = Kept(
            self._states(batch, records),
            torch.tensor([b for b, s in enumerate(usable) if id(s) in made], dtype=torch.long),
            fresh,
            tuple(keys[id(s)] for s in usable if id(s) in made),
            tuple(noted(made[id(s)], cuts.get(s.origin, [])) for s in usable if id(s) in made),
        )
        return replace(batch, kept=kept, rejected=tuple(rejected))

    def _states(self, batch: Batch, records: Sequence[Record]) -> Tensor:
        states_BLD = torch.zeros(*batch.regions.shape, self._width, dtype=self._dtype)
        for row_LD, record in zip(states_BLD, records, strict=True):
            if STATES in record:
                row_LD[: len(record["regions"])] = record[STATES]
        return states_BLD


def noted(record: Record, reasons: list[str]) -> Record:
    """The record, and why its row is not whole."""
    if not reasons:
        return record
    return {**record, _CUT: torch.tensor(list(json.dumps(reasons).encode()), dtype=torch.uint8)}


def notes(record: Record, sample: Sample) -> list[Rejection]:
    """Why the row of a record is not whole."""
    reasons = json.loads(bytes(record[_CUT].tolist())) if _CUT in record else []
    return [Rejection(sample.origin, reason, "cut") for reason in reasons]
