"""One record, a dict of tensors, as bytes and back.

Data flow: tensors -> rounded to the storage dtype -> ``encode_record`` -> bytes in a shard -> ``decode_record`` ->
tensors.

Layout: length of the header (u32) | header (JSON) | each tensor, beginning at a multiple of 16 bytes | zeros up to a
multiple of 64. A tensor stored in int8 is its values, then one float32 scale per row; a row is what lies along the last
dimension. The header's "distance" is the rounding error.

Tensors are rounded straight into the bytes that go to disk, and read in place from a memory map. safetensors copies
once more in both directions: 20 to 40 % more time to encode a row of the nano model's states.
"""

import json
import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

StorageDtype = Literal["float32", "bfloat16", "int8"]
"""How lossy tensors are stored."""

RECORD_ALIGN = 64
_TENSOR_ALIGN = 16
_LENGTH = struct.Struct("<I")
_DTYPES = {str(each).removeprefix("torch."): each for each in vars(torch).values() if isinstance(each, torch.dtype)}


class RoundingError(NamedTuple):
    """How far lossy tensors are from what was given, as two sums of squares over all of their elements."""

    squared_error: float = 0.0
    squared_norm: float = 0.0

    def plus(self, other: "RoundingError") -> "RoundingError":
        return RoundingError(self.squared_error + other.squared_error, self.squared_norm + other.squared_norm)

    @property
    def relative(self) -> float:
        """Root mean square error over root mean square."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


@dataclass(frozen=True)
class _TensorEntry:
    """One tensor of a header."""

    name: str
    dtype: str
    shape: list[int]
    lossy: bool
    scaled: bool

    def offsets(self, start: int) -> tuple[int, int, int]:
        """First byte of the values, first byte of the scales, and the end of both."""
        values_end = start + math.prod(self.shape) * _DTYPES[self.dtype].itemsize
        scales = values_end + -values_end % _TENSOR_ALIGN
        return start, scales, scales + (4 * math.prod(self.shape[:-1]) if self.scaled else 0)


def encode_record(
    record: Mapping[str, Tensor], storage: StorageDtype, lossy: Collection[str]
) -> tuple[Tensor, RoundingError]:
    """The bytes of a record, and what rounding has cost.

    Args:
        record: Tensors of any dtype, shape and device; rounded where they are, then brought to the host.
        storage: How the floating tensors named in ``lossy`` are stored. Those that are no wider already stay as they
            are, and so does one that would not be finite.
        lossy: The names of tensors that need not be exact.

    Returns:
        (bytes,) uint8, a multiple of 64; the error.
    """
    entries: list[_TensorEntry] = []
    parts: list[tuple[Tensor, Tensor | None]] = []
    rounding = RoundingError()
    for name, given in record.items():
        values, scales = given.detach(), None
        is_lossy = name in lossy and given.is_floating_point()
        if is_lossy and given.numel():
            values, scales, lost = _round(values, storage)
            rounding = rounding.plus(lost)
        dtype = str(values.dtype).removeprefix("torch.")
        entries.append(_TensorEntry(name, dtype, list(given.shape), is_lossy, scales is not None))
        parts.append((values, scales))
    header = json.dumps({"distance": rounding, "tensors": [vars(entry) for entry in entries]}).encode()
    pieces: list[tuple[int, Tensor]] = []
    end = _LENGTH.size + len(header)
    for entry, (values, scales) in zip(entries, parts, strict=True):
        values_at, scales_at, end = entry.offsets(end + -end % _TENSOR_ALIGN)
        pieces += [(values_at, values)] if scales is None else [(values_at, values), (scales_at, scales)]
    data = torch.empty(end + -end % RECORD_ALIGN, dtype=torch.uint8)
    filled = _copy_into(data, 0, torch.frombuffer(bytearray(_LENGTH.pack(len(header)) + header), dtype=torch.uint8))
    for start, values in pieces:
        data[filled:start] = 0
        filled = _copy_into(data, start, values)
    data[filled:] = 0
    return data, rounding


def decode_record(data: Tensor, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], RoundingError]:
    """The tensors of a record, in memory of their own, and what rounding has cost.

    Args:
        data: (bytes of a record,) uint8.
        dtype: What lossy tensors are decoded to; others come as they were given.
    """
    (length,) = _LENGTH.unpack(data[: _LENGTH.size].numpy().tobytes())
    end = _LENGTH.size + length
    header: dict[str, Any] = json.loads(data[_LENGTH.size : end].numpy().tobytes())
    record: dict[str, Tensor] = {}
    for entry in (_TensorEntry(**fields) for fields in header["tensors"]):
        values_at, scales_at, end = entry.offsets(end + -end % _TENSOR_ALIGN)
        stored = _DTYPES[entry.dtype]
        num_bytes = math.prod(entry.shape) * stored.itemsize
        values = data[values_at : values_at + num_bytes].view(stored).view(entry.shape)
        if entry.scaled:
            scales = data[scales_at:end].view(torch.float32).view(*entry.shape[:-1], 1)
            values = values.float().mul_(scales).to(dtype)
        else:
            values = values.to(dtype if entry.lossy else stored, copy=True)
        record[entry.name] = values
    return record, RoundingError(*header["distance"])


def _round(given: Tensor, storage: StorageDtype) -> tuple[Tensor, Tensor | None, RoundingError]:
    """Values, scales (None where there are none) and the error of a tensor; itself where ``storage`` cannot hold it."""
    target = _DTYPES[storage]
    scales = None
    if target is torch.int8 and given.ndim:
        wide = given.float()
        scales = wide.abs().amax(-1, keepdim=True) / 127
        values = (wide / scales).nan_to_num_(0.0).round_().clamp_(-127, 127).to(torch.int8)
        back = values.float().mul_(scales)
    elif target is torch.int8 or given.element_size() <= target.itemsize:
        return given, None, RoundingError(0.0, _squared_norm(given))
    else:
        values = given.to(target)
        back = values.to(given.dtype)
    rounding = RoundingError(_squared_norm(given.to(back.dtype) - back), _squared_norm(given))
    if not math.isfinite(rounding.squared_error):
        return given, None, RoundingError()
    return values, scales, rounding


def _squared_norm(x: Tensor) -> float:
    """The sum of squares: float64 over rows, which are short enough for their own precision, and 13 times as fast."""
    rows = torch.linalg.vector_norm(x.float() if x.element_size() < 4 else x, dim=-1)
    norm = float(torch.linalg.vector_norm(rows, dtype=torch.float64))
    return norm * norm


def _copy_into(data: Tensor, start: int, values: Tensor) -> int:
    """Copy the bytes of ``values`` into ``data`` from byte ``start`` on; the end of them."""
    end = start + values.numel() * values.element_size()
    if values.numel():
        data[start:end].view(values.dtype).view(values.shape).copy_(values)
    return end
