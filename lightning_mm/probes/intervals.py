"""Uncertainty of scores: bootstrap intervals, null bands, peak layers and multiple testing over layers.

Data flow: scores (L,) and their bootstrap draws (L, B) -> Estimates; draws -> the peak layer with its interval;
p-values of all layers -> false discovery rates.

Shapes: L layers, N samples, M samples of a stratum, A tasks or labels, B draws.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate

CONFIDENCE = 0.95

_ENTRIES = 1 << 24
"""Permuted labels that are scored at once: 64 MB."""


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


def normal_null_band(null: float, spread: float) -> dict[str, float]:
    """The null fields of an Estimate for a normal null with this mean and standard deviation, clipped to [0, 1]."""
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * spread
    return {"null": null, "null_low": max(0.0, null - reach), "null_high": min(1.0, null + reach)}


def p_value(value: float, null: float, spread: float) -> float:
    """Probability of a value as high under a normal null; 1 where its standard deviation is 0."""
    if math.isnan(value) or math.isnan(spread):
        return math.nan
    return 1 - NormalDist(null, spread).cdf(value) if spread > 0 else 1.0


def permuted_auroc(
    scores_LAN: Tensor, truth_AN: Tensor, strata_N: Tensor, groups_N: Tensor, draws: int, seed: int
) -> Tensor:
    """(L, B) mean AUROC over tasks with labels permuted among the groups of each stratum, a group's labels together.

    For {0, 1} predictions the AUROC is the balanced accuracy.

    Args:
        scores_LAN: Higher means positive.
        truth_AN: {0, 1} labels.
        strata_N: Labels are permuted, and pairs are ranked, within a stratum only.
        groups_N: Group ids.
        draws: B.
        seed: Seed of the permutations.
    """
    generator = torch.Generator().manual_seed(seed)
    right_LBA = pairs_A = scores_LAN.new_zeros(())
    at_once = max(1, _ENTRIES // truth_AN.numel())
    for stratum in torch.unique(strata_N):
        rows = torch.where(strata_N == stratum)[0]
        ids_G, group_N = torch.unique(groups_N[rows.to(groups_N.device)].cpu(), return_inverse=True)
        key_BN = torch.rand(draws, len(ids_G), generator=generator)[:, group_N]
        permuted_BN = torch.empty_like(key_BN, dtype=torch.long)
        sorted_N = torch.argsort(group_N, stable=True)
        permuted_BN[:, sorted_N] = torch.argsort(key_BN[:, sorted_N], dim=1, stable=True)
        truth_AM = truth_AN[:, rows][:, sorted_N.to(rows.device)].to(scores_LAN)
        positives_A = truth_AM.sum(1)
        ranks_LAN = mid_ranks(scores_LAN[..., rows])
        parts = [
            torch.einsum("abn,lan->lba", truth_AM[:, part_BN], ranks_LAN)
            for part_BN in permuted_BN.to(rows.device).split(at_once)
        ]
        right_LBA = right_LBA + torch.cat(parts, 1) - positives_A * (positives_A + 1) / 2
        pairs_A = pairs_A + positives_A * (len(rows) - positives_A)
    return (right_LBA / pairs_A).nanmean(2)


def mid_ranks(scores: Tensor) -> Tensor:
    """(..., N) ranks from 1; ties are averaged.

    Example:
        >>> mid_ranks(torch.tensor([0.3, 0.1, 0.3]))
        tensor([2.5000, 1.0000, 2.5000])
    """
    ordered = scores.sort(-1).values.contiguous()
    below = torch.searchsorted(ordered, scores.contiguous())
    return (below + torch.searchsorted(ordered, scores.contiguous(), right=True) + 1).to(scores) / 2


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


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: the false discovery rate at which each test is significant; NaN stays NaN.

    Benjamini and Hochberg 1995.

    Example:
        >>> [round(q, 3) for q in benjamini_hochberg([0.01, 0.04, 0.03, 0.5])]
        [0.04, 0.053, 0.053, 0.5]
    """
    tests = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    rates, least = [math.nan] * len(p_values), 1.0
    for rank in range(len(tests), 0, -1):
        p, index = tests[rank - 1]
        least = min(least, p * len(tests) / rank)
        rates[index] = least
    return rates
