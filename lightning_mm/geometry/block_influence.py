"""How much each block changes the hidden states that pass through it, and how much training changes each layer.

Data flow: uncentered hidden states of consecutive slices (T, N, D) -> one Estimate per block.

Shapes: T slices (embeddings and the output of each block), N samples, D features.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.resampling import clustered_mean_interval


def block_influence(features: Tensor, groups: Tensor | None = None) -> list[Estimate]:
    """BI = 1 - E cos(h_l, h_{l+1}) (ShortGPT, Men et al. 2024, arXiv:2403.03853): 0 if the block changes no direction.

    Args:
        features: (T, N, D), mean included.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.

    Returns:
        One estimate per slice. The first (no block precedes it) is undefined, and so is a slice where a sample is zero
        or not finite before or after the block.
    """
    return _blocks(features, groups, lambda apart_N, together_N: apart_N.square() / 2)


def angular_distance(features: Tensor, groups: Tensor | None = None) -> list[Estimate]:
    """arccos(cos(h_l, h_{l+1})) / pi, 0 to 1 (Gromov et al. 2024, arXiv:2403.17887); else like ``block_influence``."""
    return _blocks(features, groups, lambda apart_N, together_N: 2 / math.pi * torch.atan2(apart_N, together_N))


def row_cosine(before: Tensor, after: Tensor, groups: Tensor | None = None) -> list[Estimate]:
    """Mean cosine of each sample with itself at another training step; exactly 1 where nothing has changed.

    Args:
        before: (T, N, D), mean included.
        after: (T, N, D) of the same samples.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
    """
    a_TND, b_TND = before.double(), after.double()
    size_TN = ((a_TND * a_TND).sum(-1) * (b_TND * b_TND).sum(-1)).sqrt()
    return _means((a_TND * b_TND).sum(-1) / size_TN, groups)


def _blocks(features: Tensor, groups: Tensor | None, measure: Callable[[Tensor, Tensor], Tensor]) -> list[Estimate]:
    """The mean over samples of a measure of |u - v| and |u + v| of the unit rows that enter and leave each block.

    Small angles are lost in the cosine: that of equal float32 rows is off by 1e-7, and the angle by 5e-4.
    """
    n = features.shape[1]
    estimates, before_ND = (
        [Estimate.undefined_because("embeddings: no block has made them", n)],
        _directions(features[0]),
    )
    for slice_ND in features[1:]:
        after_ND = _directions(slice_ND)
        missing = int((before_ND.isnan() | after_ND.isnan()).any(1).sum())
        if missing:
            estimates.append(
                Estimate.undefined_because(f"no direction: {missing} of {n} samples are zero or not finite", n)
            )
        else:
            values_N = measure((before_ND - after_ND).norm(dim=1), (before_ND + after_ND).norm(dim=1))
            estimates += _means(values_N[None], groups)
        before_ND = after_ND
    return estimates


def _directions(slice_ND: Tensor) -> Tensor:
    """Unit rows (N, D) float64; NaN where there is no direction."""
    exact_ND = slice_ND.double()
    return exact_ND / exact_ND.norm(dim=1, keepdim=True)


def _means(values_TN: Tensor, groups: Tensor | None) -> list[Estimate]:
    mean, low, high = clustered_mean_interval(values_TN, groups)
    n = values_TN.shape[1]
    return [Estimate.of(float(m), n, low=float(a), high=float(b)) for m, a, b in zip(mean, low, high, strict=True)]
