"""Decoder blocks without padding and repetition: the tokens of all rows side by side, with attention still by row.

Data flow: input of a block (B, L, D) -> the T real tokens (1, T, D) through its norms, projections and MLP -> inside
its attention back to rows (B, H, L, E), under the model's own mask -> (B, L, D) again, with zeros at padding. Between
blocks the shapes are those of the model, so this does not depend on its positions, windows or masks.

Tokens that rows side by side begin with (a picture with several questions) can be left to the first of these rows. They
see nothing behind them, so their states are the same in all of these rows, and are copied back after the block.

Shapes: B rows, L tokens after padding, T real tokens of all rows, D hidden size, H heads, E head size.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.models.attention.cpu_kernels import Rows, split_groups, split_unpadded_rows
from lightning_mm.models.attention.dispatch import (
    AttentionFunction,
    attention_modules,
    change_attention,
    has_eager_attention,
)
from lightning_mm.models.attention.proof import current_proof
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import Forward, replace_forward

_KERNELS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Kernels that are looked up in transformers' registry; eager attention is not, and stays padded."""


class RealTokens:
    """The tokens of a padded batch that are computed: not padding, and not the first tokens of another row as well.

    Args:
        index: (T,) flat indices into B * L, ascending.
        rows: Number of rows B.
        length: Tokens L of a row with its padding.
        prefixes: Row that computes the first tokens of each row, and their number; None: each row its own.
    """

    def __init__(
        self, index: Tensor, rows: int, length: int, prefixes: tuple[Sequence[int], Sequence[int]] | None = None
    ) -> None:
        self.index, self.rows, self.length, self.prefixes = index, rows, length, prefixes
        self._copies = () if prefixes is None else _copies(index, rows * length, length, *prefixes)
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}
        self._split: dict[int, tuple[object, tuple[Rows, ...]]] = {}

    @property
    def padded(self) -> bool:
        """Whether there is any padding, or a token that several rows share."""
        return len(self.index) < self.rows * self.length

    def pack(self, values: Tensor) -> Tensor:
        """(B, L, ...) -> (1, T, ...)."""
        return _Gather.apply(values.flatten(0, 1), self.index)[None]

    def unpack(self, values: Tensor) -> Tensor:
        """(1, T, ...) -> (B, L, ...), zeros where padding is; shared tokens in every row that has them."""
        spread = _Scatter.apply(values[0], self.index, self.rows * self.length, self._copies)
        return spread.unflatten(0, (self.rows, self.length))

    def of(self, value: Any) -> Any:
        """A block's argument (tensor, or nested tuples, lists and dicts) restricted to the real tokens.

        Raises:
            _NotByTokenError: A tensor in it is by row, but not by token.
        """
        if isinstance(value, dict):
            return {key: self.of(each) for key, each in value.items()}
        if isinstance(value, tuple | list):
            return type(value)([self.of(each) for each in value])
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._packed:
            self._packed[id(value)] = (value, self._tensor(value))  # all blocks get the same rotary tables
        return self._packed[id(value)][1]

    def split_rows(self, mask: object) -> tuple[Rows, ...]:
        """The unpadded rows under a mask of the model; empty if attention is to be computed on padded rows."""
        if id(mask) not in self._split:
            given = (self.index, self.rows, self.length, mask)
            split = split_unpadded_rows(*given) if self.prefixes is None else split_groups(*given, *self.prefixes)
            self._split[id(mask)] = (mask, split)
        return self._split[id(mask)][1]

    def _tensor(self, value: Tensor) -> Tensor:
        shape = value.shape
        for dim in range(value.ndim - 1):
            if shape[dim] in (1, self.rows) and shape[dim + 1] == self.length:
                spread = value.expand(*shape[:dim], self.rows, *shape[dim + 1 :]).flatten(dim, dim + 1)
                return spread.index_select(dim, self.index).unsqueeze(dim)
        if value.ndim == 1 and len(value) == self.length:
            return value[self.index % self.length]
        if value.ndim and (shape[0] == self.rows or self.length in shape):
            raise _NotByTokenError
        return value


class _NotByTokenError(Exception):
    """An argument of a block is by row, but not by token."""


_batch_tokens: ContextVar[RealTokens | None] = ContextVar("tokens of the batch that runs", default=None)
_block_tokens: ContextVar[RealTokens | None] = ContextVar("tokens of the block that runs", default=None)


@contextmanager
def unpadded(tokens: RealTokens | None) -> Iterator[None]:
    """While active, blocks prepared by ``unpad_blocks`` leave the padding out.

    Args:
        tokens: The real tokens of the batch; None: blocks run on padded rows.
    """
    held = _batch_tokens.set(tokens if tokens is not None and tokens.padded else None)
    try:
        yield
    finally:
        _batch_tokens.reset(held)


def unpad_blocks(mm: MultimodalModel, undo: ExitStack) -> tuple[str, ...]:
    """Prepare every decoder block that can run without padding; returns their module names.

    Blocks whose attention is not looked up in transformers' registry are left as they are; of the others, those that
    ``proof.proving_blocks`` finds to differ.

    Args:
        mm: The plain model, after ``use_cpu_attention``, whose kernels are called inside.
        undo: Gets the callbacks that restore the blocks.
    """
    prepared: list[str] = []
    padded: set[str] = set()
    modules: list[nn.Module] = []
    for each in mm.layout.blocks:
        mixer: Any = mm.model.get_submodule(each.attention) if each.attention else None
        if mixer is None or not has_eager_attention(mixer) or mixer.config._attn_implementation not in _KERNELS:
            continue
        block = mm.model.get_submodule(each.name)
        modules += attention_modules(block)
        replace_forward(undo, block, partial(_without_padding, each.name, padded))
        prepared.append(each.name)
    # One registry for all blocks: torch.compile keeps what it has compiled with it.
    change_attention(undo, modules, lambda name, attend, _: _attend_by_rows(attend, name))
    return tuple(prepared)


def _without_padding(name: str, padded: set[str], forward: Forward) -> Forward:
    """A block's forward without padding.

    Args:
        name: Module name of the block.
        padded: Blocks that a proof has found to need it; shared by all blocks.
        forward: The block's forward until now.
    """
    names = list(inspect.signature(forward).parameters)

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        tokens = _batch_tokens.get()
        if tokens is None or name in padded or kwargs.get("past_key_values") is not None:
            return forward(*args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = given.pop(names[0])
        try:
            # Masks are not packed: attention runs by row.
            rest = {key: value if "mask" in key else tokens.of(value) for key, value in given.items()}
            if any(isinstance(v, Tensor) and "mask" in n and not _is_row_mask(v, tokens) for n, v in given.items()):
                raise _NotByTokenError
        except _NotByTokenError:
            return forward(*args, **kwargs)
        bare = partial(_on_real_tokens, forward, tokens, rest)
        if (proof := current_proof()) is None:
            return bare(hidden)

        def first(output: Any) -> Tensor:
            states: Tensor = output if isinstance(output, Tensor) else output[0]
            return states

        if not proof.run(name, hidden, tokens.index, lambda x: first(forward(x, **given)), lambda x: first(bare(x))):
            padded.add(name)
        return forward(*args, **kwargs)

    return run


def _on_real_tokens(forward: Forward, tokens: RealTokens, rest: dict[str, Any], hidden: Tensor) -> Any:
    """What a block returns, its states (B, L, D) computed from the real tokens alone; ``rest`` is packed already."""
    held = _block_tokens.set(tokens)
    try:
        output = forward(tokens.pack(hidden), **rest)
    finally:
        _block_tokens.reset(held)
    if isinstance(output, Tensor):
        return tokens.unpack(output)
    return (tokens.unpack(output[0]), *output[1:])


def _is_row_mask(mask: Tensor, tokens: RealTokens) -> bool:
    """Whether a mask is one of padded rows: (B, L), or (B or 1, 1 or H, L, L)."""
    return mask.shape[-1] == tokens.length and (mask.ndim == 2 or mask.shape[-2] == tokens.length)


def _attend_by_rows(attend: AttentionFunction, name: str) -> AttentionFunction:
    """The attention function, which inside an unpadded block runs by row: unpadded if it can, else on padded rows."""
    if name not in _KERNELS:
        return attend

    @torch.compiler.disable  # compiled blocks break here once, instead of at every line
    @wraps(attend)
    def run(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens = _block_tokens.get()
        if tokens is None:
            return attend(module, query, key, value, *args, **kwargs)
        attend_unpadded: Any = getattr(attend, "attend_unpadded", None)
        unpadded_output = (
            None if attend_unpadded is None else attend_unpadded(tokens.split_rows, query, key, value, *args, **kwargs)
        )
        if unpadded_output is not None:
            return unpadded_output, None
        rows = [tokens.unpack(each.transpose(1, 2)).transpose(1, 2) for each in (query, key, value)]
        output, weights = attend(module, *rows, *args, **kwargs)  # (B, L, H, E)
        return tokens.pack(output), weights

    return run


class _Gather(torch.autograd.Function):
    """Selects rows by index; no index occurs twice, so that backward copies instead of adding."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = len(values)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.length, *gradient.shape[1:]).index_copy_(0, index, gradient), None


Copies = tuple[tuple[Tensor, Tensor], ...]
"""Tokens (N,) among the T, and their places (N,) in B * L; within each pair no token and no place occurs twice."""


def _copies(index: Tensor, size: int, length: int, owner: Sequence[int], shared: Sequence[int]) -> Copies:
    """Places of shared tokens in the rows that do not compute them; the n-th pair is of the n-th such row of its owner.

    Args:
        index: (T,) flat indices into B * L.
        size: B * L.
        length: L.
        owner: Row that computes the first tokens of each row.
        shared: Number of those tokens of each row.
    """
    token_of = torch.full((size,), -1, dtype=torch.long, device=index.device)
    token_of[index] = torch.arange(len(index), device=index.device)
    turns: list[list[tuple[int, int]]] = []
    for row, (first, count) in enumerate(zip(owner, shared, strict=True)):
        if count:
            turn_number = sum(1 for earlier in range(row) if shared[earlier] and owner[earlier] == first)
            turns += [[]] if turn_number == len(turns) else []
            turns[turn_number] += [(first * length + t, row * length + t) for t in range(count)]
    found = []
    for turn in turns:
        pairs = torch.tensor(turn, device=index.device)
        found.append((token_of[pairs[:, 0]], pairs[:, 1].contiguous()))
    return tuple(found)


class _Scatter(torch.autograd.Function):
    """Writes rows to the places of an index and to those of their copies, zeros elsewhere.

    Backward adds up what the copies get, turn by turn, so that the order of additions is fixed on every device.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, length: int, copies: Copies) -> Tensor:
        ctx.save_for_backward(index, *chain.from_iterable(copies))
        out = values.new_zeros(length, *values.shape[1:]).index_copy_(0, index, values)
        for tokens, places in copies:
            out.index_copy_(0, places, values.index_select(0, tokens))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        index, *copies = ctx.saved_tensors
        out = gradient.index_select(0, index)
        for tokens, places in zip(copies[::2], copies[1::2], strict=True):
            out.index_add_(0, tokens, gradient.index_select(0, places))
        return out, None, None, None
