"""The layer where a profile has its peak, with an interval: measures leave out the same samples in all layers.

The errors of neighboring layers go together, so that the intervals of single layers do not say how sure the place of
the maximum is. The leave-out values of all layers together do.

Data flow: a measure's ``Estimate`` and its leave-out values -> ``ResampledEstimate`` of each layer -> resampled
profiles -> ``peak_range`` -> ``analysis.findings``, which notes it on the peak's row.

Shapes: L layers, B blocks that are left out, R resampled profiles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.resampling import jackknife_blocks

_PROFILES = 1000
"""Resampled profiles."""

_MIN_BLOCKS = 3
"""Fewer blocks say nothing about an error."""


@dataclass(frozen=True)
class ResampledEstimate(Estimate):
    """An estimate with what its interval comes from.

    Args:
        left_out: (B,) values without each block of samples, the same blocks in all layers, about the value; their
            delete-block jackknife gives the standard error.
    """

    left_out: tuple[float, ...] = field(default=(), repr=False, compare=False)


def with_left_out(estimate: Estimate, left_out_B: Tensor) -> Estimate:
    """The estimate with its leave-out values; unchanged where it is undefined.

    Args:
        estimate: Of one layer.
        left_out_B: Values without each block.
    """
    if estimate.undefined:
        return estimate
    own = {each.name: getattr(estimate, each.name) for each in fields(Estimate)}
    return ResampledEstimate(**own, left_out=tuple(left_out_B.tolist()))


def left_out_means(terms_N: Tensor, groups: Tensor | None, factor: float = 1.0) -> Tensor:
    """(B,) float64 means of per-sample terms without each block of ``jackknife_blocks``.

    Args:
        terms_N: Terms whose mean is the value.
        groups: (N,) int ids, equal for samples that depend on one another; None: all are independent.
        factor: On the deviations from the mean of all, where the interval is wider than that of independent terms.
    """
    terms_N, n = terms_N.double().cpu(), len(terms_N)
    without = [(terms_N.sum() - terms_N[block].sum()) / (n - len(block)) for block in jackknife_blocks(n, groups)]
    mean = terms_N.mean()
    return mean + factor * (torch.stack(without) - mean)


def peak_range(estimates: Sequence[Estimate], seek: Literal["min", "max"] = "max") -> tuple[int, int, int] | None:
    """Index of the peak, and first and last index of its 95 % interval.

    A resampled profile is the measured one plus a normal error with the jackknife's covariance over layers, scaled as
    Student's t with B-1 degrees of freedom; the interval holds 95 % of their extremes and the measured one. In
    simulations of 32 layers, peaked, flat or with two peaks, it held the place of the true extreme in 97.5 to 100 %.

    Args:
        estimates: One per layer.
        seek: Which extreme is the peak; of equal ones the first.

    Returns:
        None where a defined layer has no leave-out values, fewer than two layers are defined, or all are alike.

    Example:
        >>> profile = [(0.0, (0.1, -0.1, 0.0)), (5.0, (5.1, 4.9, 5.0)), (0.0, (0.0, 0.1, -0.1))]
        >>> peak_range([ResampledEstimate(value, n=30, left_out=left_out) for value, left_out in profile])
        (1, 1, 1)
    """
    known = [(layer, one) for layer, one in enumerate(estimates) if one.value is not None]
    resampled = [one for _, one in known if isinstance(one, ResampledEstimate)]
    if len(known) < 2 or len(resampled) < len(known) or len({len(one.left_out) for one in resampled}) > 1:
        return None
    sign = 1.0 if seek == "max" else -1.0
    value_L = sign * torch.tensor([one.value for one in resampled], dtype=torch.float64)
    left_out_BL = sign * torch.tensor([one.left_out for one in resampled], dtype=torch.float64).T
    if len(left_out_BL) < _MIN_BLOCKS or not torch.isfinite(left_out_BL).all() or len(value_L.unique()) == 1:
        return None
    at_R = (value_L + _errors(left_out_BL)).argmax(1).double()
    best = int(value_L.argmax())
    low, high = (int(torch.quantile(at_R, level, interpolation="nearest")) for level in (0.025, 0.975))
    return known[best][0], known[min(low, best)][0], known[max(high, best)][0]


def _errors(left_out_BL: Tensor) -> Tensor:
    """(R, L) draws with the jackknife's covariance (B-1)/B sum_b d_b d_b', d_b the deviation without block b."""
    count = len(left_out_BL)
    generator = torch.Generator().manual_seed(0)
    normal_RB = torch.randn(_PROFILES, count, generator=generator, dtype=torch.float64)
    square_R1 = torch.randn(_PROFILES, count - 1, generator=generator, dtype=torch.float64).square().mean(1)[:, None]
    deviation_BL = left_out_BL - left_out_BL.mean(0)
    return normal_RB @ deviation_BL * math.sqrt((count - 1) / count) / square_R1.sqrt()
