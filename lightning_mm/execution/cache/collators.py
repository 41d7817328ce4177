"""Collators that leave out what the activation cache holds, and the key and record of a cached row.

Data flow: Sample -> ``RowKeys`` -> SHA-256 of its text and image bytes -> record in the store.
``CachedPrefixCollator``: each row that is not cached alone through the model's collator -> ``split_row``, its tensors
without pixels -> ``merge_rows`` with the cached records -> ``Batch`` without pixels, whose ``cached`` holds the known
hidden states and one batch per uncached row.
``CachedVisionCollator``: rows that are not cached through the model's collator one by one, all rows with blank images
of the same sizes -> ``Batch`` whose ``cached`` holds the known features. Grids, tiles, masks and tokens are the
processor's own, since it gets every row.

A row that is not cached is always encoded and computed alone, so that its activations are a function of the row: not of
the rows beside it, nor of which of them are cached. Any state of the cache then trains with the same bits.

Shapes: B rows, L tokens after padding, T tokens of one row, S supervised positions, D hidden size, n images or tiles.
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
from lightning_mm.data.image_source import ImageSource
from lightning_mm.data.sample import Rejection, Sample
from lightning_mm.data.sample_encoder import ANIMATED as PICTURE_NOTE
from lightning_mm.execution.cache.store import RecordStore

Record = dict[str, Tensor]
"""One row: ``token.<input>`` (T, ...), ``row.<input>`` (n, ...), ``regions`` (T,), ``supervised``, ``targets`` (S,)."""

_TOKEN, _ROW = "token.", "row."


class InseparableRowsError(ValueError):
    """An input of a batch cannot be assigned to its rows."""


def is_pixels(name: str, value: Tensor) -> bool:
    """Whether a model's input holds pixels: a floating-point tensor, or a mask of pixels."""
    return value.is_floating_point() or name.startswith("pixel")


def split_row(row: Batch) -> Record:
    """The record of a batch of one row, without pixels.

    Raises:
        InseparableRowsError: The row has a video, and inputs beside its frames and tokens: some of these (seconds
            between frames) are floating-point and would be taken for pixels.
    """
    assert len(row) == 1, "a row is encoded alone"
    record = {"regions": row.regions[0], "supervised": row.supervised, "targets": row.targets}
    for name, value in row.inputs.items():
        if is_pixels(name, value):
            continue
        by_token = value.ndim >= 2 and value.shape[:2] == row.regions.shape
        if not by_token and row.samples[0].videos:
            raise InseparableRowsError(f"{name} says more of a video than its tokens do")
        record[(_TOKEN if by_token else _ROW) + name] = value[0] if by_token else value
    return record


def merge_rows(records: Sequence[Mapping[str, Tensor]], samples: Sequence[Sample], pad_token_id: int) -> Batch:
    """A right-padded batch without pixels, of records as ``split_row`` returns them.

    Args:
        records: One record per row.
        samples: The samples of these rows.
        pad_token_id: Id of the padding token.

    Raises:
        InseparableRowsError: An input of the rows differs in more than its number of tokens or images.
    """
    length = max(len(record["regions"]) for record in records)
    inputs = {}
    for key in dict.fromkeys(key for record in records for key in record):
        present = [record[key] for record in records if key in record]
        if len({each.shape[1:] for each in present}) > 1:
            raise InseparableRowsError(f"{key} of the rows differs in shape")
        if key.startswith(_TOKEN):
            name = key.removeprefix(_TOKEN)
            fill = pad_token_id if name == "input_ids" else 0
            # An input that a row lacks (token types of a row without image) is 0 for all of its tokens.
            absent = present[0][:0]
            inputs[name] = torch.stack([_right_pad(record.get(key, absent), length, fill) for record in records])
        elif key.startswith(_ROW):
            inputs[key.removeprefix(_ROW)] = torch.cat(present)
    return Batch(
        inputs,
        torch.stack([_right_pad(record["regions"], length, int(TokenRegion.PAD)) for record in records]),
        torch.cat([record["supervised"] + b * length for b, record in enumerate(records)]),
        torch.cat([record["targets"] for record in records]),
        tuple(samples),
    )


def _right_pad(values: Tensor, length: int, fill: int) -> Tensor:
    out = values.new_full((length, *values.shape[1:]), fill)
    out[: len(values)] = values
    return out


class RowKeys:
    """Computes the keys of rows; an image file is read again only if its size or modification time changes."""

    def __init__(self) -> None:
        self._digests: dict[tuple[ImageSource, int, int], str] = {}

    def __call__(self, sample: Sample) -> str:
        """SHA-256 (hexadecimal) of all of a sample that decides its row of a batch, with the bytes of its images."""
        turns = [[turn.role, turn.text, turn.train, turn.reasoning, turn.tool_calls] for turn in sample.turns]
        files = [[self._digest(path) for path in given] for given in (sample.images, sample.videos)]
        return hashlib.sha256(json.dumps([turns, files, sample.tools]).encode()).hexdigest()

    def of_pictures(self, sample: Sample) -> str:
        """SHA-256 (hexadecimal) of the contents of a sample's images and videos, in order."""
        files = [[self._digest(path) for path in given] for given in (sample.images, sample.videos)]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def _digest(self, path: ImageSource) -> str:
        try:
            if isinstance(path, Path) and path.is_dir():
                return hashlib.sha256("".join(map(self._digest, sorted(path.iterdir()))).encode()).hexdigest()
            stat = path.stat() if isinstance(path, Path) else None  # a table on disk never changes
            file_state = (path, stat.st_size if stat else 0, stat.st_mtime_ns if stat else 0)
            if file_state not in self._digests:
                self._digests[file_state] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            return f"unreadable {path}"  # the collator says so
        return self._digests[file_state]


ACTIVATIONS = "hidden"
"""Key of a record's hidden states (T, D) or vision features (shapes: ``vision_features``)."""

_TRUNCATION = "note"
"""Key of the reasons why a record's row is truncated: a JSON list in UTF-8."""


class CachedPrefixCollator:
    """Makes training batches in which cached rows have hidden states instead of images.

    Args:
        collator: The model's collator, for rows that are not cached.
        store: Records of cached rows, by ``RowKeys``.
        width: Hidden size D.
        dtype: dtype of the hidden states in a batch.
    """

    def __init__(self, collator: Collator, store: RecordStore, width: int, dtype: torch.dtype) -> None:
        self._collator, self._store, self._width, self._dtype = collator, store, width, dtype
        self._pad = int(collator.processing.processor.tokenizer.pad_token_id)
        self._key = RowKeys()

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Batch of the valid samples. Raises UserError if none is valid."""
        keys = {id(sample): self._key(sample) for sample in samples}
        rejected: list[Rejection] = []
        records: dict[str, Record] = {}
        uncached: dict[str, Batch] = {}
        try:
            for sample in samples:
                key = keys[id(sample)]
                if key not in records and (known := self._store.get(key, self._dtype)) is not None:
                    records[key] = known
                if key in records:
                    rejected += truncation_reasons(records[key], sample)
                    continue
                found: list[Rejection] = []
                row = self._collator.collate_valid([sample], found)
                rejected += found
                if row is not None:
                    cuts = [each.reason for each in found if each.kind == "cut"]
                    records[key], uncached[key] = with_truncation_reasons(split_row(row), cuts), row
            usable = [sample for sample in samples if keys[id(sample)] in records]
            if not usable:
                return self._collator(samples)
            rows = [keys[id(sample)] for sample in usable]
            batch = merge_rows([records[key] for key in rows], usable, self._pad)
        except InseparableRowsError:  # whatever is cached, for no such row ever is
            return self._collator(samples)
        uncached_rows = tuple(b for b, key in enumerate(rows) if key in uncached)
        cached = CachedStates(
            self._states(batch, [records[key] for key in rows]),
            uncached_rows,
            tuple(uncached[rows[b]] for b in uncached_rows),
            tuple(rows[b] for b in uncached_rows),
            tuple(records[rows[b]] for b in uncached_rows),
        )
        return replace(batch, cached=cached, rejected=tuple(rejected))

    def _states(self, batch: Batch, records: Sequence[Record]) -> Tensor:
        states_BLD = torch.zeros(*batch.regions.shape, self._width, dtype=self._dtype)
        for row_LD, record in zip(states_BLD, records, strict=True):
            if ACTIVATIONS in record:
                row_LD[: len(record["regions"])] = record[ACTIVATIONS]
        return states_BLD


def with_truncation_reasons(record: Record, reasons: list[str]) -> Record:
    """The record with the reasons why its row is truncated; the record itself if there are none."""
    if not reasons:
        return record
    return {**record, _TRUNCATION: torch.tensor(list(json.dumps(reasons).encode()), dtype=torch.uint8)}


def truncation_reasons(record: Record, sample: Sample) -> list[Rejection]:
    """One rejection of kind 'cut' per reason why the record's row is truncated."""
    reasons = json.loads(bytes(record[_TRUNCATION].tolist())) if _TRUNCATION in record else []
    return [Rejection(sample.origin, reason, "cut") for reason in reasons]


class CachedVisionCollator:
    """Makes training batches in which cached rows have vision features and blank images.

    Args:
        collator: The model's collator.
        store: Records of cached rows, by ``RowKeys``.
        dtype: dtype of the features in a batch.
    """

    def __init__(self, collator: Collator, store: RecordStore, dtype: torch.dtype) -> None:
        self._collator, self._store, self._dtype = collator, store, dtype
        self._key = RowKeys()

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Batch of the valid samples. Raises UserError if none is valid."""
        rejected: list[Rejection] = []
        keys = {id(sample): self._key.of_pictures(sample) for sample in samples}
        known: dict[str, dict[str, Tensor]] = {}
        uncached: dict[str, Batch] = {}
        cuts: dict[str, list[str]] = {}
        refused: dict[int, list[Rejection]] = {}
        for sample in samples:
            key = keys[id(sample)]
            if key in known or key in uncached:
                continue
            if (record := self._store.get(key, self._dtype)) is not None:
                known[key] = record
                continue
            found: list[Rejection] = []
            if (made := self._collator.collate_valid([sample], found)) is None:
                refused[id(sample)] = found
                continue
            uncached[key], cuts[key] = made, [each.reason for each in found if each.kind == "cut"]
        usable = [sample for sample in samples if keys[id(sample)] in known or keys[id(sample)] in uncached]
        again: list[Rejection] = []
        batch = self._collator.collate_valid(usable, again, blank_images=True) if usable else None
        if batch is None:
            return self._collator(samples)
        for sample in samples:
            rejected += refused[id(sample)] if keys[id(sample)] not in uncached and id(sample) in refused else []
        rejected += again
        # What only shows with the pictures themselves (an animated one) was found when they were encoded.
        own = {key: [reason for reason in reasons if reason.startswith(PICTURE_NOTE)] for key, reasons in cuts.items()}
        for s in batch.samples:
            key = keys[id(s)]
            rejected += (
                truncation_reasons(known[key], s)
                if key in known
                else [Rejection(s.origin, reason, "cut") for reason in own[key]]
            )
        return replace(batch, cached=self._cached(batch, keys, known, uncached, own), rejected=tuple(rejected))

    def _cached(
        self,
        batch: Batch,
        keys: dict[int, str],
        known: dict[str, dict[str, Tensor]],
        uncached: dict[str, Batch],
        notes: dict[str, list[str]],
    ) -> CachedFeatures:
        rows = [keys[id(sample)] for sample in batch.samples]
        uncached_rows = [b for b, key in enumerate(rows) if key in uncached]
        return CachedFeatures(
            tuple(known.get(key, {}).get(ACTIVATIONS) for key in rows),
            tuple(uncached_rows),
            tuple(uncached[rows[b]] for b in uncached_rows),
            tuple(rows[b] for b in uncached_rows),
            tuple(with_truncation_reasons({}, notes[rows[b]]) for b in uncached_rows),
        )
