"""How far apart two clouds are as distributions: Frechet distance and maximum mean discrepancy.

Data flow: two ``Bank``s of the same samples in two readings -> one Estimate per layer. Chance swaps the two readings
of random samples, so that both clouds come from one law and what is left is the bias of so few samples.

Shapes: L layers, N samples, D features, C components, P swaps (the first swaps nothing), B sets of samples that stay.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.core.threads import one_thread
from lightning_mm.geometry.hsic import kept_sets
from lightning_mm.geometry.isotropy import pairs_interval
from lightning_mm.geometry.knn_overlap import band
from lightning_mm.geometry.modality_gap import swap_signs
from lightning_mm.geometry.representations import Bank, cross_distances, exact_products, pair_problems
from lightning_mm.geometry.resampling import jackknife_interval, too_joined, withheld

_SWAPS = 20
"""Random swaps behind the null of the Frechet distance."""

_SIGNS = 100
"""Random swaps behind the null of the discrepancy, one product each."""

_ROUNDS = 4
"""Of subspace iteration: the leading components of a spectrum that decays."""

_SPARE = 16
"""Directions beside those asked for, which make the iteration converge."""

_LEAST = 4
"""Samples below which nothing is measured: a jackknife leaves out a third."""

_MEDIAN_ROWS = 256
"""Rows of distances that the median is taken of."""

_JITTER = 1e-10
"""Share of the mean variance that keeps a covariance of lower rank positive."""


def frechet(a: Bank, b: Bank, components: int = 64, groups: Tensor | None = None, seed: int = 0) -> list[Estimate]:
    """Squared Frechet distance of the Gaussians that fit two readings, in their joint leading components.

    ||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2)) (Dowson and Landau 1982). It is too high by
    something that grows with C/N: the null, which has it too, says by how much. In squared units of the features.

    Args:
        a: L layers.
        b: As many layers of the same samples and features.
        components: Joint principal components that are kept.
        groups: (N,) int ids of samples that depend on one another.
        seed: Of the swaps and of the start of the subspace iteration.
    """
    n, width = a.centred.shape[1:]
    count = min(components, width, 2 * n - 1)
    sign_PN = swap_signs(n, _SWAPS, groups, seed).to(a.centred).double()
    kept_BN = kept_sets(a.centred[0].double(), groups).T

    def measure(layer: int) -> Estimate:
        first_ND, second_ND = _placed(a, b, layer)
        basis_DC = _leading(torch.cat([first_ND, second_ND]), count, seed)
        with exact_products(), one_thread():
            first_NC, second_NC = ((x_ND @ basis_DC).double() for x_ND in (first_ND, second_ND))
            values_B = _distance(_moments(first_NC, kept_BN), _moments(second_NC, kept_BN))
            drawn_P = _distance(*_swapped(first_NC, second_NC, sign_PN))
        low, high = jackknife_interval(values_B, 0)
        return Estimate.of(float(values_B[0]), n, low=float(low), high=float(high), k=count, **band(drawn_P, None))

    return withheld(_layerwise(a, b, measure), too_joined(groups))


def mmd(a: Bank, b: Bank, groups: Tensor | None = None, seed: int = 0) -> list[Estimate]:
    """Unbiased squared maximum mean discrepancy with a Gaussian kernel (Gretton et al. 2012); 0 on average by chance.

    The mean over pairs i != j of k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(b_i, a_j), whose bandwidth is the median
    distance over all these pairs.

    Args:
        a: L layers.
        b: As many layers of the same samples and features.
        groups: (N,) int ids of samples that depend on one another.
        seed: Of the swaps.
    """
    sign_PN = swap_signs(a.num_samples, _SIGNS, groups, seed).to(a.centred)

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
        mean, low, high = pairs_interval(pairs_NN.sum(1) / (n - 1), groups)
        return Estimate.of(mean, n, low=low, high=high, **band(drawn_P, 0.0))

    return withheld(_layerwise(a, b, measure), too_joined(groups), exact=True)


def _layerwise(a: Bank, b: Bank, measure: Callable[[int], Estimate]) -> list[Estimate]:
    assert a.centred.shape == b.centred.shape, "two banks of the same samples and features, layer by layer"
    return [
        Estimate.undefined_because(problem, a.num_samples) if problem else measure(layer)
        for layer, problem in enumerate(pair_problems(a, b, _LEAST))
    ]


def _placed(a: Bank, b: Bank, layer: int) -> tuple[Tensor, Tensor]:
    """Both clouds (N, D) where they lie relative to the middle between their means."""
    shift_D = (a.mean[layer] - b.mean[layer]) / 2
    return a.centred[layer] + shift_D, b.centred[layer] - shift_D


def _median(*distances_NN: Tensor) -> float:
    """Of the entries of some evenly spaced rows of all matrices."""
    step = -(-len(distances_NN[0]) // _MEDIAN_ROWS)
    return float(torch.cat([matrix_NN[::step].flatten() for matrix_NN in distances_NN]).median())


def _leading(rows_MD: Tensor, count: int, seed: int) -> Tensor:
    """(D, C) orthonormal leading directions of the rows (Halko et al. 2011, algorithm 4.4); all where D <= C."""
    width = rows_MD.shape[1]
    if width <= count:
        return torch.eye(width).to(rows_MD)
    start_DQ = torch.randn(width, min(width, count + _SPARE), generator=torch.Generator().manual_seed(seed))
    with exact_products(), one_thread():
        basis_DQ = start_DQ.to(rows_MD)
        for _ in range(_ROUNDS):
            basis_DQ = torch.linalg.qr(rows_MD.T @ (rows_MD @ basis_DQ)).Q
        scores_MQ = rows_MD @ basis_DQ
        return basis_DQ @ torch.linalg.eigh(scores_MQ.T @ scores_MQ).eigenvectors[:, -count:]


Moments = tuple[Tensor, Tensor]
"""Means (B, C) and covariances (B, C, C)."""


def _moments(cloud_NC: Tensor, weight_BN: Tensor) -> Moments:
    """Of the samples that weigh 1; the others weigh 0."""
    square_BCC = (weight_BN[:, :, None] * cloud_NC).mT @ cloud_NC
    return _centred_moments(weight_BN @ cloud_NC, square_BCC, weight_BN.sum(1))


def _swapped(first_NC: Tensor, second_NC: Tensor, sign_PN: Tensor) -> tuple[Moments, Moments]:
    """Of both clouds after the samples with sign -1 have changed places, from m + s h and m - s h."""
    middle_NC, half_NC, count_P = (first_NC + second_NC) / 2, (first_NC - second_NC) / 2, sign_PN.abs().sum(1)
    even_CC, cross_PCC = middle_NC.T @ middle_NC + half_NC.T @ half_NC, middle_NC.T @ (sign_PN[:, :, None] * half_NC)
    odd_PCC, moved_PC = cross_PCC + cross_PCC.mT, sign_PN @ half_NC
    total_C = middle_NC.sum(0)
    plus = _centred_moments(total_C + moved_PC, even_CC + odd_PCC, count_P)
    return plus, _centred_moments(total_C - moved_PC, even_CC - odd_PCC, count_P)


def _centred_moments(sum_BC: Tensor, square_BCC: Tensor, count_B: Tensor) -> Moments:
    mean_BC = sum_BC / count_B[:, None]
    outer_BCC = mean_BC[:, :, None] * sum_BC[:, None]
    return mean_BC, (square_BCC - outer_BCC) / (count_B - 1)[:, None, None]


def _distance(a: Moments, b: Moments) -> Tensor:
    """(B,) squared Frechet distances; NaN where fewer than two samples, or none that differ, are left."""
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
