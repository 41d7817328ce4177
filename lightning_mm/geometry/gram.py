"""One centred float32 Gram matrix per layer, from which every other measure is derived.

Data flow: pooled hidden states (L, N, D) -> ``Bank`` -> ``similarity``, ``neighbours``, ``dimension``, ``spectrum``.
Centring comes before any product: one dimension with a large mean (rogue dimensions are common) otherwise eats the
digits that tell neighbours apart.

Shapes: L layers, N samples, D features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_mm.geometry.threads import one_thread

_CONSTANT = 1e-6
"""A layer whose spread is below this share of its size is constant: what is left is rounding."""


@contextmanager
def exact_products() -> Iterator[None]:
    """Full float32 products, without autocast or TF32; the caller's settings are back afterwards."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


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

    @cached_property
    def gram(self) -> Tensor:
        """(L, N, N) inner products of the centred rows."""
        with exact_products():
            return self.centred @ self.centred.mT

    @cached_property
    def squared_distances(self) -> Tensor:
        """(L, N, N) squared Euclidean distances, zero on the diagonal, never negative."""
        with exact_products():
            norms_LN = self.gram.diagonal(dim1=1, dim2=2)
            squared = (norms_LN[:, :, None] + norms_LN[:, None] - 2 * self.gram).clamp_min_(0)
            squared.diagonal(dim1=1, dim2=2).zero_()
            return squared

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
