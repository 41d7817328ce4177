"""One centered float32 Gram matrix per layer, from which every other measure is derived, a layer at a time.

Centering comes before any product: one dimension with a large mean (rogue dimensions are common) otherwise uses up the
digits that tell neighbors apart.

Data flow: pooled hidden states (L, N, D) -> ``Representations`` -> ``cka``, ``neighbors``, ``intrinsic_dimension``,
``spectrum``. ``exact_products`` and ``one_thread`` are the numerical settings of all geometry and probes.

Shapes: L layers, N samples, D features, M samples of a second matrix, K = min(N, D), R leading directions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_CONSTANT = 1e-6
"""A layer whose spread is below this share of its largest value is constant: the rest is rounding."""

_CLOSE = 1e-4
"""Squared distances below this share of the squared norms have lost their digits in a float32 Gram matrix."""

_SAME = 1e-13
"""Squared distances below this share of the squared norms are rounding: the two float32 samples coincide."""

_CACHE_BYTES = 1 << 30
"""Size of the cached matrices of one ``Representations``; those beyond it are computed again for each measure."""


@contextmanager
def exact_products() -> Iterator[None]:
    """Context of full float32 matmuls, without autocast, TF32 or bfloat16; restores the caller's settings.

    torch has two settings for this and raises when one is read after the other was set. ``fp32_precision`` is what the
    kernels use; the older setting is set too where it can be read, so that the two never conflict.
    """
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch sets it at import, unseen by type checkers
    kernels: tuple[Any, Any] = torch.backends.cuda.matmul, cpu
    before = [each.fp32_precision for each in kernels]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer setting differs, and is the one that counts
        older = "highest"
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Context with one torch thread, for LAPACK; restores the caller's number.

    A decomposition is thousands of short parallel regions, each of which waits for all its threads. Two threads gain
    nothing at these sizes, and where another process holds the second core (a data worker) they took 500 times as long
    for the eigenvalues of a 576 x 576 matrix (7 s, not 14 ms), and 15 times as long for its Cholesky factor.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, eq=False)
class Representations:
    """The representations of the same N samples in L layers, centered.

    Args:
        centered: (L, N, D) float32 (or float64) with mean zero over N.
        mean: (L, D) the mean that was subtracted.
        problems: Per layer, why no measure is defined there; empty where all are.
    """

    centered: Tensor
    mean: Tensor
    problems: tuple[str, ...]

    @classmethod
    def of(cls, features: Tensor) -> "Representations":
        """Center the features, and find layers that are constant, not finite or have too few samples.

        Args:
            features: (L, N, D) of any floating type; half precision becomes float32 before anything else.

        Example:
            >>> Representations.of(torch.ones(1, 4, 3)).problems
            ('constant: all 4 samples coincide',)
        """
        x_LND = features.detach()
        x_LND = x_LND if x_LND.dtype == torch.float64 else x_LND.float()
        mean_LD = x_LND.mean(1)
        centered_LND = x_LND - mean_LD[:, None]
        return cls(centered_LND, mean_LD, tuple(_problem(x, c) for x, c in zip(x_LND, centered_LND, strict=True)))

    @property
    def num_layers(self) -> int:
        return self.centered.shape[0]

    @property
    def num_samples(self) -> int:
        return self.centered.shape[1]

    @property
    def features(self) -> Tensor:
        """(L, N, D) as given, mean included."""
        return self.centered + self.mean[:, None]

    def gram(self, layer: int, rows: slice = slice(None)) -> Tensor:
        """(N, N) inner products of the centered samples of one layer, or some rows of the matrix. Do not write into it.

        Args:
            layer: Index of the layer.
            rows: Which rows; all by default.
        """
        with exact_products():
            if rows != slice(None) and ("gram", layer) not in self._cache:
                return self.centered[layer, rows] @ self.centered[layer].mT
            return self._cached("gram", layer, lambda: self.centered[layer] @ self.centered[layer].mT)[rows]

    def squared_distances(self, layer: int) -> Tensor:
        """(N, N) squared Euclidean distances in one layer, zero on the diagonal and where samples coincide.

        Computed in float64 where float32 would lose the digits of close pairs. Do not write into it.
        """
        if layer not in self._has_close:
            self._has_close[layer] = _has_close_pairs(self.gram(layer))
        if self._has_close[layer]:
            return self._cached("distances", layer, lambda: exact_distances(self.centered[layer]))
        gram_NN = self.gram(layer)
        size_NN = gram_NN.diagonal()[:, None] + gram_NN.diagonal()
        return size_NN.sub_(gram_NN, alpha=2).fill_diagonal_(0)

    @cached_property
    def _has_close(self) -> dict[int, bool]:
        """Whether float32 loses the distances of close pairs, for the layers examined so far."""
        return {}

    @cached_property
    def _cache(self) -> dict[tuple[str, int], Tensor]:
        return {}

    def _cached(self, kind: str, layer: int, make: Callable[[], Tensor]) -> Tensor:
        """The cached matrix; else a new one, cached while there is room."""
        if (matrix_NN := self._cache.get((kind, layer))) is None:
            matrix_NN = make()
            if sum(other.nbytes for other in self._cache.values()) + matrix_NN.nbytes <= _CACHE_BYTES:
                self._cache[kind, layer] = matrix_NN
        return matrix_NN

    @cached_property
    def principal(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Per layer the PCA of the centered features; empty tensors where the layer has a problem.

        Squared singular values (K,), largest first, and the first R left singular vectors (N, R), R = min(K, N / 10):
        more directions than a tenth of the samples cannot be told from chance.
        """
        nothing = self.centered.new_zeros(0), self.centered.new_zeros(self.num_samples, 0)
        with exact_products():
            return tuple(
                nothing if problem else _principal(layer, self.num_samples // 10)
                for layer, problem in zip(self.centered, self.problems, strict=True)
            )


def exact_distances(first_ND: Tensor, second_MD: Tensor | None = None) -> Tensor:
    """(N, M) squared distances of the rows of two matrices by float64 products; zero where rows differ by rounding.

    Args:
        first_ND: Rows; the result has their dtype.
        second_MD: Other rows; None compares the first with themselves.
    """
    with exact_products():
        first, second = (x_ND.double() for x_ND in (first_ND, first_ND if second_MD is None else second_MD))
        size_NM = first.square().sum(1)[:, None] + second.square().sum(1)
        squared_NM = size_NM - 2 * first @ second.T
        return squared_NM.masked_fill_(squared_NM <= _SAME * size_NM, 0).to(first_ND.dtype)


def cross_distances(first_ND: Tensor, second_ND: Tensor) -> Tensor:
    """(N, N) squared distances from the rows of one matrix to those of another, also of close pairs exact."""
    with exact_products():
        size_NN = first_ND.square().sum(1)[:, None] + second_ND.square().sum(1)
        squared_NN = (size_NN - 2 * first_ND @ second_ND.T).clamp_min_(0)
    return exact_distances(first_ND, second_ND) if bool((squared_NN <= _CLOSE * size_NN).any()) else squared_NN


def _has_close_pairs(gram_NN: Tensor) -> bool:
    size_NN = gram_NN.diagonal()[:, None] + gram_NN.diagonal()
    return bool((size_NN.mul_((1 - _CLOSE) / 2) <= gram_NN).fill_diagonal_(False).any())


def pair_problems(a: Representations, b: Representations, least: int = 2) -> list[str]:
    """Per layer, why two all_reps cannot be compared there; empty where they can.

    Args:
        a: L layers of N samples.
        b: As many layers of the same samples; the features may differ.
        least: Number of samples that the measure needs.
    """
    n = a.num_samples
    assert (a.num_layers, n) == (b.num_layers, b.num_samples), "two representations of the same samples, layer by layer"
    few = f"too few: {n} samples, at least {least} are needed" if n < least else ""
    return [first or second or few for first, second in zip(a.problems, b.problems, strict=True)]


@one_thread()
def _principal(centered_ND: Tensor, most: int) -> tuple[Tensor, Tensor]:
    n, d = centered_ND.shape
    small_KK = centered_ND.mT @ centered_ND if d < n else centered_ND @ centered_ND.mT
    values_K, vectors_KK = torch.linalg.eigh(small_KK)
    leading_KR = vectors_KK.flip(1)[:, :most]
    # QR, as scaling by the singular values leaves weak directions askew in float32.
    scores_NR = torch.linalg.qr(centered_ND @ leading_KR)[0] if d < n else leading_KR
    return values_K.flip(0).clamp_min(0), scores_NR


def _problem(x_ND: Tensor, centered_ND: Tensor) -> str:
    n = len(x_ND)
    if n < 2:
        return f"too few: {n} samples"
    if not torch.isfinite(x_ND).all():
        return f"not finite: {int((~torch.isfinite(x_ND)).any(1).sum())} of {n} samples"
    if float(centered_ND.abs().max()) <= _CONSTANT * max(float(x_ND.abs().max()), 1e-30):
        return f"constant: all {n} samples coincide"
    return ""
