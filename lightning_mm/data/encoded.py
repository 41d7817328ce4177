"""Batches taken apart into rows, and put together again: what a row is kept as once its pixels are not needed.

Data flow: Batch -> ``cut`` -> one record of tensors per row (what is kept beside its hidden states) -> ``joined`` with
other rows -> the same Batch without pixels.

Shapes: B rows, L tokens after padding, T tokens of one row, S supervised positions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mm.data.batch import Batch, TokenRegion
from lightning_mm.data.sample import Sample

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
