"""Batches of rows whose vision features are known: no picture is decoded, a grey one of its size stands for it.

Data flow: Samples -> ``RowKeys`` -> what the store holds of them; each of the others alone through the model's own
collator, its pictures with it -> one ``Batch`` of all rows with grey pictures, features in ``Batch.kept``.

The processor sees every row as it would otherwise, so that grids, tiles, masks and tokens are the family's own.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_mm.data.batch import Batch, KeptFeatures
from lightning_mm.data.collator import Collator
from lightning_mm.data.kept import noted, notes
from lightning_mm.data.keys import RowKeys
from lightning_mm.data.sample import Rejection, Sample
from lightning_mm.data.store import RecordStore

FEATURES = "hidden"
"""What a record calls the features of its row: what the tower's last block puts out."""


class FeatureCollator:
    """Makes training batches, of known rows without their pictures.

    Args:
        collator: Of the model.
        store: What is known, by row key.
        dtype: Of the features in a batch.
    """

    def __init__(self, collator: Collator, store: RecordStore, dtype: torch.dtype) -> None:
        self._collator, self._store, self._dtype = collator, store, dtype
        self._key = RowKeys()

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Make a batch of what can be used. Raises UserError where nothing can."""
        rejected: list[Rejection] = []
        keys = {id(sample): self._key(sample) for sample in samples}
        known: dict[str, dict[str, Tensor]] = {}
        fresh: dict[str, Batch] = {}
        told: dict[str, list[Rejection]] = {}
        for sample in samples:
            key = keys[id(sample)]
            if key in known or key in fresh:
                continue
            if (record := self._store.get(key, self._dtype)) is not None:
                known[key] = record
            elif (made := self._collator.usable([sample], told.setdefault(key, []))) is not None:
                fresh[key] = made
        usable = [sample for sample in samples if keys[id(sample)] in known or keys[id(sample)] in fresh]
        again: list[Rejection] = []
        batch = self._collator.usable(usable, again, grey=True) if usable else None
        if batch is None:
            return self._collator(samples)
        for key, each in told.items():
            rejected += each if key not in fresh else []
        # Rows that are cut have been told of when they were encoded with their pictures; twins are told of one by one.
        rejected += [each for each in again if each.kind != "cut"]
        for s in batch.samples:
            key = keys[id(s)]
            rejected += notes(known[key], s) if key in known else [replace(each, origin=s.origin) for each in told[key]]
        return replace(batch, kept=self._kept(batch, keys, known, fresh, told), rejected=tuple(rejected))

    def _kept(
        self,
        batch: Batch,
        keys: dict[int, str],
        known: dict[str, dict[str, Tensor]],
        fresh: dict[str, Batch],
        told: dict[str, list[Rejection]],
    ) -> KeptFeatures:
        rows = [keys[id(sample)] for sample in batch.samples]
        missing = [b for b, key in enumerate(rows) if key in fresh]
        return KeptFeatures(
            tuple(known.get(key, {}).get(FEATURES) for key in rows),
            tuple(missing),
            tuple(fresh[rows[b]] for b in missing),
            tuple(rows[b] for b in missing),
            tuple(noted({}, [r.reason for r in told[rows[b]] if r.kind == "cut"]) for b in missing),
        )
