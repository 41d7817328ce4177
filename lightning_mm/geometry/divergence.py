"""Distance of two clouds as distributions: Frechet distance and maximum mean discrepancy (MMD).

The null swaps the two representations of random samples, so that both clouds come from one distribution and what
remains is the bias of the sample size.

Data flow: two ``Representations`` of the same samples (such as picture and caption) -> one Estimate per layer.

Shapes: L layers, N samples, D features, C components, P swaps (the first swaps nothing), B leave-out sets, Q trial
directions of a subspace iteration, M rows.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.isotropy import pairwise_mean_interval
from lightning_mm.geometry.knn_overlap import null_band
from lightning_mm.geometry.modality_gap import swap_signs
from lightning_mm.geometry.peak import with_left_out
from lightning_mm.geometry.representations import (
    Representations,
    cross_distances,
    exact_products,
    one_thread,
    pair_problems,
)
from lightning_mm.geometry.resampling import (
    jackknife_interval,
    leave_out_masks,
    nontrivial_groups,
    swap_problem,
    without_null,
)

_SWAPS = 50
"""Random swaps behind the null of the Frechet distance; each takes two decompositions of C x C."""

_SIGNS = 100
"""Random swaps behind the null of the discrepancy, one product each."""

_ITERATIONS = 4
"""Of subspace iteration; enough for the leading components of a decaying spectrum."""

_OVERSAMPLING = 16
"""Extra directions that make the subspace iteration converge."""

_MIN_SAMPLES = 4
"""The jackknife leaves out up to a third of them."""

_MEDIAN_ROWS = 256
"""Rows of the distance matrices that the median distance is computed from."""

_JITTER = 1e-10
"""Share of the total variance added to a covariance, so that one of lower rank stays positive definite."""


def frechet(
    a: Representations, b: Representations, components: int = 64, groups: Tensor | None = None, seed: int = 0
) -> list[Estimate]:
    """Squared Frechet distance of the Gaussians fitted to two representations, in their joint leading components.

    ||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2)) (Dowson and Landau 1982), in squared
    units of the features. It has a positive bias that grows with C/N; the null has the same bias.

    Args:
        a: L layers.
        b: As many layers of the same samples and features.
        components: Number of joint principal components.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
        seed: Seed of the swaps and of the start of the subspace iteration.
    """
    n, width = a.centered.shape[1:]
    count = min(components, width, 2 * n - 1)
    sign_PN = swap_signs(n, _SWAPS, groups, seed).to(a.centered).double()
    kept_BN = leave_out_masks(a.centered[0].double(), groups).T

    def measure(layer: int) -> Estimate:
        first_ND, second_ND = _placed(a, b, layer)
        basis_DC = _leading(torch.cat([first_ND, second_ND]), count, seed)
        with exact_products(), one_thread():
            first_NC, second_NC = ((x_ND @ basis_DC).double() for x_ND in (first_ND, second_ND))
            values_B = _distance(_moments(first_NC, kept_BN), _moments(second_NC, kept_BN))
            drawn_P = _distance(*_swapped(first_NC, second_NC, sign_PN))
        low, high = jackknife_interval(values_B, 0)
        band = null_band(drawn_P, None)
        found = Estimate.of(float(values_B[0]), n, low=float(low), high=float(high), k=count, **band)
        return with_left_out(found, values_B[1:])

    return without_null(_layerwise(a, b, measure), swap_problem(groups))


def mmd(a: Representations, b: Representations, groups: Tensor | None = None, seed: int = 0) -> list[Estimate]:
    """Unbiased squared maximum mean discrepancy with a Gaussian kernel (Gretton et al. 2012); 0 on average by chance.

    Mean over pairs i != j of k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(b_i, a_j); the bandwidth is the median
    distance over all these pairs. Samples of one group are near one another within a representation and not across two,
    so that chance is above 0: the null is then the mean over swaps of whole groups.

    Args:
        a: L layers.
        b: As many layers of the same samples and features.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
        seed: Seed of the swaps.
    """
    groups = nontrivial_groups(groups)
    sign_PN, exact = swap_signs(a.num_samples, _SIGNS, groups, seed).to(a.centered), 0.0 if groups is None else None

    def measure(layer: int) -> Estimate:
        n = a.num_samples
        within = (a.squared_distances(layer), b.squared_distances(layer))
        apart_NN = cross_distances(*_placed(a, b, layer))
        squared = _median(*within, apart_NN)
        if not squared > 0:
            return Estimate.undefined_because("constant: most samples of both readings coincide", n)
        near_a, near_b, across = (torch.exp(squared_NN / (-2 * squared)) for squared_NN in (*within, apart_NN))
        pairs_NN = (near_a + near_b - across - across.T).fill_diagonal_(0)
        with exact_products():
            drawn_P = ((sign_PN @ pairs_NN) * sign_PN).sum(1) / (n * (n - 1))
        mean, low, high = pairwise_mean_interval(pairs_NN.sum(1) / (n - 1), groups)
        return Estimate.of(mean, n, low=low, high=high, **null_band(drawn_P, exact))

    return without_null(_layerwise(a, b, measure), swap_problem(groups))


def _layerwise(a: Representations, b: Representations, measure: Callable[[int], Estimate]) -> list[Estimate]:
    assert a.centered.shape == b.centered.shape, "two representations of the same samples and features, layer by layer"
    return [
        Estimate.undefined_because(problem, a.num_samples) if problem else measure(layer)
        for layer, problem in enumerate(pair_problems(a, b, _MIN_SAMPLES))
    ]


def _placed(a: Representations, b: Representations, layer: int) -> tuple[Tensor, Tensor]:
    """Both clouds (N, D) relative to the midpoint of their means."""
    shift_D = (a.mean[layer] - b.mean[layer]) / 2
    return a.centered[layer] + shift_D, b.centered[layer] - shift_D


def _median(*distances_NN: Tensor) -> float:
    """Median of the entries in some evenly spaced rows of all matrices."""
    step = -(-len(distances_NN[0]) // _MEDIAN_ROWS)
    return float(torch.cat([matrix_NN[::step].flatten() for matrix_NN in distances_NN]).median())


def _leading(rows_MD: Tensor, count: int, seed: int) -> Tensor:
    """(D, C) orthonormal leading directions of the rows (Halko et al. 2011, algorithm 4.4); all where D <= C."""
    width = rows_MD.shape[1]
    if width <= count:
        return torch.eye(width).to(rows_MD)
    start_DQ = torch.randn(width, min(width, count + _OVERSAMPLING), generator=torch.Generator().manual_seed(seed))
    with exact_products(), one_thread():
        basis_DQ = start_DQ.to(rows_MD)
        for _ in range(_ITERATIONS):
            basis_DQ = torch.linalg.qr(rows_MD.T @ (rows_MD @ basis_DQ)).Q
        scores_MQ = rows_MD @ basis_DQ
        return basis_DQ @ torch.linalg.eigh(scores_MQ.T @ scores_MQ).eigenvectors[:, -count:]


Moments = tuple[Tensor, Tensor]
"""Means (B, C) and covariances (B, C, C)."""


def _moments(cloud_NC: Tensor, weight_BN: Tensor) -> Moments:
    """Means and covariances of the samples with weight 1; the others have weight 0."""
    square_BCC = (weight_BN[:, :, None] * cloud_NC).mT @ cloud_NC
    return _centered_moments(weight_BN @ cloud_NC, square_BCC, weight_BN.sum(1))


def _swapped(first_NC: Tensor, second_NC: Tensor, sign_PN: Tensor) -> tuple[Moments, Moments]:
    """Means and covariances of both clouds with the samples of sign -1 swapped, from m + s h and m - s h."""
    middle_NC, half_NC, count_P = (first_NC + second_NC) / 2, (first_NC - second_NC) / 2, sign_PN.abs().sum(1)
    even_CC, cross_PCC = middle_NC.T @ middle_NC + half_NC.T @ half_NC, middle_NC.T @ (sign_PN[:, :, None] * half_NC)
    odd_PCC, moved_PC = cross_PCC + cross_PCC.mT, sign_PN @ half_NC
    total_C = middle_NC.sum(0)
    plus = _centered_moments(total_C + moved_PC, even_CC + odd_PCC, count_P)
    return plus, _centered_moments(total_C - moved_PC, even_CC - odd_PCC, count_P)


def _centered_moments(sum_BC: Tensor, square_BCC: Tensor, count_B: Tensor) -> Moments:
    mean_BC = sum_BC / count_B[:, None]
    outer_BCC = mean_BC[:, :, None] * sum_BC[:, None]
    return mean_BC, (square_BCC - outer_BCC) / (count_B - 1)[:, None, None]


def _distance(a: Moments, b: Moments) -> Tensor:
    """(B,) squared Frechet distances; NaN where fewer than two different samples are left."""
    (mean_a, covariance_a), (mean_b, covariance_b) = a, b
    size_B = (covariance_a + covariance_b).diagonal(dim1=1, dim2=2).sum(1)
    sound_B = torch.isfinite(size_B) & (size_B > 0)
    eye_CC = torch.eye(mean_a.shape[1]).to(mean_a)
    first_BCC = (covariance_a + _JITTER * size_B[:, None, None] * eye_CC).where(sound_B[:, None, None], eye_CC)
    root_BCC = torch.linalg.cholesky(first_BCC)
    between_BCC = (root_BCC.mT @ covariance_b @ root_BCC).where(sound_B[:, None, None], eye_CC)
    shared_B = torch.linalg.eigvalsh(between_BCC).clamp_min(0).sqrt().sum(1)
    distance_B = (mean_a - mean_b).square().sum(1) + size_B - 2 * shared_B
    return distance_B.where(sound_B, math.nan).clamp_min(0)  # of equal clouds it is rounding, of either sign
