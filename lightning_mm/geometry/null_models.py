"""Null distribution of the match of two symmetric matrices under random pairings of the samples, without drawing them.

Mean and variance over all N! pairings have closed forms (Mantel 1967; Kazi-Aoual et al. 1995); the skewness, which is
large when a few directions dominate, shapes the band. Pairings are drawn only where samples share a picture.

Data flow: two Gram or distance matrices -> ``MantelTerms`` -> ``permutation_band`` -> null and band of CKA and RSA.

Shapes: N samples, P pairings.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.hsic import u_center
from lightning_mm.geometry.resampling import permutations, t_quantile

_SKEW_SAMPLES = 512
"""Samples that the skewness is computed from: it depends on the spectrum, and the band depends little on it."""

MAX_SKEW = math.sqrt(8)
"""Skewness of chi-square with one degree of freedom: both matrices have one direction."""

_DRAWS = 30
"""Random pairings where samples share a picture."""

_MANY = 1_000_000
"""Degrees of freedom at which Student's t is normal."""


@dataclass(frozen=True, eq=False)
class MantelTerms:
    """A symmetric matrix split into the two terms that a re-pairing of samples permutes independently.

    The matched quantity is (<pairs, pairs'> + <samples, samples'>) / (norm norm') + a constant.

    Args:
        pairs: (N, N) U-centered.
        samples: (N,) contribution of a sample to all its pairs, with sum zero; None where there is none.
        norm: This matrix's factor in the denominator of the match.
    """

    pairs: Tensor
    samples: Tensor | None = None
    norm: float = 1.0

    @classmethod
    def of_gram(cls, gram_NN: Tensor) -> "MantelTerms":
        """Terms of a doubly centered Gram matrix, for biased CKA; the constant is tr K tr L / ((N-1) ||K|| ||L||)."""
        n, own_N = len(gram_NN), gram_NN.diagonal()
        return cls(u_center(gram_NN), (own_N - own_N.mean()) * math.sqrt(n / (n - 2)), float(gram_NN.norm()))

    @classmethod
    def of_distances(cls, distances_NN: Tensor) -> "MantelTerms":
        """Terms of a matrix whose off-diagonal entries have mean zero, for their correlation; the constant is 0."""
        rows_N = distances_NN.sum(1) * math.sqrt(2 / (len(distances_NN) - 2))
        return cls(u_center(distances_NN), rows_N - rows_N.mean(), float(distances_NN.norm()))


def permutation_band(
    a: MantelTerms, b: MantelTerms, groups: Tensor | None = None, constant: float = 0.0
) -> dict[str, float]:
    """Null, null_low and null_high of a match: the mean over random pairings and the band that holds 95 % of them.

    The variance is exact; for U-centered matrices alone it is 2/(n(n-3)) whatever the data, as they span n(n-3)/2
    dimensions. The band is that of a Pearson III distribution with this skewness.

    Args:
        a: Terms of one matrix.
        b: Terms of the other.
        groups: (N,) int ids; samples of a group are re-paired together, and draws replace the closed form. None: all
            are independent.
        constant: Term of the match that no pairing changes.
    """
    n, norm = len(a.pairs), a.norm * b.norm
    if groups is not None and len(torch.unique(groups)) < n:
        drawn_P = _drawn(a, b, groups) / norm
        # Some draws tell neither mean nor spread exactly: their band is that of one more draw.
        few = t_quantile(_DRAWS - 1) / t_quantile(_MANY) * math.sqrt(1 + 1 / _DRAWS)
        mean, error = constant + float(drawn_P.mean()), few * float(drawn_P.std())
    else:
        variance = 2 / (n * (n - 3)) * float(a.pairs.square().sum()) * float(b.pairs.square().sum())
        if a.samples is not None and b.samples is not None:
            variance += float(a.samples.square().sum()) * float(b.samples.square().sum()) / (n - 1)
        mean, error = constant, math.sqrt(variance) / norm
    low, high = pearson_quantiles(MAX_SKEW * _concentration(a.pairs) * _concentration(b.pairs))
    return {"null": mean, "null_low": mean + low * error, "null_high": mean + high * error}


def adjust_for_chance(estimate: Estimate) -> Estimate:
    """The estimate rescaled so that chance is 0 and the maximum 1: (value - null) / (1 - null).

    For measures whose chance level depends on the number of directions, neighbors or samples (Groeger et al. 2026).

    Example:
        >>> adjust_for_chance(Estimate(0.75, n=100, null=0.5)).value
        0.5
    """
    null = estimate.null
    if estimate.value is None:
        return estimate
    if null is None or null >= 1:
        return Estimate.undefined_because("no room above chance" if null else "no null to compare with", estimate.n)

    def scaled(value: float | None) -> float | None:
        return None if value is None else (value - null) / (1 - null)

    return replace(
        estimate,
        value=scaled(estimate.value),
        low=scaled(estimate.low),
        high=scaled(estimate.high),
        null=0.0,
        null_low=scaled(estimate.null_low),
        null_high=scaled(estimate.null_high),
    )


def pearson_quantiles(skewness: float) -> tuple[float, float]:
    """2.5 % and 97.5 % quantiles of a Pearson III distribution, mean 0, variance 1 (Wilson and Hilferty 1931).

    Example:
        >>> [round(quantile, 2) for quantile in pearson_quantiles(0.0)]
        [-1.96, 1.96]
    """
    normal = 1.959963985
    skew = max(-MAX_SKEW, min(skewness, MAX_SKEW))
    if abs(skew) < 1e-4:
        return -normal, normal
    low, high = (2 / skew * ((1 + skew * z / 6 - (skew / 6) ** 2) ** 3 - 1) for z in (-normal, normal))
    return low, high


def _drawn(a: MantelTerms, b: MantelTerms, groups: Tensor) -> Tensor:
    matches = []
    for order_N in permutations(len(a.pairs), _DRAWS, groups=groups).to(a.pairs.device):
        moved_NN = b.pairs.index_select(0, order_N).index_select(1, order_N)
        match = a.pairs.flatten() @ moved_NN.flatten()
        if a.samples is not None and b.samples is not None:
            match = match + a.samples @ b.samples[order_N]
        matches.append(match)
    return torch.stack(matches)


def _concentration(pairs_NN: Tensor) -> float:
    """tr K^3 / (tr K^2)^1.5 of a U-centered matrix: 1 for one direction, near 0 for a flat spectrum."""
    step = -(-len(pairs_NN) // _SKEW_SAMPLES)
    part_NN = u_center(pairs_NN[::step, ::step]) if step > 1 else pairs_NN
    part_NN = part_NN / part_NN.norm()
    return float(((part_NN @ part_NN) * part_NN).sum())
