"""The contiguous range of blocks worth training: from scores of every block, with an interval and a weight on compute.

Data flow: criteria (a score per block, and the same on resampled pictures) -> one combined score -> ``LayerRange`` and
the interval of its ends. Nothing here knows a model; the compute of a range is ``planning.flops``'s.

Shapes: L decoder blocks, R resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mm.planning.flops import relative_decoder_cost


@dataclass(frozen=True, eq=False)
class Criterion:
    """One reason to train some blocks rather than others.

    Args:
        name: As printed.
        scores: (L,) higher is a better reason; NaN where undefined.
        resampled: (R, L) the scores on resampled pictures or batches.
        family: 'meaning', 'shape' or 'gradients'; families have equal weight, however many criteria they hold.
    """

    name: str
    scores: Tensor
    resampled: Tensor
    family: str


@dataclass(frozen=True)
class LayerRange:
    """Blocks first to last, both included, with the 95 % interval of each end over resamples."""

    first: int
    last: int
    first_range: tuple[int, int]
    last_range: tuple[int, int]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.last + 1))


def reliability(criterion: Criterion) -> float:
    """Share of a profile's variance over blocks that resampling repeats: 0 for noise, 1 for a fixed shape.

    0 too where no half of the pictures has enough rows.
    """
    between = float(_variance(criterion.scores))
    noise = float(_variance(criterion.resampled.T).nanmean())
    return max(0.0, 1 - noise / between) if between > 0 and math.isfinite(noise) else 0.0


def combine_criteria(criteria: Sequence[Criterion], family_weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """One score per block: the mean of standardized criteria, weighted by their reliability.

    Args:
        criteria: At least one.
        family_weights: Weight of each family; 1 where it is not named.

    Returns:
        (L,) scores and (R, L) resampled ones, smoothed; zero where no criterion is reliable.
    """
    families = [c.family for c in criteria]
    weights = [family_weights.get(c.family, 1.0) * reliability(c) / families.count(c.family) for c in criteria]
    total = sum(weights) or 1.0
    resamples = min(len(c.resampled) for c in criteria)
    score = sum(w / total * standardize(c.scores) for w, c in zip(weights, criteria, strict=True))
    resampled = sum(w / total * standardize(c.resampled[:resamples]) for w, c in zip(weights, criteria, strict=True))
    assert isinstance(score, Tensor)
    assert isinstance(resampled, Tensor)
    return median_smooth(score), median_smooth(resampled)


def best_layer_range(score: Tensor, price: float, budget: int | None = None, margin: int = 0) -> tuple[int, int] | None:
    """The range that holds most of the positive score for its compute.

    Maximizes (sum of the scores inside) / (sum of all positive scores) - price * (FLOPs of a step, relative to full
    tuning). The mean of the scores inside would be largest for a single block.

    Args:
        score: (L,) with mean about zero.
        price: Weight of the compute: the share of the positive score that a full step's FLOPs are worth.
        budget: Exact number of blocks; None for any.
        margin: Number of blocks at either end that cannot be chosen.

    Returns:
        First and last block; None where no block that may be chosen scores above zero.

    Example:
        >>> best_layer_range(torch.tensor([-1.0, -1.0, 2.0, 2.0, -1.0, -1.0]), price=0.25)
        (2, 3)
    """
    n = len(score)
    allowed = range(margin, n - margin)
    positive = float(score[margin : n - margin].clamp_min(0).sum()) if len(allowed) else 0.0
    if positive <= 0:
        return None
    cumulative = torch.cat([torch.zeros(1, dtype=score.dtype), score.cumsum(0)])
    best, chosen = -math.inf, None
    for first in allowed:
        for last in range(first, allowed.stop) if budget is None else (first + budget - 1,):
            if last >= allowed.stop:
                continue
            inside = float(cumulative[last + 1] - cumulative[first]) / positive
            gain = inside - price * relative_decoder_cost(first, last, n)
            if gain > best + 1e-12:
                best, chosen = gain, (first, last)
    return chosen


def search_layer_range(
    score: Tensor, resampled: Tensor, price: float, budget: int | None, margin: int
) -> LayerRange | None:
    """``best_layer_range`` with the interval of its ends.

    Args:
        score: (L,) as for ``best_layer_range``, like the arguments not named here.
        resampled: (R, L) resampled scores.
        price: Weight of the compute.
        budget: Exact number of blocks; None for any.
        margin: Blocks at either end that cannot be chosen.
    """
    chosen = best_layer_range(score, price, budget, margin)
    if chosen is None:
        return None
    ranges = [found for row in resampled if (found := best_layer_range(row, price, budget, margin))] or [chosen]
    firsts, lasts = (torch.tensor([ends[i] for ends in ranges], dtype=torch.float64) for i in (0, 1))
    return LayerRange(*chosen, _interval(firsts), _interval(lasts))


def standardize(scores: Tensor) -> Tensor:
    """(..., L) scores with mean 0 and variance 1 over blocks; 0 for undefined blocks and for a flat profile."""
    mean = scores.nanmean(-1, keepdim=True)
    spread = _variance(scores)[..., None].sqrt()
    z = (scores - mean) / torch.where(spread > 1e-12 * mean.abs().clamp_min(1e-30), spread, torch.inf)
    return z.nan_to_num(0.0)


def median_smooth(scores: Tensor) -> Tensor:
    """(..., L) median of each block and its two neighbors: removes single outliers, keeps the edges of a range."""
    padded = torch.cat([scores[..., :1], scores, scores[..., -1:]], -1)
    return padded.unfold(-1, 3, 1).median(-1).values


def _variance(scores: Tensor) -> Tensor:
    return (scores - scores.nanmean(-1, keepdim=True)).square().nanmean(-1)


def _interval(ends: Tensor) -> tuple[int, int]:
    """95 % interval of (R,) block indices, rounded outwards."""
    low, high = torch.quantile(ends, torch.tensor([0.025, 0.975], dtype=ends.dtype)).tolist()
    return math.floor(low), math.ceil(high)
