"""Batches of rows whose frozen prefix is known: nothing is decoded, resized or tokenized again.

Data flow: Samples -> ``RowKeys`` -> what the store holds of them; the others through the model's own collator -> one
``Batch`` of all rows, with what is known in ``Batch.cached`` and the rest beside it, to be computed and kept.

Shapes: B rows, L tokens after padding, D hidden size.

Batches taken apart into rows, and put together again: what a row is kept as once its pixels are not needed.

Data flow: Batch -> ``cut`` -> one record of tensors per row (what is kept beside its hidden states) -> ``joined`` with
other rows -> the same Batch without pixels.

Shapes: B rows, L tokens after padding, T tokens of one row, S supervised positions.

Batches of rows whose vision features are known: no picture is decoded, a grey one of its size stands for it.

Data flow: Samples -> ``RowKeys`` -> what the store holds of them; each of the others alone through the model's own
collator, its pictures with it -> one ``Batch`` of all rows with grey pictures, features in ``Batch.cached``.

The processor sees every row as it would otherwise, so that grids, tiles, masks and tokens are the family's own.

What a row is known by wherever something is kept of it: what is said, and the bytes of its pictures.

Data flow: Sample -> ``RowKeys`` -> SHA-256 in hexadecimal.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_mm.data.batch import Batch, CachedFeatures, CachedStates, TokenRegion
from lightning_mm.data.collator import Collator
from lightning_mm.data.sample import Rejection, Sample
from lightning_mm.execution.cache.store import RecordStore

Record = dict[str, Tensor]
"""One row: ``token.<input>`` (T, ...), ``row.<input>`` (n, ...), ``regions`` (T,), ``supervised``, ``targets`` (S,)."""

_TOKEN, _ROW = "token.", "row."


class Inseparable(ValueError):
    """The rows of a batch cannot be told apart."""


def is_pixels(name: str, value: Tensor) -> bool:
    """Whether a model's input is the picture itself: floating-point, or a mask of its pixels."""
    return value.is_floating_point() or name.startswith("pixel")


def cut(batch: Batch) -> list[Record]:
    """Every row without padding and pixels.

    Raises:
        Inseparable: An input cannot be told to be by token, by row or by picture.
    """
    lengths = (batch.regions != TokenRegion.PAD).sum(1).tolist()
    length = batch.regions.shape[1]
    parts = {n: _parts(n, v, batch) for n, v in batch.inputs.items() if not is_pixels(n, v)}
    records = []
    for b, tokens in enumerate(lengths):
        mine = (batch.supervised >= b * length) & (batch.supervised < (b + 1) * length)
        record = {
            "regions": batch.regions[b, :tokens],
            "supervised": batch.supervised[mine] - b * length,
            "targets": batch.targets[mine],
        }
        for name, rows in parts.items():
            by_token = _by_token(batch.inputs[name], batch)
            record[(_TOKEN if by_token else _ROW) + name] = rows[b][:tokens] if by_token else rows[b]
        records.append(record)
    return records


def joined(records: Sequence[Mapping[str, Tensor]], samples: Sequence[Sample], pad_token_id: int) -> Batch:
    """The rows side by side again, right-padded."""
    length = max(len(record["regions"]) for record in records)
    inputs = {}
    for key in dict.fromkeys(key for record in records for key in record):
        having = [record[key] for record in records if key in record]
        if key.startswith(_TOKEN):
            name = key.removeprefix(_TOKEN)
            fill = pad_token_id if name == "input_ids" else 0
            # What a row has not been given (types of tokens, where it has no picture) is 0 for all of its tokens.
            absent = having[0][:0]
            inputs[name] = torch.stack([_padded(record.get(key, absent), length, fill) for record in records])
        elif key.startswith(_ROW):
            inputs[key.removeprefix(_ROW)] = torch.cat(having)
    return Batch(
        inputs,
        torch.stack([_padded(record["regions"], length, int(TokenRegion.PAD)) for record in records]),
        torch.cat([record["supervised"] + b * length for b, record in enumerate(records)]),
        torch.cat([record["targets"] for record in records]),
        tuple(samples),
    )


def _by_token(value: Tensor, batch: Batch) -> bool:
    return value.ndim >= 2 and value.shape[:2] == batch.regions.shape


def _parts(name: str, value: Tensor, batch: Batch) -> Sequence[Tensor]:
    """What each row has of an input: (T, ...) by token, (n, ...) else."""
    if _by_token(value, batch):
        return list(value)
    counts = [len(sample.images) for sample in batch.samples]
    by_row, by_picture = len(value) == len(batch), len(value) == sum(counts)
    if by_row and (not by_picture or set(counts) == {1}):
        return list(value[:, None])
    if by_picture and not by_row:
        return list(value.split(counts))
    raise Inseparable(f"{name} {tuple(value.shape)} may be by row or by picture: the pictures of rows are {counts}")


def _padded(values: Tensor, length: int, fill: int) -> Tensor:
    out = values.new_full((length, *values.shape[1:]), fill)
    out[: len(values)] = values
    return out


class RowKeys:
    """Names rows; a picture file is read once as long as its size and time of change stay."""

    def __init__(self) -> None:
        self._digests: dict[tuple[Path, int, int], str] = {}

    def __call__(self, sample: Sample) -> str:
        """SHA-256 over what is said and over the bytes of the pictures."""
        told = [[turn.role, turn.text] for turn in sample.turns]
        pictures = [self._digest(path) for path in sample.images]
        return hashlib.sha256(json.dumps([told, pictures]).encode()).hexdigest()

    def _digest(self, path: Path) -> str:
        try:
            stat = path.stat()
            place = (path, stat.st_size, stat.st_mtime_ns)
            if place not in self._digests:
                self._digests[place] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            return f"unreadable {path}"  # the collator says so
        return self._digests[place]


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
        fresh = self._collator.collate_valid(unknown, rejected) if unknown else None
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
        kept = CachedStates(
            self._states(batch, records),
            torch.tensor([b for b, s in enumerate(usable) if id(s) in made], dtype=torch.long),
            fresh,
            tuple(keys[id(s)] for s in usable if id(s) in made),
            tuple(noted(made[id(s)], cuts.get(s.origin, [])) for s in usable if id(s) in made),
        )
        return replace(batch, cached=kept, rejected=tuple(rejected))

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
            elif (made := self._collator.collate_valid([sample], told.setdefault(key, []))) is not None:
                fresh[key] = made
        usable = [sample for sample in samples if keys[id(sample)] in known or keys[id(sample)] in fresh]
        again: list[Rejection] = []
        batch = self._collator.collate_valid(usable, again, blank_images=True) if usable else None
        if batch is None:
            return self._collator(samples)
        for key, each in told.items():
            rejected += each if key not in fresh else []
        # Rows that are cut have been told of when they were encoded with their pictures; twins are told of one by one.
        rejected += [each for each in again if each.kind != "cut"]
        for s in batch.samples:
            key = keys[id(s)]
            rejected += notes(known[key], s) if key in known else [replace(each, origin=s.origin) for each in told[key]]
        return replace(batch, cached=self._cached(batch, keys, known, fresh, told), rejected=tuple(rejected))

    def _cached(
        self,
        batch: Batch,
        keys: dict[int, str],
        known: dict[str, dict[str, Tensor]],
        fresh: dict[str, Batch],
        told: dict[str, list[Rejection]],
    ) -> CachedFeatures:
        rows = [keys[id(sample)] for sample in batch.samples]
        missing = [b for b, key in enumerate(rows) if key in fresh]
        return CachedFeatures(
            tuple(known.get(key, {}).get(FEATURES) for key in rows),
            tuple(missing),
            tuple(fresh[rows[b]] for b in missing),
            tuple(rows[b] for b in missing),
            tuple(noted({}, [r.reason for r in told[rows[b]] if r.kind == "cut"]) for b in missing),
        )
