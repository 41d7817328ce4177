"""How far apart two modalities are, and whether matching pairs are closer than mismatched ones.

Data flow: two ``Representations`` of the same samples (picture, caption) -> unit rows, mean included -> one Estimate
per layer. ``separability`` separates the modalities by a trained classifier.

Shapes: L layers, N samples, D features, P permutations or swaps.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.isotropy import direction_problem, unit_rows
from lightning_mm.geometry.knn_overlap import null_band
from lightning_mm.geometry.peak import left_out_means, with_left_out
from lightning_mm.geometry.representations import Representations, exact_products, pair_problems
from lightning_mm.geometry.resampling import (
    clustered_mean_interval,
    nontrivial_groups,
    permutation_problem,
    permutations,
    swap_problem,
    without_null,
)

_DRAWS = 50
"""Random pairings or swaps of the null band: its half width is accurate to a tenth."""


def alignment(
    a: Representations, b: Representations, groups: Tensor | None = None, seed: int = 0, alpha: float = 2.0
) -> list[Estimate]:
    """Mean distance, to the power alpha, of matching unit rows (Wang and Isola 2020); the null is that of random pairs.

    Args:
        a: L layers.
        b: As many layers of the same samples and features.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
        seed: Seed of the random pairings.
        alpha: Power; 2 (squared distances) in the paper's loss.
    """

    def measure(first_ND: Tensor, second_ND: Tensor) -> Estimate:
        own_N = (first_ND - second_ND).double().square().sum(1).pow(alpha / 2)
        mean, low, high = (float(end) for end in clustered_mean_interval(own_N[None], groups))
        distance_NN = (2 - 2 * _cosines(first_ND, second_ND)).clamp_min(0).pow(alpha / 2)
        drawn_P = _mismatched(distance_NN, groups, seed).nanmean(1)
        found = Estimate.of(mean, len(first_ND), low=low, high=high, **null_band(drawn_P, None))
        return with_left_out(found, left_out_means(own_N, groups))

    return without_null(_layerwise(a, b, measure), permutation_problem(groups))


def matched_cosine(
    a: Representations, b: Representations, groups: Tensor | None = None, seed: int = 0
) -> list[Estimate]:
    """Mean cosine of matching pairs minus that of mismatched pairs, so that neither anisotropy nor a gap contributes.

    Args:
        a: L layers.
        b: As many layers of the same samples and features.
        groups: (N,) int ids, equal for samples that depend on one another; pairs within a group are not mismatched.
            None: all are independent.
        seed: Seed of the random pairings.
    """
    group_N = torch.arange(a.num_samples) if groups is None else groups
    group_N = group_N.to(a.centered.device)
    different_NN = group_N[:, None] != group_N
    partners_N = different_NN.sum(1)

    def measure(first_ND: Tensor, second_ND: Tensor) -> Estimate:
        n = len(first_ND)
        if int(partners_N.min()) == 0:
            return Estimate.undefined_because("one group: no two samples are different", n)
        cosine_NN = _cosines(first_ND, second_ND)
        others_NN = cosine_NN.where(different_NN, 0)
        mismatched = others_NN.sum() / partners_N.sum()
        around_N = (others_NN.sum(1) + others_NN.sum(0)) / partners_N
        terms_N = cosine_NN.diagonal() - around_N
        mean, low, high = (float(end) for end in clustered_mean_interval(terms_N[None], groups))
        value = float(cosine_NN.diagonal().mean() - mismatched)
        drawn_P = _mismatched(cosine_NN, groups, seed).nanmean(1)
        band = null_band(drawn_P, 0.0)
        found = Estimate.of(value, n, low=value + low - mean, high=value + high - mean, **band)
        return with_left_out(found, left_out_means(terms_N, groups) - mean + value)

    return without_null(_layerwise(a, b, measure), permutation_problem(groups), exact=True)


def token_cosine(a: Representations, b: Representations, groups: Tensor | None = None, seed: int = 0) -> list[Estimate]:
    """Median cosine of matching pairs, as for one image and one text token per sample (Palacios et al. 2026).

    arXiv:2606.03871. The null is the median over random pairs, which is not 0 in a cone. Interval: Woodruff 1952.

    Args:
        a: L layers.
        b: As many layers of the same samples and features.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
        seed: Seed of the random pairings.
    """

    def measure(first_ND: Tensor, second_ND: Tensor) -> Estimate:
        cosine_NN = _cosines(first_ND, second_ND)
        own_N = cosine_NN.diagonal().double()
        median = own_N.quantile(0.5)
        share, low, high = clustered_mean_interval((own_N <= median).double()[None], groups)
        levels = [(0.5 + float(end - share)) if math.isfinite(end) else math.nan for end in (low, high)]
        ends = [float(own_N.quantile(min(max(level, 0.0), 1.0))) if level == level else math.nan for level in levels]
        drawn_P = _mismatched(cosine_NN, groups, seed).nanquantile(0.5, 1)
        return Estimate.of(float(median), len(first_ND), low=ends[0], high=ends[1], **null_band(drawn_P, None))

    return without_null(_layerwise(a, b, measure), permutation_problem(groups))


def modality_gap(
    a: Representations, b: Representations, groups: Tensor | None = None, relative: bool = False, seed: int = 0
) -> list[Estimate]:
    """Distance of the two mean unit rows (Liang et al. 2022); the null swaps the modalities of random samples.

    Args:
        a: L layers.
        b: As many layers of the same samples and features.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
        relative: Divide by the root mean square distance of two samples of one modality.
        seed: Seed of the swaps.
    """
    sign_PN = swap_signs(a.num_samples, _DRAWS, groups, seed).to(a.centered)

    def measure(first_ND: Tensor, second_ND: Tensor) -> Estimate:
        n = len(first_ND)
        apart_ND = first_ND - second_ND
        scale = _within(first_ND, second_ND) if relative else 1.0
        if not scale > 0:
            return Estimate.undefined_because("no spread: the samples of a modality point in one direction", n)
        with exact_products():
            toward_N = apart_ND @ torch.nn.functional.normalize(apart_ND.mean(0), dim=0)
            drawn_P = (sign_PN @ apart_ND / n).norm(dim=1)
        mean, low, high = (float(end) / scale for end in clustered_mean_interval(toward_N[None], groups))
        found = Estimate.of(mean, n, low=max(low, 0.0), high=high, **null_band(drawn_P / scale, None))
        return with_left_out(found, left_out_means(toward_N / scale, groups))

    return without_null(_layerwise(a, b, measure), swap_problem(groups))


def swap_signs(n: int, draws: int, groups: Tensor | None, seed: int) -> Tensor:
    """(P, N) of 1 and -1: for which samples the two representations are swapped; those of a group are swapped together.

    Args:
        n: Number of samples.
        draws: P.
        groups: (N,) int ids, equal for samples that depend on one another; None: all are independent.
        seed: Seed of the draw.
    """
    group_N = torch.arange(n) if groups is None else torch.unique(groups.cpu(), return_inverse=True)[1]
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(0, 2, (draws, n), generator=generator)[:, group_N] - 1


def _cosines(first_ND: Tensor, second_ND: Tensor) -> Tensor:
    with exact_products():
        return first_ND @ second_ND.T


def _mismatched(matrix_NN: Tensor, groups: Tensor | None, seed: int) -> Tensor:
    """(P, N) entries of randomly re-paired samples; NaN where a sample is paired with its own group."""
    n, device = len(matrix_NN), matrix_NN.device
    order_PN = permutations(n, _DRAWS, seed, nontrivial_groups(groups)).to(device)
    group_N = torch.arange(n, device=device) if groups is None else groups.to(device)
    own_PN = group_N[order_PN] == group_N
    return matrix_NN.double()[torch.arange(n, device=device), order_PN].masked_fill(own_PN, math.nan)


def _within(first_ND: Tensor, second_ND: Tensor) -> float:
    """Root mean square distance of two different unit rows of one modality."""
    n = len(first_ND)
    cosine = sum(float(unit.sum(0).square().sum()) - n for unit in (first_ND, second_ND)) / (2 * n * (n - 1))
    return math.sqrt(max(0.0, 2 - 2 * cosine))


def _layerwise(a: Representations, b: Representations, measure: Callable[[Tensor, Tensor], Estimate]) -> list[Estimate]:
    """The measure of the unit rows of each layer where both representations have directions."""
    n = a.num_samples
    assert a.centered.shape == b.centered.shape, "two representations of the same samples and features, layer by layer"
    estimates = []
    for layer, pair in enumerate(pair_problems(a, b)):
        problem = pair or direction_problem(a, layer) or direction_problem(b, layer)
        estimates.append(
            Estimate.undefined_because(problem, n) if problem else measure(unit_rows(a, layer), unit_rows(b, layer))
        )
    return estimates
