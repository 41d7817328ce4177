"""The proof that a model begun in its middle computes what the whole model computes, at the tensors that are replaced.

Data flow: recorded tensors of the whole model -> put back where they are read, everything else below set to NaN -> the
same tensors above (``structure_gap``: equal bits, as far as the model repeats its own). Then each row computed alone
beside the same row in the batch (``alone_gap``), within what the order of sums explains (``rounding_bound``).

The first part finds what is read besides what is cached: NaN reaches the output by any way there is, however small its
share of the loss. It needs no tolerance, since the same kernels get the same numbers.

Shapes: B rows, L tokens, T real tokens of all rows, D hidden size.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import Forward, block_io, replace_forward

FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
"""Exceptions that a model's forward raises if an input is missing."""

_REPEATS = 4.0
"""How far from the whole the halves may be, in terms of how far two runs of the whole are from each other."""

_SAFETY = 2.0
"""How many times the expected rounding a row computed alone may be from the same row in a batch."""

_ACCUMULATED = 2.0**-24
"""Unit roundoff of the float32 in which all kernels add up."""


def decoder_states(mm: MultimodalModel, batch: Batch, slices: Collection[int]) -> Tensor:
    """(slices, T, D) float32 states of the decoder at real tokens; slice 0 enters the first block, N leaves the last.

    Args:
        mm: The plain model.
        batch: Rows on the model's device.
        slices: Which of the N + 1 slices.
    """
    held: dict[int, Tensor] = {}
    with block_io(mm, held.__setitem__, slices):
        supervised_nll(mm.model, mm.head, batch)
    return torch.stack([held[each].flatten(0, 1)[batch.real].float() for each in sorted(held)])


def structure_gap(whole: Tensor, again: Tensor, halves: Tensor) -> float:
    """Relative difference of the halves from the whole; 0 if it is no larger than the whole's from itself.

    Args:
        whole: Any tensor of the whole model.
        again: The same tensor of the same rows, computed a second time: kernels that add in any order differ.
        halves: The same tensor of the halves.
    """
    gap = relative_gap(whole, halves)
    return 0.0 if gap <= _REPEATS * relative_gap(whole, again) else gap


def differs(gap: float) -> str:
    """A gap in words; NaN comes from what is said not to be read."""
    return "is lost" if math.isnan(gap) else f"differs by {gap:.2g} of itself"


def relative_gap(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm of the first; NaN where one of them has NaN."""
    return float((one.float() - other.float()).norm() / one.float().norm().clamp_min(1e-12))


def rounding_bound(dtype: torch.dtype, device: str, width: int, depth: int) -> float:
    """The largest relative difference, in the norm, that the order of sums explains.

    Each block rounds its results to the dtype it computes in, and its sums of ``width`` terms in float32; roundings are
    independent, so that both grow with the square root of their number.

    Args:
        dtype: Of the states.
        device: Type of the device; its autocast is in effect.
        width: Terms of a sum.
        depth: Number of blocks.
    """
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    unit = torch.finfo(dtype).eps / 2
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if device == "cuda" and dtype == torch.float32 and tf32:
        unit = 2.0**-11
    return _SAFETY * math.sqrt(depth) * max(unit, _ACCUMULATED * math.sqrt(width))


@contextmanager
def poisoned(blocks: Iterable[nn.Module], in_tuple: bool) -> Iterator[None]:
    """While active, blocks return NaN in the shape of their input.

    Args:
        blocks: Blocks that are skipped.
        in_tuple: Whether their output is a tuple that begins with the hidden states.
    """

    def nothing(*args: Any, **kwargs: Any) -> Any:
        hidden = torch.full_like(args[0] if args else kwargs["hidden_states"], math.nan)
        return (hidden,) if in_tuple else hidden

    def make(_: Forward) -> Forward:
        return nothing

    with ExitStack() as undo:
        for block in blocks:
            replace_forward(undo, block, make)
        yield


@contextmanager
def poisoned_output(module: nn.Module) -> Iterator[None]:
    """While active, the module returns NaN."""
    handle = module.register_forward_hook(lambda _, __, output: torch.full_like(output, math.nan))
    try:
        yield
    finally:
        handle.remove()


def poisoned_pixels(batch: Batch) -> Batch:
    """The batch with NaN for every pixel; zeros stay, since some models know the tiles that only pad by them."""
    return replace(
        batch,
        inputs={
            name: torch.where(value == 0, value, math.nan) if value.is_floating_point() else value
            for name, value in batch.inputs.items()
        },
    )
