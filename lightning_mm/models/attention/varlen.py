"""Decoder blocks without padding: the tokens of all rows side by side, each row still alone.

Data flow: a block is given (B, L, D) -> the T real tokens (1, T, D) through its norms, projections and MLP -> inside
its attention back to rows (B, H, L, E), under the mask that the model itself made for them -> (B, L, D) again, with
zeros where padding was. Between blocks a model finds what it expects, so nothing has to be known of its positions,
windows or masks.

Shapes: B rows, L tokens after padding, T real tokens of all rows, D hidden size, H heads, E head size.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lightning_mm.models.attention.cpu_kernels import Rows, rows_apart
from lightning_mm.models.attention.dispatch import (
    AttentionFunction,
    attention_modules,
    change_attention,
    has_eager_attention,
)
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import replace_forward

_KERNELS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Kernels that are looked up in transformers' registry; written-out (eager) attention is not, and stays padded."""


class RealTokens:
    """Which tokens of a padded batch are real.

    Args:
        index: (T,) flat into B * L, ascending.
        rows: B.
        length: L.
    """

    def __init__(self, index: Tensor, rows: int, length: int) -> None:
        self.index, self.rows, self.length = index, rows, length
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}
        self._apart: dict[int, tuple[Tensor, tuple[Rows, ...]]] = {}

    @property
    def padded(self) -> bool:
        """Whether there is any padding."""
        return len(self.index) < self.rows * self.length

    def pack(self, values: Tensor) -> Tensor:
        """(B, L, ...) -> (1, T, ...)."""
        return _Gathered.apply(values.flatten(0, 1), self.index)[None]

    def unpack(self, values: Tensor) -> Tensor:
        """(1, T, ...) -> (B, L, ...), zeros where padding is."""
        spread = _Scattered.apply(values[0], self.index, self.rows * self.length)
        return spread.unflatten(0, (self.rows, self.length))

    def of(self, value: Any) -> Any:
        """Anything that a block is given by token, for the real tokens only.

        Raises:
            _NotByToken: A tensor in it is by row, but not by token.
        """
        if isinstance(value, dict):
            return {key: self.of(each) for key, each in value.items()}
        if isinstance(value, tuple | list):
            return type(value)([self.of(each) for each in value])
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._packed:
            self._packed[id(value)] = (value, self._tensor(value))  # all blocks are given the same rotary tables
        return self._packed[id(value)][1]

    def apart(self, mask: Any) -> tuple[Rows, ...]:
        """The rows as they stand side by side, under a mask that the model made; none where they stay in rows."""
        if id(mask) not in self._apart:
            self._apart[id(mask)] = (mask, rows_apart(self.index, self.rows, self.length, mask))
        return self._apart[id(mask)][1]

    def _tensor(self, value: Tensor) -> Tensor:
        shape = value.shape
        for dim in range(value.ndim - 1):
            if shape[dim] in (1, self.rows) and shape[dim + 1] == self.length:
                spread = value.expand(*shape[:dim], self.rows, *shape[dim + 1 :]).flatten(dim, dim + 1)
                return spread.index_select(dim, self.index).unsqueeze(dim)
        if value.ndim == 1 and len(value) == self.length:
            return value[self.index % self.length]
        if value.ndim and (shape[0] == self.rows or self.length in shape):
            raise _NotByToken
        return value


class _NotByToken(Exception):
    pass


_now: ContextVar[RealTokens | None] = ContextVar("tokens of the batch that runs", default=None)
_inside: ContextVar[RealTokens | None] = ContextVar("tokens of the block that runs", default=None)


@contextmanager
def unpadded(tokens: RealTokens | None) -> Iterator[None]:
    """While active, blocks that ``unpad_blocks`` has prepared leave the padding out."""
    held = _now.set(tokens if tokens is not None and tokens.padded else None)
    try:
        yield
    finally:
        _now.reset(held)


def unpad_blocks(mm: MultimodalModel, undo: ExitStack) -> tuple[str, ...]:
    """Prepare every decoder block that can do without padding; returns their names.

    Blocks whose attention is not looked up in transformers' registry are left as they are.

    Args:
        mm: The plain model, after ``use_cpu_attention``: how long a row is, is decided inside.
        undo: Takes what puts the blocks back.
    """
    prepared = []
    for each in mm.layout.blocks:
        mixer: Any = mm.model.get_submodule(each.attention) if each.attention else None
        if mixer is None or not has_eager_attention(mixer) or mixer.config._attn_implementation not in _KERNELS:
            continue
        block = mm.model.get_submodule(each.name)
        change_attention(undo, attention_modules(block), lambda name, attend, _: _by_rows(attend, name))
        replace_forward(undo, block, _packed)
        prepared.append(each.name)
    return tuple(prepared)


def _packed(forward: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(forward).parameters)

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        tokens = _now.get()
        if tokens is None or kwargs.get("past_key_values") is not None:
            return forward(*args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = given.pop(names[0])
        try:
            # Masks stay: the model made them for rows, and attention runs by rows.
            rest = {name: value if "mask" in name else tokens.of(value) for name, value in given.items()}
            if any(isinstance(v, Tensor) and "mask" in n and not _by_row(v, tokens) for n, v in given.items()):
                raise _NotByToken
        except _NotByToken:
            return forward(*args, **kwargs)
        held = _inside.set(tokens)
        try:
            output = forward(tokens.pack(hidden), **rest)
        finally:
            _inside.reset(held)
        if isinstance(output, Tensor):
            return tokens.unpack(output)
        return (tokens.unpack(output[0]), *output[1:])

    return run


def _by_row(mask: Tensor, tokens: RealTokens) -> bool:
    """Whether it is a mask that attention reads: (B, L), or (B or 1, heads, L, L)."""
    return mask.shape[-1] == tokens.length and (mask.ndim == 2 or mask.shape[-2] == tokens.length)


def _by_rows(attend: AttentionFunction, name: str) -> AttentionFunction:
    """An attention function that puts the tokens of a block that runs unpadded back into rows, where it must."""
    if name not in _KERNELS:
        return attend

    @torch.compiler.disable  # compiled blocks break here once, instead of at every line
    @wraps(attend)
    def run(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens = _inside.get()
        if tokens is None:
            return attend(module, query, key, value, *args, **kwargs)
        apart: Any = getattr(attend, "apart", None)
        alone = None if apart is None else apart(tokens.apart, query, key, value, *args, **kwargs)
        if alone is not None:
            return alone, None
        rows = [tokens.unpack(each.transpose(1, 2)).transpose(1, 2) for each in (query, key, value)]
        output, weights = attend(module, *rows, *args, **kwargs)  # (B, L, H, E)
        return tokens.pack(output), weights

    return run


class _Gathered(torch.autograd.Function):
    """Rows by index; no index occurs twice, so that backward need not add."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = len(values)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.length, *gradient.shape[1:]).index_copy_(0, index, gradient), None


class _Scattered(torch.autograd.Function):
    """The reverse: rows put where the index says, zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(index)
        return values.new_zeros(length, *values.shape[1:]).index_copy_(0, index, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradient.index_select(0, index), None, None
