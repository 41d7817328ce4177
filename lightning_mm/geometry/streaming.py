"""Debiased CKA from running sums, for data that do not fit into memory, on any number of ranks.

``StreamingCKA`` is exact and keeps D x D numbers per layer; ``MinibatchCKA`` is an estimate and keeps one number per
layer pair. The mean of CKAs over batches is neither: for batches of 8 the biased one gives 0.94 for unrelated data.

Data flow: batches of hidden states (L, B, D) -> sums, added over batches and over ranks -> CKA.

Shapes: L layers (M of the other side), B samples of a batch, D features (E of the other side), N samples in all,
X = B * B entries of a Gram matrix.
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.hsic import MIN_SAMPLES, u_center
from lightning_mm.geometry.null_models import MAX_SKEW, pearson_quantiles
from lightning_mm.geometry.representations import exact_products

_CONSTANT = 1e-24
"""Self-similarity below this share of the squared mean squared norm is rounding (a spread of 1e-6 of the norm)."""

_ROUNDING = 64 * torch.finfo(torch.float64).eps
"""Self-similarity, a difference of sums, below this share of the sums is rounding."""

_NO_SELF_SIMILARITY = (
    "no self-similarity: the samples coincide, are equally far from one another, or lie too far from the origin"
)


class StreamingCKA(Metric):
    """Debiased linear CKA of two representations in one pass, layer by layer, equal to ``cka.cka``.

    HSIC_1 of linear kernels is made of sums over samples: n(n-3) HSIC_1 = ||X'Y||^2 - n/(n-2) sum_i a_i b_i
    + sum a sum b / ((n-1)(n-2)), with a_i and b_i the squared norms of the centered rows. With rows [x, |x|^2, 1] one
    product sum_i x_i y_i' holds all of them and the terms of the centering.

    Args:
        layers: L.
        features: D of the first side.
        other_features: E of the second side.
        origin: (L, D) any point near the data, the same on every rank; None: zero. It affects rounding only: without
            it a layer whose mean is some thousand times larger than its spread is undefined.
        other_origin: (L, E) such a point for the second side; None: zero.

    Example:
        >>> metric = StreamingCKA(2, 3, 3)
        >>> x = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0))
        >>> metric.update(x[:, :6], -x[:, :6])
        >>> metric.update(x[:, 6:], -x[:, 6:])
        >>> [round(float(value), 6) for value in metric.compute()]
        [1.0, 1.0]
    """

    full_state_update = False
    aa: Tensor
    ab: Tensor
    bb: Tensor
    broken: Tensor

    def __init__(
        self,
        layers: int,
        features: int,
        other_features: int,
        origin: Tensor | None = None,
        other_origin: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.origins = (origin, other_origin)
        a, b = features + 2, other_features + 2
        for name, shape in (("aa", (layers, a, a)), ("ab", (layers, a, b)), ("bb", (layers, b, b))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("broken", torch.zeros(layers, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, a: Tensor, b: Tensor, fresh: Tensor | None = None) -> None:
        """Add the same B samples of both sides; any B.

        Args:
            a: (L, B, D).
            b: (L, B, E).
            fresh: (B,) bool, which samples count; None: all do. Mask the samples that a distributed sampler repeats to
                give all ranks the same length.
        """
        a, b = _fresh(a, fresh), _fresh(b, fresh)
        self.broken += _broken(a, b)
        with exact_products():
            a_LBD, b_LBE = (_augmented(x_LBD, at) for x_LBD, at in zip((a, b), self.origins, strict=True))
            self.aa += a_LBD.mT @ a_LBD
            self.ab += a_LBD.mT @ b_LBE
            self.bb += b_LBE.mT @ b_LBE

    def compute(self) -> Tensor:
        """(L,) debiased CKA (() for one layer, by torchmetrics); NaN where ``estimates`` has no value."""
        return self._values()

    def estimates(self) -> list[Estimate]:
        """Per layer the value over all ranks, N, and the null band of ``cka.cka``; no interval."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            n = int(self.ab[0, -1, -1])
            if n < MIN_SAMPLES:
                return [
                    Estimate.undefined_because(f"too few: {n} samples, at least {MIN_SAMPLES} are needed", n)
                ] * len(self.ab)
            skew_L = MAX_SKEW * _concentration(self.aa) * _concentration(self.bb)
            error_L = torch.full_like(skew_L, math.sqrt(2 / (n * (n - 3))))
            return _with_band(self._values(), error_L, skew_L, n, self.broken)

    def _values(self) -> Tensor:
        own_L, other_L = (_self_term(moments) for moments in (self.aa, self.bb))
        return _hsic_of(self.ab)[0] / (own_L.sqrt() * other_L.sqrt())


class MinibatchCKA(Metric):
    """Debiased linear CKA of all layer pairs from within-batch comparisons only (Nguyen et al. 2020).

    The three HSIC_1 are summed over batches and ranks, and divided at the end. Use batches of 32 or more.

    Args:
        layers: L.
        other_layers: M.

    Example:
        >>> metric = MinibatchCKA(2, 2)
        >>> x = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
        >>> metric.update(x, x)
        >>> [round(float(value), 6) for value in metric.compute().diagonal()]
        [1.0, 1.0]
    """

    full_state_update = False
    shared: Tensor
    own: Tensor
    other: Tensor
    size: Tensor
    other_size: Tensor
    variance: Tensor
    samples: Tensor
    skipped: Tensor
    broken: Tensor

    def __init__(self, layers: int, other_layers: int) -> None:
        super().__init__()
        for name in ("shared", "variance"):
            self.add_state(name, torch.zeros(layers, other_layers, dtype=torch.float64), dist_reduce_fx="sum")
        for name, count in (("own", layers), ("size", layers), ("other", other_layers), ("other_size", other_layers)):
            self.add_state(name, torch.zeros(count, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("samples", "skipped"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("broken", torch.zeros(min(layers, other_layers), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, a: Tensor, b: Tensor, fresh: Tensor | None = None) -> None:
        """Add one batch of both sides; a batch of fewer than 4 samples is counted as skipped.

        Args:
            a: (L, B, D).
            b: (M, B, E).
            fresh: (B,) bool, which samples count, as in ``StreamingCKA.update``.
        """
        a, b = _fresh(a, fresh), _fresh(b, fresh)
        n, paired = a.shape[1], len(self.broken)
        self.broken += _broken(a[:paired], b[:paired])
        if n < MIN_SAMPLES:
            self.skipped += n
            return
        with exact_products():
            a_LX, b_MX = (_flat_gram(x_LBD) for x_LBD in (a, b))
            self.shared += a_LX @ b_MX.T / (n * (n - 3))
            own_L, other_M = (x_LX.square().sum(1) / (n * (n - 3)) for x_LX in (a_LX, b_MX))
        self.own += own_L
        self.other += other_M
        self.variance += own_L.outer(other_M) * (2 / (n * (n - 3)))
        self.size += a.detach().double().square().sum(2).mean(1).square()
        self.other_size += b.detach().double().square().sum(2).mean(1).square()
        self.samples += n

    def compute(self) -> Tensor:
        """(L, M) debiased CKA; NaN where a layer has no self-similarity within batches."""
        return self.shared / self._scale()

    def estimates(self) -> list[Estimate]:
        """Per layer, paired in order: value over all ranks, N, and the null band of random pairings within batches."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            lost = int(self.skipped)
            value_L, error_L = (x.diagonal() / self._scale().diagonal() for x in (self.shared, self.variance.sqrt()))
            found = _with_band(value_L, error_L, torch.zeros_like(error_L), int(self.samples), self.broken)
        note = f"{lost} samples skipped, in batches of fewer than {MIN_SAMPLES}" if lost else ""
        return [estimate.noted(note) for estimate in found]

    def _scale(self) -> Tensor:
        own_L = torch.where(self.own > _CONSTANT * self.size, self.own, math.nan)
        other_M = torch.where(self.other > _CONSTANT * self.other_size, self.other, math.nan)
        return own_L.sqrt().outer(other_M.sqrt())


def _fresh(x_LBD: Tensor, fresh_B: Tensor | None) -> Tensor:
    return x_LBD if fresh_B is None else x_LBD[:, fresh_B.to(x_LBD.device)]


def _broken(a_LBD: Tensor, b_LBE: Tensor) -> Tensor:
    """(L,) number of samples that are not finite on either side."""
    return (~(torch.isfinite(a_LBD).all(2) & torch.isfinite(b_LBE).all(2))).sum(1)


def _with_band(values_L: Tensor, error_L: Tensor, skew_L: Tensor, n: int, broken_L: Tensor) -> list[Estimate]:
    found, rows = [], zip(*(x_L.tolist() for x_L in (values_L, error_L, skew_L, broken_L)), strict=True)
    for value, error, skew, broken in rows:
        if math.isnan(value):
            found.append(
                Estimate.undefined_because(f"not finite: {broken} of {n} samples" if broken else _NO_SELF_SIMILARITY, n)
            )
        else:
            low, high = pearson_quantiles(skew)
            found.append(Estimate.of(value, n, null=0.0, null_low=low * error, null_high=high * error))
    return found


def _augmented(x_LBD: Tensor, origin_LD: Tensor | None) -> Tensor:
    """(L, B, D+2) float64 rows [x, |x|^2, 1]."""
    x_LBD = x_LBD.detach().double()
    if origin_LD is not None:
        x_LBD = x_LBD - origin_LD.to(x_LBD)[:, None]
    return torch.cat([x_LBD, x_LBD.square().sum(2, keepdim=True), torch.ones_like(x_LBD[..., :1])], 2)


def _flat_gram(x_LBD: Tensor) -> Tensor:
    """(L, B * B) float64 U-centered Gram matrices of a batch."""
    x_LBD = x_LBD.detach().double()
    x_LBD = x_LBD - x_LBD.mean(1, keepdim=True)
    return u_center(x_LBD @ x_LBD.mT).flatten(1)


def _hsic_of(moments_LDE: Tensor) -> tuple[Tensor, Tensor]:
    """(L,) HSIC_1 and its biased part ||X'Y||^2 / (n (n-3)), from the sum of [x, |x|^2, 1]' [y, |y|^2, 1]."""
    n_L = moments_LDE[:, -1, -1]
    covariance_LDE, x_norm_LD, y_norm_LE = _centered(moments_LDE)
    shared_L = (x_norm_LD[:, None] @ moments_LDE @ y_norm_LE[:, :, None])[:, 0, 0]
    total_L = (x_norm_LD * moments_LDE[:, :, -1]).sum(1) * (y_norm_LE * moments_LDE[:, -1]).sum(1)
    biased_L = covariance_LDE.square().sum((1, 2))
    whole_L = biased_L - n_L / (n_L - 2) * shared_L + total_L / ((n_L - 1) * (n_L - 2))
    scale_L = n_L * (n_L - 3)
    return torch.where(n_L >= MIN_SAMPLES, whole_L / scale_L, math.nan), biased_L / scale_L


def _centered(moments_LDE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X'Y (L, D, E) of the centered rows, and the vectors that turn [x, |x|^2, 1] into |x - mean|^2, for x and y."""
    n_L1 = moments_LDE[:, -1, -1:]
    means = moments_LDE[:, :-2, -1] / n_L1, moments_LDE[:, -1, :-2] / n_L1
    covariance_LDE = moments_LDE[:, :-2, :-2] - n_L1[:, None] * means[0][:, :, None] * means[1][:, None]
    one_L1 = torch.ones_like(n_L1)
    x_norm, y_norm = (torch.cat([-2 * mean, one_L1, mean.square().sum(1, keepdim=True)], 1) for mean in means)
    return covariance_LDE, x_norm, y_norm


def _self_term(moments_LDD: Tensor) -> Tensor:
    """(L,) HSIC_1(K, K); NaN where it is a rounding error."""
    own_L, biased_L = _hsic_of(moments_LDD)
    n_L = moments_LDD[:, -1, -1]
    size_L = (moments_LDD[:, -2, -1] / n_L).square() / n_L
    return torch.where(own_L > _ROUNDING * torch.maximum(biased_L, size_L), own_L, math.nan)


def _concentration(moments_LDD: Tensor) -> Tensor:
    """(L,) tr C^3 / (tr C^2)^1.5 of the covariance, which scales the skewness of the null; 1 for one direction."""
    covariance_LDD = _centered(moments_LDD)[0]
    covariance_LDD = covariance_LDD / covariance_LDD.norm(dim=(1, 2), keepdim=True)
    return ((covariance_LDD @ covariance_LDD) * covariance_LDD).sum((1, 2))
