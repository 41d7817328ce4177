"""One record, some tensors by name, as a run of bytes and back.

Data flow: ``store`` -> ``encode`` -> bytes in a shard -> ``decode`` -> the tensors.

Layout: length of the head (u32) | head (JSON) | each tensor, beginning at a multiple of 16 bytes | zeros up to a
multiple of 64. A tensor kept in int8 is its values, then one float32 scale per row; a row is what lies along the last
dimension.
"""

import json
import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kept = Literal["float32", "bfloat16", "int8"]
_LENGTH = struct.Struct("<I")
_ALIGN = 16
RECORD_ALIGN = 64
_DTYPES = {str(each).removeprefix("torch."): each for each in vars(torch).values() if isinstance(each, torch.dtype)}


class Distance(NamedTuple):
    """How far what was kept is from what was given, as two sums of squares over all elements of lossy tensors."""

    error: float = 0.0
    given: float = 0.0

    def plus(self, other: "Distance") -> "Distance":
        return Distance(self.error + other.error, self.given + other.given)

    @property
    def relative(self) -> float:
        """Root mean square error over root mean square."""
        return math.sqrt(self.error / self.given) if self.given else 0.0


@dataclass(frozen=True)
class _Entry:
    """One tensor of a head."""

    name: str
    dtype: str
    shape: list[int]
    lossy: bool
    scaled: bool

    def where(self, start: int) -> tuple[int, int, int]:
        """First byte of the values, of the scales, and behind both."""
        values = start + math.prod(self.shape) * _DTYPES[self.dtype].itemsize
        scales = values + -values % _ALIGN
        return start, scales, scales + (4 * math.prod(self.shape[:-1]) if self.scaled else 0)


def encode(record: Mapping[str, Tensor], kept: Kept, lossy: Collection[str]) -> tuple[Tensor, Distance]:
    """The bytes of ``record``, and how far they are from it.

    Args:
        record: Tensors of any dtype, shape and device; rounded where they are, then brought to the host.
        kept: How the floating tensors named in ``lossy`` are kept. Those that are no wider already stay as they are,
            and so does one that would not be finite.
        lossy: The names of tensors that need not be exact.

    Returns:
        (bytes,) uint8, a multiple of 64; the distance.
    """
    entries: list[_Entry] = []
    parts: list[tuple[Tensor, Tensor | None]] = []
    distance = Distance()
    for name, given in record.items():
        values, scales = given.detach(), None
        may = name in lossy and given.is_floating_point()
        if may and given.numel():
            values, scales, lost = _narrowed(values, kept)
            distance = distance.plus(lost)
        dtype = str(values.dtype).removeprefix("torch.")
        entries.append(_Entry(name, dtype, list(given.shape), may, scales is not None))
        parts.append((values, scales))
    head = json.dumps({"distance": distance, "tensors": [vars(entry) for entry in entries]}).encode()
    pieces: list[tuple[int, Tensor]] = []
    end = _LENGTH.size + len(head)
    for entry, (values, scales) in zip(entries, parts, strict=True):
        start, middle, end = entry.where(end + -end % _ALIGN)
        pieces += [(start, values)] if scales is None else [(start, values), (middle, scales)]
    data = torch.empty(end + -end % RECORD_ALIGN, dtype=torch.uint8)
    _lay(data, 0, torch.frombuffer(bytearray(_LENGTH.pack(len(head)) + head), dtype=torch.uint8))
    filled = _LENGTH.size + len(head)
    for start, values in pieces:
        data[filled:start] = 0
        filled = _lay(data, start, values)
    data[filled:] = 0
    return data, distance


def decode(data: Tensor, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Distance]:
    """The tensors in ``data``, in their own memory, and how far they are from what was given.

    Args:
        data: (bytes of a record,) uint8.
        dtype: What lossy tensors are decoded to; others come as they were given.
    """
    (length,) = _LENGTH.unpack(data[: _LENGTH.size].numpy().tobytes())
    start = _LENGTH.size + length
    head: dict[str, Any] = json.loads(data[_LENGTH.size : start].numpy().tobytes())
    record: dict[str, Tensor] = {}
    for entry in (_Entry(**fields) for fields in head["tensors"]):
        start, middle, end = entry.where(start + -start % _ALIGN)
        stored = _DTYPES[entry.dtype]
        count = math.prod(entry.shape) * stored.itemsize
        values = data[start : start + count].view(stored).view(entry.shape)
        if entry.scaled:
            rows = data[middle:end].view(torch.float32).view(*entry.shape[:-1], 1)
            values = values.float().mul_(rows).to(dtype)
        else:
            values = values.to(dtype if entry.lossy else stored, copy=True)
        record[entry.name] = values
        start = end
    return record, Distance(*head["distance"])


def _narrowed(given: Tensor, kept: Kept) -> tuple[Tensor, Tensor | None, Distance]:
    """Values and scales of a tensor that need not be exact; itself where ``kept`` cannot hold it."""
    target = _DTYPES[kept]
    scales = None
    if target is torch.int8 and given.ndim:
        wide = given.float()
        scales = wide.abs().amax(-1, keepdim=True) / 127
        values = (wide / scales).nan_to_num_(0.0).round_().clamp_(-127, 127).to(torch.int8)
        back = values.float().mul_(scales)
    elif target is torch.int8 or given.element_size() <= target.itemsize:
        return given, None, Distance(0.0, _square(given))
    else:
        values = given.to(target)
        back = values.to(given.dtype)
    distance = Distance(_square(given.to(back.dtype) - back), _square(given))
    if not math.isfinite(distance.error):
        return given, None, Distance()
    return values, scales, distance


def _square(x: Tensor) -> float:
    """The sum of squares: float64 over rows, which are short enough for their own precision, and 13 times as fast."""
    rows = torch.linalg.vector_norm(x.float() if x.element_size() < 4 else x, dim=-1)
    norm = float(torch.linalg.vector_norm(rows, dtype=torch.float64))
    return norm * norm


def _lay(data: Tensor, start: int, values: Tensor) -> int:
    """Put the bytes of ``values`` into ``data`` from byte ``start`` on; the first byte behind them."""
    end = start + values.numel() * values.element_size()
    if values.numel():
        data[start:end].view(values.dtype).view(values.shape).copy_(values)
    return end
