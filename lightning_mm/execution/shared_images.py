"""Rows that share pictures in a training step: each picture through the tower once, and the proof that it is right.

Data flow: ``Batch`` with ``shared`` -> ``encode_images_once`` around the model's forward pass: equal pictures are taken
out before the vision tower and put back behind it; ``keep_last_image`` around rows that are computed one by one, for a
cache: the tower answers a picture that comes again. ``verify_sharing`` compares a batch of the run's own rows with the
same rows computed one by one, before the first step.

Shapes: M pictures (or tiles) of a batch, U different ones, P patches of all pictures, B rows, L tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, CachedFeatures
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import Forward, block_io, replace_forward

_EXACT = 1e-4
"""Relative tolerance in float32 of states and losses: other orders of summation, over all blocks."""
_COARSE = 5e-2
"""The same in 16 bits, where each block rounds its output."""


@dataclass(frozen=True)
class EqualPictures:
    """Which pictures of a batch are equal to earlier ones.

    Args:
        first: (U,) the first of each group of equal pictures.
        inverse: (M,) which of the U each picture is.
    """

    first: tuple[int, ...]
    inverse: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[Tensor]) -> "EqualPictures":
        """Of M tensors, compared by value."""
        seen: dict[tuple[Any, ...], list[int]] = {}
        first: list[int] = []
        inverse: list[int] = []
        for value in values:
            key = (tuple(value.shape), float(value.double().sum()))
            known = next((u for u in seen.get(key, ()) if torch.equal(values[first[u]], value)), None)
            if known is None:
                known = len(first)
                first.append(len(inverse))
                seen.setdefault(key, []).append(known)
            inverse.append(known)
        return cls(tuple(first), tuple(inverse))

    @property
    def any_twice(self) -> bool:
        """Whether there is a picture to leave out."""
        return len(self.first) < len(self.inverse)


def encode_images_once(mm: MultimodalModel, batch: Batch) -> AbstractContextManager[None]:
    """While active, the vision tower computes equal pictures once.

    Args:
        mm: The plain model.
        batch: The batch that runs; nothing changes where its rows share nothing, or its features come from a cache.
    """
    tower = mm.transformers.get_encoder(modality="image")
    if batch.shared is None or tower is None or isinstance(batch.cached, CachedFeatures):
        return nullcontext()
    return _deduplicated(tower)


def keep_last_image(mm: MultimodalModel, batch: Batch) -> AbstractContextManager[None]:
    """While active, the vision tower answers the pixels of the call before with its last outputs: the same bits.

    Args:
        mm: The plain model, which computes rows one by one.
        batch: The batch of these rows; nothing changes where its rows share nothing.
    """
    tower = mm.transformers.get_encoder(modality="image")
    return nullcontext() if batch.shared is None or tower is None else _repeating(tower)


@contextmanager
def _repeating(tower: nn.Module) -> Iterator[None]:
    with ExitStack() as undo:
        replace_forward(undo, tower, _same_again)
        yield


def _same_again(forward: Forward) -> Forward:
    """A tower's forward that keeps its last arguments and outputs."""
    held: list[Any] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if not held or held[1] != spec or not all(map(_equal, held[0], leaves)):
            held[:] = leaves, spec, forward(*args, **kwargs)
        return pytree.tree_map(lambda each: each, held[2])  # of its own, since models put more into what they get

    return run


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


@contextmanager
def _deduplicated(tower: nn.Module) -> Iterator[None]:
    with ExitStack() as undo:
        replace_forward(undo, tower, _once)
        yield


def _once(forward: Forward) -> Forward:
    """A tower's forward for its different pictures only: a batch (M, C, H, W), or patches (P, D) with grids (M, 3)."""

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        pixels = next((each for each in leaves if isinstance(each, Tensor) and each.is_floating_point()), None)
        if pixels is None:
            return forward(*args, **kwargs)
        grids = next((each for each in leaves if _is_grid(each, pixels)), None)
        sizes = [1] * len(pixels) if grids is None else grids.prod(1).tolist()
        if (grids is None and pixels.ndim < 3) or len(sizes) < 2:
            return forward(*args, **kwargs)
        equal = EqualPictures.of(pixels.split(sizes))
        if not equal.any_twice:
            return forward(*args, **kwargs)

        def kept(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and len(value) == len(pixels):
                return torch.cat([value.split(sizes)[i] for i in equal.first])
            by_picture = isinstance(value, Tensor) and value.ndim and len(value) == len(sizes)
            return value[list(equal.first)] if by_picture else value

        args, kwargs = pytree.tree_unflatten([kept(each) for each in leaves], spec)
        return pytree.tree_map(_repeater([sizes[i] for i in equal.first], equal), forward(*args, **kwargs))

    return run


def _is_grid(value: Any, pixels: Tensor) -> bool:
    is_grid = isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == 3 and not value.is_floating_point()
    return is_grid and int(value.prod(1).sum()) == len(pixels)


def _repeater(sizes: Sequence[int], equal: EqualPictures) -> Callable[[Any], Any]:
    """Puts equal pictures back into each tensor that a tower returns.

    Args:
        sizes: (U,) patches of each different picture, or 1; an output has these or a fraction of them (merged patches).
        equal: Which pictures are equal.
    """

    def repeated(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or not len(value):
            return value
        if len(value) == len(equal.first) and set(sizes) == {1}:
            return value[list(equal.inverse)]
        total = sum(sizes)
        parts = [size * len(value) // total for size in sizes]
        assert sum(parts) == len(value)
        assert all(n * total == size * len(value) for n, size in zip(parts, sizes, strict=True))
        of_picture = value.split(parts)
        return torch.cat([of_picture[u] for u in equal.inverse])

    return repeated


def verify_sharing(mm: MultimodalModel, batch: Batch, token_nll: Callable[[Batch], Tensor], exact: bool) -> None:
    """Prove on a batch that sharing changes nothing, before the first step.

    Compared are what each block makes of the shared tokens in each of their rows, computed alone: they must not depend
    on what follows; and the loss of every supervised token.

    Args:
        mm: The plain model, prepared for training steps.
        batch: Rows of the run, on the model's device, of which some share pictures.
        token_nll: Loss (S,) of each supervised token of a batch, as the training step computes it.
        exact: Whether the step computes in float32.

    Raises:
        UserError: The model's blocks see more than what stands before a token, or the losses differ.
    """
    shared = batch.shared
    assert shared is not None
    alone = replace(batch, shared=None)
    tolerance = _EXACT if exact else _COARSE
    gaps: dict[int, float] = {}

    def compare(layer: int, hidden_BLD: Tensor) -> None:
        for row, (first, count) in enumerate(zip(shared.owner, shared.length, strict=True)):
            one, other = hidden_BLD[first, :count].float(), hidden_BLD[row, :count].float()
            if count:
                gap = float((one - other).norm() / one.norm().clamp_min(1e-12))
                gaps[layer] = max(gap, gaps.get(layer, 0.0))

    with torch.no_grad(), block_io(mm, compare):
        apart = token_nll(alone)
    with torch.enable_grad():  # some kernels run only where gradients flow
        together = token_nll(batch)
    if layer := next((layer for layer in sorted(gaps) if gaps[layer] > tolerance), None):
        raise _not_shareable(
            f"What leaves block {layer - 1} for a picture depends on the question behind it: states of one picture "
            f"with two questions differ by {gaps[layer]:.2g} of their norm."
        )
    differs = float((together - apart).abs().max() / apart.abs().max().clamp_min(1e-6))
    if differs > tolerance:
        raise _not_shareable(f"The loss of a token differs by {differs:.2g} of the largest one.")
    log_decision(
        "data.share_images",
        "proved on a batch of this run",
        f"{sum(shared.length)} of {sum(shared.length) + len(batch.real)} tokens are shared; "
        f"losses of tokens differ by {differs:.1g} of the largest",
    )


def _not_shareable(why: str) -> UserError:
    return UserError("Rows of this model cannot share pictures.", why, "Set data.share_images false.")
