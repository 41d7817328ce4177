"""Uncertainty of scores: bootstrap intervals, null bands, peak layers and their judgement over all layers.

Data flow: scores (L,) and their bootstrap draws (L, B) -> Estimates; draws -> the peak layer with its interval; draws
under the null -> p-values, adjusted for the maximum over all layers.

Shapes: L layers, B draws.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.resampling import t_quantile

CONFIDENCE = 0.95


def percentile_interval(draws_LB: Tensor) -> Tensor:
    """(L, 2) 2.5 % and 97.5 % quantiles of the draws; NaN are left out."""
    tail = (1 - CONFIDENCE) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=draws_LB.dtype, device=draws_LB.device)
    return torch.nanquantile(draws_LB, levels, dim=1).T


def bootstrap_estimates(
    score_L: Tensor,
    draws_LB: Tensor,
    *,
    n: int,
    k: int,
    groups: int,
    least: float = 0.0,
    most: float = 1.0,
    null: float | None = None,
) -> list[Estimate]:
    """One Estimate per layer with its bootstrap interval.

    Args:
        score_L: Values.
        draws_LB: Values for resampled groups.
        n: Number of samples.
        k: Number of classes or labels.
        groups: Number of independent groups. A score of 1 or 0 has no bootstrap spread: the other end of its interval
            is that of no error, or only errors, in this many trials (Clopper and Pearson 1934).
        least: Smallest possible value of the score.
        most: Largest possible value of the score.
        null: Chance level; None where it is not known.
    """
    faultless = ((1 - CONFIDENCE) / 2) ** (1 / groups)
    # A draw repeats samples, which raises average precision and calibration error: draws are centered on the value.
    centered_LB = draws_LB + (score_L - draws_LB.nanmean(1))[:, None]
    found = []
    for value, (low, high) in zip(
        score_L.tolist(), percentile_interval(centered_LB).clamp(least, most).tolist(), strict=True
    ):
        if (least, most) == (0, 1) and low == high == value:
            low, high = (faultless, 1.0) if value == 1 else (0.0, 1 - faultless) if value == 0 else (low, high)
        found.append(Estimate.of(value, n, k=k, low=low, high=high, null=null))
    return found


def widened(score_L: Tensor, draws_LB: Tensor, training_L: Tensor, groups: int) -> Tensor:
    """(L, B) draws around the score, with the spread that probes held fixed, and few groups, do not show.

    Draws of G groups have (G - 1) / G of the variance, and a normal quantile for Student's t with G - 1 degrees of
    freedom.

    Args:
        score_L: Values.
        draws_LB: Values for resampled groups, with the probes held fixed.
        training_L: Variance by the draw of the training samples.
        groups: G, number of independent groups.
    """
    centered_LB = draws_LB - draws_LB.nanmean(1, keepdim=True)
    few = t_quantile(groups - 1) / NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(groups / (groups - 1))
    variance_L = centered_LB.square().nanmean(1)
    wider_L = torch.where(variance_L > 0, 1 + training_L / variance_L, 1.0).sqrt()
    return score_L[:, None] + centered_LB * (few * wider_L)[:, None]


def with_null(found: Estimate, null: float, spread: float | None) -> Estimate:
    """The estimate with its chance level, and the band of a normal null with this standard deviation, if it is known.

    The band is clipped to [0, 1].
    """
    if spread is None:
        return replace(found, null=null)
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * spread
    return replace(found, null=null, null_low=max(0.0, null - reach), null_high=min(1.0, null + reach))


def max_t_p_values(found: Sequence[Estimate], null_draws_LB: Tensor) -> list[Estimate]:
    """The estimates with their p-values, adjusted for the maximum over all layers (Westfall and Young 1993, max-T).

    A layer's p-value is the share of draws under the null in which any layer is as many standard deviations above its
    chance level: the best of thirty layers is judged as the best of thirty.

    Args:
        found: One Estimate per layer.
        null_draws_LB: Draws under the null, of the same exchanges of labels in all layers; NaN where undefined.
    """
    null_L = torch.tensor([math.nan if one.null is None else one.null for one in found]).to(null_draws_LB)
    value_L = torch.tensor([math.nan if one.value is None else one.value for one in found]).to(null_draws_LB)
    spread_L = null_draws_LB.std(1)
    # A layer whose score is the same for all labels has nothing to say of them.
    above_L = torch.where(spread_L > 0, (value_L - null_L) / spread_L, 0.0)
    above_LB = torch.where(spread_L[:, None] > 0, (null_draws_LB - null_L[:, None]) / spread_L[:, None], 0.0)
    most_B = above_LB.nan_to_num(nan=-math.inf).amax(0)
    beaten_L = (most_B >= above_L[:, None] - 1e-9).sum(1)
    return [
        one if one.undefined else replace(one, p_adjusted=(beaten + 1) / (len(most_B) + 1))
        for one, beaten in zip(found, beaten_L.tolist(), strict=True)
    ]


def peak(found: Sequence[Estimate], draws_LB: Tensor) -> tuple[int, int, int] | None:
    """Layer of the maximum, and first and last layer of its 95 % bootstrap interval; None without any value.

    Args:
        found: One Estimate per layer; of equal maxima the first is the peak.
        draws_LB: Bootstrap draws of the same groups in all layers.
    """
    defined = [layer for layer, estimate in enumerate(found) if estimate.value is not None]
    if not defined:
        return None
    values = [found[layer].value or 0.0 for layer in defined]
    at_B = draws_LB[defined].nan_to_num(nan=-math.inf).argmax(0).double()
    tail = (1 - CONFIDENCE) / 2
    low, high = (int(torch.quantile(at_B, level, interpolation="nearest")) for level in (tail, 1 - tail))
    best = values.index(max(values))
    return defined[best], min(defined[low], defined[best]), max(defined[high], defined[best])


def plateau(found: Sequence[Estimate]) -> tuple[int, int] | None:
    """First and last of the layers around the maximum whose intervals reach it; None without any value.

    Example:
        >>> plateau([Estimate(value, n=100, high=value + 0.1) for value in (0.5, 0.75, 0.8, 0.6)])
        (1, 2)
    """
    values = [-math.inf if estimate.value is None else estimate.value for estimate in found]
    most = max(values, default=-math.inf)
    if most == -math.inf:
        return None
    reaches = [estimate.high is not None and estimate.high >= most for estimate in found]
    first = last = values.index(most)
    while first > 0 and reaches[first - 1]:
        first -= 1
    while last + 1 < len(found) and reaches[last + 1]:
        last += 1
    return first, last
