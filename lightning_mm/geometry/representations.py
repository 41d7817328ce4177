"""One centred float32 Gram matrix per layer, from which every other measure is derived, a layer at a time.

Data flow: pooled hidden states (L, N, D) -> ``Bank`` -> ``similarity``, ``neighbours``, ``dimension``, ``spectrum``.
Centring comes before any product: one dimension with a large mean (rogue dimensions are common) otherwise eats the
digits that tell neighbours apart.

Shapes: L layers, N samples, D features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_mm.core.threads import one_thread

_CONSTANT = 1e-6
"""A layer whose spread is below this share of its size is constant: what is left is rounding."""

_CLOSE = 1e-4
"""Squared distances below this share of the squared norms have lost their digits in a float32 Gram matrix."""

_SAME = 1e-13
"""Below this share two float32 samples differ by rounding only: they coincide."""

_HELD_BYTES = 1 << 30
"""Matrices that a bank holds for the measures that follow; what is beyond is made again for each."""


@contextmanager
def exact_products() -> Iterator[None]:
    """Full float32 products, without autocast, TF32 or bfloat16; the caller's settings are back afterwards.

    torch has two ways to set this, and refuses to be read in one after the other was used. ``fp32_precision`` is what
    the kernels go by; the older setting, where it can be read, goes along so that no call finds the two in conflict.
    """
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch sets it at import, unseen by type checkers
    kernels: tuple[Any, Any] = torch.backends.cuda.matmul, cpu
    before = [each.fp32_precision for each in kernels]
    older = _older_precision()
    try:
        if older != "highest":
            torch.set_float32_matmul_precision("highest")
        for each in kernels:
            each.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        if older != "highest":
            torch.set_float32_matmul_precision(older)
        for each, precision in zip(kernels, before, strict=True):
            each.fp32_precision = precision


def _older_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer setting says otherwise, and is what counts
        return "highest"


@dataclass(frozen=True, eq=False)
class Bank:
    """The representations of the same N samples in L layers, centred.

    Args:
        centred: (L, N, D) float32 (or float64) with mean zero over N.
        mean: (L, D) what was subtracted.
        problems: Per layer, why no measure is defined there; empty where it is sound.
    """

    centred: Tensor
    mean: Tensor
    problems: tuple[str, ...]

    @classmethod
    def of(cls, features: Tensor) -> "Bank":
        """Centre and examine.

        Args:
            features: (L, N, D) of any floating type; half precision becomes float32 before anything else.

        Example:
            >>> Bank.of(torch.ones(1, 4, 3)).problems
            ('constant: all 4 samples coincide',)
        """
        x_LND = features.detach()
        x_LND = x_LND if x_LND.dtype == torch.float64 else x_LND.float()
        mean_LD = x_LND.mean(1)
        centred_LND = x_LND - mean_LD[:, None]
        return cls(centred_LND, mean_LD, tuple(_problem(x, c) for x, c in zip(x_LND, centred_LND, strict=True)))

    @property
    def num_layers(self) -> int:
        return self.centred.shape[0]

    @property
    def num_samples(self) -> int:
        return self.centred.shape[1]

    @property
    def features(self) -> Tensor:
        """(L, N, D) as they came, mean included."""
        return self.centred + self.mean[:, None]

    def gram(self, layer: int, rows: slice = slice(None)) -> Tensor:
        """(N, N) inner products of the centred rows of one layer, or some rows of it; not to be written on."""
        with exact_products():
            if rows != slice(None) and ("gram", layer) not in self._held:
                return self.centred[layer, rows] @ self.centred[layer].mT
            return self._hold("gram", layer, lambda: self.centred[layer] @ self.centred[layer].mT)[rows]

    def squared_distances(self, layer: int) -> Tensor:
        """(N, N) squared Euclidean distances in one layer, zero on the diagonal and where samples coincide.

        In float64 first where float32 would lose the close pairs; not to be written on.
        """
        if layer not in self._crowded:
            self._crowded[layer] = _has_close_pairs(self.gram(layer))
        if self._crowded[layer]:
            return self._hold("distances", layer, lambda: exact_distances(self.centred[layer]))
        gram_NN = self.gram(layer)
        size_NN = gram_NN.diagonal()[:, None] + gram_NN.diagonal()
        return size_NN.sub_(gram_NN, alpha=2).fill_diagonal_(0)

    @cached_property
    def _crowded(self) -> dict[int, bool]:
        """Of the layers that were looked at, in which float32 loses the distances of close pairs."""
        return {}

    @cached_property
    def _held(self) -> dict[tuple[str, int], Tensor]:
        return {}

    def _hold(self, kind: str, layer: int, make: Callable[[], Tensor]) -> Tensor:
        """What was made before, or is made and, while there is room, held."""
        if (matrix_NN := self._held.get((kind, layer))) is None:
            matrix_NN = make()
            if sum(other.nbytes for other in self._held.values()) + matrix_NN.nbytes <= _HELD_BYTES:
                self._held[kind, layer] = matrix_NN
        return matrix_NN

    @cached_property
    def principal(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Per layer the spectrum, and the samples along its leading directions; empty where the layer has a problem.

        The squared singular values (K,) of the centred features, largest first, K = min(N, D); and the first R left
        singular vectors (N, R), R = min(K, N / 10): a tenth of the samples is as many directions as can be told from
        chance.
        """
        nothing = self.centred.new_zeros(0), self.centred.new_zeros(self.num_samples, 0)
        with exact_products():
            return tuple(
                nothing if problem else _principal(layer, self.num_samples // 10)
                for layer, problem in zip(self.centred, self.problems, strict=True)
            )

    @cached_property
    def duplicates(self) -> tuple[int, ...]:
        """Per layer, how many samples coincide with an earlier one."""
        return tuple(self.num_samples - len(torch.unique(layer, dim=0)) for layer in self.centred)


def exact_distances(first_ND: Tensor, second_MD: Tensor | None = None) -> Tensor:
    """(N, M) squared distances of the rows of two matrices (of one, if it is alone) by float64 products.

    In the precision of the first; zero where the two differ by no more than rounding.
    """
    with exact_products():
        first, second = (x_ND.double() for x_ND in (first_ND, first_ND if second_MD is None else second_MD))
        size_NM = first.square().sum(1)[:, None] + second.square().sum(1)
        squared_NM = size_NM - 2 * first @ second.T
        return squared_NM.masked_fill_(squared_NM <= _SAME * size_NM, 0).to(first_ND.dtype)


def cross_distances(first_ND: Tensor, second_ND: Tensor) -> Tensor:
    """(N, N) squared distances from the samples of one cloud to those of another, close pairs as exact as far ones."""
    with exact_products():
        size_NN = first_ND.square().sum(1)[:, None] + second_ND.square().sum(1)
        squared_NN = (size_NN - 2 * first_ND @ second_ND.T).clamp_min_(0)
    return exact_distances(first_ND, second_ND) if bool((squared_NN <= _CLOSE * size_NN).any()) else squared_NN


def _has_close_pairs(gram_NN: Tensor) -> bool:
    size_NN = gram_NN.diagonal()[:, None] + gram_NN.diagonal()
    return bool((size_NN.mul_((1 - _CLOSE) / 2) <= gram_NN).fill_diagonal_(False).any())


def pair_problems(a: Bank, b: Bank, least: int = 2) -> list[str]:
    """Per layer, why two banks cannot be compared there; empty where they can.

    Args:
        a: L layers of N samples.
        b: As many layers of the same samples; the features may differ.
        least: Samples that the measure needs.
    """
    n = a.num_samples
    assert (a.num_layers, n) == (b.num_layers, b.num_samples), "two banks of the same samples, layer by layer"
    few = f"too few: {n} samples, at least {least} are needed" if n < least else ""
    return [first or second or few for first, second in zip(a.problems, b.problems, strict=True)]


@one_thread()
def _principal(centred_ND: Tensor, most: int) -> tuple[Tensor, Tensor]:
    n, d = centred_ND.shape
    small_KK = centred_ND.mT @ centred_ND if d < n else centred_ND @ centred_ND.mT
    values_K, vectors_KK = torch.linalg.eigh(small_KK)
    leading_KR = vectors_KK.flip(1)[:, :most]
    # QR, as scaling by the singular values leaves weak directions askew in float32.
    scores_NR = torch.linalg.qr(centred_ND @ leading_KR)[0] if d < n else leading_KR
    return values_K.flip(0).clamp_min(0), scores_NR


def _problem(x_ND: Tensor, centred_ND: Tensor) -> str:
    n = len(x_ND)
    if n < 2:
        return f"too few: {n} samples"
    if not torch.isfinite(x_ND).all():
        return f"not finite: {int((~torch.isfinite(x_ND)).any(1).sum())} of {n} samples"
    if float(centred_ND.abs().max()) <= _CONSTANT * max(float(x_ND.abs().max()), 1e-30):
        return f"constant: all {n} samples coincide"
    return ""
