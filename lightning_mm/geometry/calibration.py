"""What an estimator of dimension says about Gaussian clouds of known dimension, and the way back.

Data flow: sample count and estimator -> Gaussian clouds -> ``noise_dimension`` (the null) and a curve -> ``invert``.
Estimates fall ever further below the truth as the dimension grows, the more so the fewer the samples; a cloud of the
same size shows by how much. Curves are computed once per process.

Shapes: L clouds, N samples, D features.
"""

from functools import cache
from itertools import pairwise

import torch

from lightning_mm.geometry.gride import RatioEstimator
from lightning_mm.geometry.neighbors import Neighbours
from lightning_mm.geometry.representations import Bank

_DIMENSIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_CPU = torch.device("cpu")
_CLOUDS = 2
"""Clouds whose estimates are averaged at each point of the curve."""


def noise_dimension(n: int, dimension: int, estimator: RatioEstimator, device: torch.device = _CPU) -> float:
    """The estimate for isotropic noise of a known dimension, with two significant digits of ``n`` samples.

    Args:
        n: Samples.
        dimension: D; the estimate grows with it without end, so that no smaller cloud stands for a larger one.
        estimator: What makes it.
        device: Where the cloud's N^2 D products are computed; it is drawn on the CPU, the same everywhere.
    """
    return _gaussian_estimate(_rounded(n), dimension, estimator, 1, device)


@cache
def _gaussian_estimate(n: int, dimension: int, estimator: RatioEstimator, clouds: int, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(dimension)
    cloud = Bank.of(torch.randn(clouds, n, dimension, generator=generator).to(device))
    near = Neighbours.of(cloud, estimator.n2)
    ratios_LN = (near.distances[..., estimator.n2 - 1] / near.distances[..., estimator.n1 - 1]).log()
    return float(estimator(ratios_LN).mean())


@cache
def curve(n: int, estimator: RatioEstimator) -> tuple[tuple[float, float], ...]:
    """(true dimension, estimate) at ``n`` samples, from (0, 0) upwards in both."""
    points = [(0.0, 0.0)]
    for dimension in _DIMENSIONS:
        estimate = _gaussian_estimate(n, dimension, estimator, _CLOUDS, _CPU)
        if estimate > points[-1][1]:
            points.append((float(dimension), estimate))
    return tuple(points)


def invert(value: float, n: int, estimator: RatioEstimator) -> float | None:
    """The dimension of the Gaussian cloud that gets this estimate; None above the curve.

    Args:
        value: An estimate.
        n: Samples that it rests on; the curve is that of two significant digits of it.
        estimator: What made it.
    """
    points = curve(_rounded(n), estimator)
    for (below, low), (above, high) in pairwise(points):
        if value <= high:
            return below + (above - below) * (value - low) / (high - low)
    return None


def _rounded(n: int) -> int:
    digits = 10 ** max(0, len(str(n)) - 2)
    return round(n / digits) * digits
