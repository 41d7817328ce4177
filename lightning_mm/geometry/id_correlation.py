"""Intrinsic dimension correlation (I_dCor): how many dimensions two representations have in common.

If one says something about the other, both together fill fewer dimensions than the sum of each alone (Basile et al.
2025, arXiv:2406.15812, equation 3; used by Palacios et al. 2026, arXiv:2606.03871).

Data flow: two ``Representations`` of the same samples -> features of variance 1 -> distances of each and, as their
squares add, of both side by side -> TwoNN of all three -> one Estimate per layer.

Shapes: L layers, N samples, D features, P random pairings, B blocks that are left out.
"""

import math

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.intrinsic_dimension import DEPENDENCE, MIN_SAMPLES, TwoNN
from lightning_mm.geometry.knn_overlap import null_band
from lightning_mm.geometry.peak import with_left_out
from lightning_mm.geometry.representations import Representations, exact_distances, pair_problems
from lightning_mm.geometry.resampling import (
    group_left_out,
    half_width,
    jackknife_error,
    permutation_problem,
    permutations,
    without_null,
)

_DRAWS = 50
"""Random pairings of the null; each is a sum of two N x N matrices and a search for two neighbors."""


def id_correlation(
    a: Representations, b: Representations, groups: Tensor | None = None, seed: int = 0
) -> list[Estimate]:
    """(d_a + d_b - d_ab) / max(d_a, d_b), layer by layer, with d the dimension by TwoNN and d_ab that of both together.

    1 where one representation determines the other and has as many dimensions, 0 where they are unrelated, had they
    enough samples: dimensions above about 8 are read too low, that of both together most, so that chance is above 0.
    The null, drawn by pairing at random, has the same bias. Features have variance 1, as in the authors' code.

    Args:
        a: L layers of N samples.
        b: As many layers of the same samples; the features may differ.
        groups: (N,) int ids, equal for samples that share a picture; None: all are independent.
        seed: Seed of the random pairings.

    Example:
        >>> x = torch.randn(1, 400, 3, generator=torch.Generator().manual_seed(0))
        >>> round(id_correlation(Representations.of(x), Representations.of(5 * x + 1))[0].value, 6)
        1.0
    """
    n = a.num_samples
    order_PN = permutations(n, _DRAWS, seed, groups).to(a.centered.device)
    found = [
        Estimate.undefined_because(problem, n)
        if problem
        else _correlation(_squared(a, layer), _squared(b, layer), groups, order_PN)
        for layer, problem in enumerate(pair_problems(a, b))
    ]
    return without_null(found, permutation_problem(groups))


def _correlation(a_NN: Tensor, b_NN: Tensor, groups: Tensor | None, order_PN: Tensor) -> Estimate:
    n, estimator = len(a_NN), TwoNN()
    ratios_3N = torch.stack([_log_ratios(squared_NN) for squared_NN in (a_NN, b_NN, a_NN + b_NN)])
    count = int((~ratios_3N.isnan()).sum(1).min())
    if count < MIN_SAMPLES:
        return Estimate.undefined_because(f"too few: {count} distinct samples", n)

    def shared(kept: Tensor) -> Tensor:
        return _share(*estimator(ratios_3N[:, kept.to(ratios_3N.device)]))

    value = float(shared(torch.arange(n)))
    left_out_B = group_left_out(shared, n, groups)
    half = DEPENDENCE * float(half_width(jackknife_error(left_out_B), len(left_out_B) - 1))
    joint_PN = torch.stack([_log_ratios(a_NN + b_NN[order_N][:, order_N]) for order_N in order_PN])
    alone_a, alone_b, _ = estimator(ratios_3N)
    drawn_P = _share(alone_a, alone_b, estimator(joint_PN))
    one = Estimate.of(value, count, low=value - half, high=value + half, k=estimator.n2, **null_band(drawn_P, None))
    return with_left_out(one, value + DEPENDENCE * (left_out_B - value))


def _share(first: Tensor, second: Tensor, joint: Tensor) -> Tensor:
    return (first + second - joint) / torch.maximum(first, second)


def _squared(reps: Representations, layer: int) -> Tensor:
    """(N, N) float64 squared distances of the features at variance 1; features without variance count nothing."""
    x_ND = reps.centered[layer].double()
    return exact_distances(x_ND / (x_ND.std(0) + 1e-9)).clamp_min(0)


def _log_ratios(squared_NN: Tensor) -> Tensor:
    """(N,) ln of the second neighbor's distance over the first's; NaN where the first coincides or both tie."""
    near_N2 = squared_NN.clone().fill_diagonal_(math.inf).topk(2, largest=False).values
    ratio_N = (near_N2[:, 1] / near_N2[:, 0]).log() / 2
    return ratio_N.masked_fill((near_N2[:, 0] == 0) | (ratio_N == 0), math.nan)
