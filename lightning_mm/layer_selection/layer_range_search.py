"""From scores of each block to the contiguous range worth training, with an interval and a price for what it costs.

Data flow: criteria (a score per block, and the same on resampled pictures) -> one combined score -> window -> interval.
Nothing here knows a model.

Shapes: L decoder blocks, R resamples.

What a training step costs under a layer range, in multiply-adds of the decoder relative to full tuning.

Data flow: a contiguous range of blocks -> share of full tuning's step. Per block: forward 2, gradient of its input 2,
gradient of its weights 2; nothing is differentiated below the lowest block that trains.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def relative_cost(first: int, last: int, num_layers: int, connector_trains: bool = False) -> float:
    """Decoder cost of a step that trains blocks first to last, both included; 1.0 is full tuning.

    Args:
        first: Lowest block that trains.
        last: Highest block that trains.
        num_layers: Blocks of the decoder.
        connector_trains: Whether gradients must reach the connector too.

    Example:
        >>> round(relative_cost(6, 16, 32), 3), round(relative_cost(6, 16, 32, connector_trains=True), 3)
        (0.719, 0.781)
    """
    crossed = num_layers if connector_trains else num_layers - first
    return (2 * num_layers + 2 * crossed + 2 * (last - first + 1)) / (6 * num_layers)


@dataclass(frozen=True, eq=False)
class Criterion:
    """One reason to train some blocks rather than others.

    Args:
        name: As shown.
        scores: (L,) higher is a better reason; NaN where undefined.
        resampled: (R, L) the same on resampled pictures or batches.
        family: What it speaks of; families have equal say, whatever number of criteria they hold.
    """

    name: str
    scores: Tensor
    resampled: Tensor
    family: str


@dataclass(frozen=True)
class Window:
    """Blocks first to last, both included, with the 95 % range of each end over resamples."""

    first: int
    last: int
    first_range: tuple[int, int]
    last_range: tuple[int, int]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.last + 1))


def reliability(criterion: Criterion) -> float:
    """Share of a profile's variance that is the same on other pictures: 0 for noise, 1 for a fixed shape.

    Zero too where no half of the pictures has enough rows to say.
    """
    between = float(_variance(criterion.scores))
    noise = float(_variance(criterion.resampled.T).nanmean())
    return max(0.0, 1 - noise / between) if between > 0 and math.isfinite(noise) else 0.0


def combine(criteria: Sequence[Criterion], weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """One score per block: the mean of standardised criteria, each counting as much as it is reliable.

    Args:
        criteria: At least one.
        weights: Say of each family; 1 where it is not named.

    Returns:
        (L,) scores and (R, L) resampled ones, medians of three neighbouring blocks; zero where nothing is reliable.
    """
    families = [criterion.family for criterion in criteria]
    say = [
        weights.get(c.family, 1.0) * reliability(c) / families.count(c.family) if families else 0.0 for c in criteria
    ]
    total = sum(say) or 1.0
    resamples = min(len(c.resampled) for c in criteria)
    score = sum(w / total * standardised(c.scores) for w, c in zip(say, criteria, strict=True))
    drawn = sum(w / total * standardised(c.resampled[:resamples]) for w, c in zip(say, criteria, strict=True))
    assert isinstance(score, Tensor)
    assert isinstance(drawn, Tensor)
    return smooth(score), smooth(drawn)


def best_window(score: Tensor, price: float, budget: int | None = None, margin: int = 0) -> tuple[int, int] | None:
    """The range that holds most of the positive score for its compute.

    Maximises (sum of the scores inside) / (sum of all positive scores) - price * (cost of a step, of full tuning's). A
    mean inside the range, as one might write it, is largest for a single block and picks that.

    Args:
        score: (L,) with mean about zero.
        price: How much of the evidence the compute of a full step is worth.
        budget: Exactly so many blocks, if given.
        margin: So many blocks at either end cannot be chosen.

    Returns:
        First and last block; None where no block that may be chosen scores above zero.

    Example:
        >>> best_window(torch.tensor([-1.0, -1.0, 2.0, 2.0, -1.0, -1.0]), price=0.25)
        (2, 3)
    """
    n = len(score)
    allowed = range(margin, n - margin)
    positive = float(score[margin : n - margin].clamp_min(0).sum()) if len(allowed) else 0.0
    if positive <= 0:
        return None
    held = torch.cat([torch.zeros(1, dtype=score.dtype), score.cumsum(0)])
    best, chosen = -math.inf, None
    for first in allowed:
        for last in range(first, allowed.stop) if budget is None else (first + budget - 1,):
            if last >= allowed.stop:
                continue
            gain = float(held[last + 1] - held[first]) / positive - price * relative_cost(first, last, n)
            if gain > best + 1e-12:
                best, chosen = gain, (first, last)
    return chosen


def window(score: Tensor, resampled: Tensor, price: float, budget: int | None, margin: int) -> Window | None:
    """``best_window`` with how far its ends move over the resamples."""
    chosen = best_window(score, price, budget, margin)
    if chosen is None:
        return None
    drawn = [found for row in resampled if (found := best_window(row, price, budget, margin))] or [chosen]
    firsts, lasts = (torch.tensor([ends[i] for ends in drawn], dtype=torch.float64) for i in (0, 1))
    return Window(*chosen, _range(firsts), _range(lasts))


def standardised(scores: Tensor) -> Tensor:
    """Mean 0 and variance 1 over blocks; undefined blocks count as average, a flat profile as no opinion."""
    mean = scores.nanmean(-1, keepdim=True)
    spread = _variance(scores)[..., None].sqrt()
    z = (scores - mean) / torch.where(spread > 1e-12 * mean.abs().clamp_min(1e-30), spread, torch.inf)
    return z.nan_to_num(0.0)


def smooth(scores: Tensor) -> Tensor:
    """Median of each block and its two neighbours: single outliers go, the edges of a range stay where they are."""
    padded = torch.cat([scores[..., :1], scores, scores[..., -1:]], -1)
    return padded.unfold(-1, 3, 1).median(-1).values


def _variance(scores: Tensor) -> Tensor:
    return (scores - scores.nanmean(-1, keepdim=True)).square().nanmean(-1)


def _range(ends: Tensor) -> tuple[int, int]:
    low, high = torch.quantile(ends, torch.tensor([0.025, 0.975], dtype=ends.dtype)).tolist()
    return math.floor(low), math.ceil(high)
