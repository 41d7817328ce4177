"""Overlap of k-nearest-neighbor sets: of two representations of the same samples, or of one with class labels.

Overlap falls as N grows and rises with k (Koepke et al.): compare at equal N and k only. Intervals are of a jackknife
that removes samples from all neighborhoods. The spread of the terms over sqrt(N) is 1.1 to 2.5 times too small, since
the terms share samples; the jackknife's is 1.0 to 1.7 times too wide (Efron and Stein 1981).

Data flow: two ``Neighbors`` of the same samples (or one, and labels) -> one Estimate per layer, or a matrix of all
layer pairs.

Shapes: L layers, N samples, K neighbors, P permutations, B leave-out sets (the first leaves none out), C classes.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.peak import with_left_out
from lightning_mm.geometry.resampling import (
    half_width,
    jackknife_interval,
    leave_out_masks,
    nontrivial_groups,
    permutation_problem,
    permutations,
    without_null,
)

_DRAWS = 50
"""Random pairings of the null band: its half width is accurate to a tenth."""

OverlapScore = Literal["overlap", "jaccard"]


def overlap(
    a: Neighbors,
    b: Neighbors,
    k: int = 10,
    groups: Tensor | None = None,
    score: OverlapScore = "overlap",
    seed: int = 0,
) -> list[Estimate]:
    """Mutual k-nearest-neighbor overlap layer by layer: the mean of |N_a(i) & N_b(i)| / k.

    Neighborhood overlap of Doimo et al. 2020, mutual kNN of Huh et al. 2024 without its clamp. The null is exactly
    k/(N-1); where several samples share a picture it is drawn by re-pairing whole pictures.

    Args:
        a: L layers; best with 2k neighbors or more, for the interval.
        b: As many layers of the same samples.
        k: Number of neighbors.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
        score: 'overlap', or 'jaccard' for |N_a & N_b| / |N_a | N_b| of each sample.
        seed: Seed of the random pairings.

    Example:
        >>> from lightning_mm.geometry.representations import Representations
        >>> near = Neighbors.of(Representations.of(torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(0))))
        >>> [(each.value, round(each.null, 3)) for each in overlap(near, near, k=10)]
        [(1.0, 0.256)]
    """
    assert a.indices.shape[:2] == b.indices.shape[:2], "two representations of the same samples, layer by layer"
    n, groups, device = a.indices.shape[1], nontrivial_groups(groups), a.indices.device
    kept_BN = leave_out_masks(a.distances[0], groups).T.bool()
    order_PN = permutations(n, _DRAWS, seed, groups).to(device)
    exact = None if groups is not None else chance_overlap(a.candidates, k, score)

    def measure(layer: int) -> Estimate:
        if problem := a.problem(layer, k) or b.problem(layer, k):
            return Estimate.undefined_because(problem, n)
        near_a, near_b = (side.indices[layer, :, : 2 * k].long() for side in (a, b))
        values_B = _agreements(near_a, near_b, kept_BN, k, score)
        low, high = jackknife_interval(values_B, 0, 1)
        member_NN = _membership(near_b[:, :k])
        drawn_P = _score(member_NN[order_PN[:, :, None], order_PN[:, near_a[:, :k]]].sum(2), k, score).mean(1)
        notes = (*a.notes(layer, k), *b.notes(layer, k))
        found = Estimate.of(
            float(values_B[0]), n, low=float(low), high=float(high), k=k, notes=notes, **null_band(drawn_P, exact)
        )
        return with_left_out(found, values_B[1:])

    return without_null([measure(layer) for layer in range(len(a.problems))], permutation_problem(groups))


def overlap_gain(
    a: Neighbors, b: Neighbors, reference: tuple[Neighbors, Neighbors], k: int = 10, groups: Tensor | None = None
) -> list[Estimate]:
    """How much more two representations overlap, layer by layer, than a reference pair; the null is 0.

    Both overlaps share their sampling error, so that the jackknife interval of the difference is narrower than either
    interval.

    Args:
        a: L layers with 2k neighbors or more.
        b: As many layers of the same samples.
        reference: The reference pair: two neighbor sets of one layer each, of the same samples.
        k: Number of neighbors.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.

    Example:
        >>> from lightning_mm.geometry.representations import Representations
        >>> near = Neighbors.of(Representations.of(torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(0))))
        >>> overlap_gain(near, near, (near, near), k=5)[0].value
        0.0
    """
    n, kept_BN = a.indices.shape[1], leave_out_masks(a.distances[0], nontrivial_groups(groups)).T.bool()
    assert reference[0].indices.shape[1] == n, "the reference pair has the same samples"
    missing = reference[0].problem(0, k) or reference[1].problem(0, k)
    near_c, near_d = (side.indices[0, :, : 2 * k].long() for side in reference)
    reference_B = None if missing else _agreements(near_c, near_d, kept_BN, k, "overlap")

    def measure(layer: int) -> Estimate:
        if reference_B is None or (a.problem(layer, k) or b.problem(layer, k)):
            return Estimate.undefined_because(missing or a.problem(layer, k) or b.problem(layer, k), n)
        near_a, near_b = (side.indices[layer, :, : 2 * k].long() for side in (a, b))
        gain_B = _agreements(near_a, near_b, kept_BN, k, "overlap") - reference_B
        low, high = jackknife_interval(gain_B, -1, 1)
        return with_left_out(
            Estimate.of(float(gain_B[0]), n, low=float(low), high=float(high), null=0.0, k=k), gain_B[1:]
        )

    return [measure(layer) for layer in range(len(a.problems))]


def overlap_matrix(a: Neighbors, b: Neighbors, k: int = 10) -> Tensor:
    """(La, Lb) overlap of every layer of ``a`` with every layer of ``b``; NaN where it is undefined."""
    near_NLK = a.indices[:, :, :k].transpose(0, 1).long()
    shared = [
        _membership(near_NK[:, :k].long()).gather(1, near_NLK.flatten(1)).view_as(near_NLK).sum((0, 2))
        for near_NK in b.indices
    ]
    matrix_AB = torch.stack(shared, 1).float() / (k * len(near_NLK))
    matrix_AB[[bool(a.problem(layer, k)) for layer in range(len(a.problems))]] = math.nan
    matrix_AB[:, [bool(b.problem(layer, k)) for layer in range(len(b.problems))]] = math.nan
    return matrix_AB


def label_overlap(
    neighbors: Neighbors,
    labels: Tensor,
    k: int = 10,
    groups: Tensor | None = None,
    balanced: bool = False,
    seed: int = 0,
) -> list[Estimate]:
    """Share of the k nearest that carry the sample's own label (Doimo et al. 2020), layer by layer.

    The null follows from the class frequencies: sum_c n_c (n_c - 1) / (N (N - 1)) where all may be neighbors.

    Args:
        neighbors: L layers; best with 2k neighbors or more, for the interval.
        labels: (N,) int classes.
        k: Number of neighbors.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
        balanced: Weight all classes equally, whatever their number of samples (DADApy's weighted).
        seed: Seed of the permuted labels.
    """
    n, device = len(labels), neighbors.indices.device
    class_N = torch.unique(labels.to(device), return_inverse=True)[1]
    if n == 0 or int(class_N.max()) == 0:
        return [
            Estimate.undefined_because(p or "one class: all samples carry the same label", n)
            for p in neighbors.problems
        ]
    groups, kept_BN = nontrivial_groups(groups), leave_out_masks(neighbors.distances[0], groups).T.bool()
    classes_PN = class_N[permutations(n, _DRAWS, seed, groups).to(device)]
    null = float(neighbors.same_class_probability(class_N) @ _weights(class_N, kept_BN[0], balanced))
    exact = None if groups is not None else null

    def measure(layer: int) -> Estimate:
        if problem := neighbors.problem(layer, k):
            return Estimate.undefined_because(problem, n)
        near_NK = neighbors.indices[layer, :, : 2 * k].long()
        values_B = torch.stack([_purity(near_NK, class_N, kept_N, k, balanced) for kept_N in kept_BN])
        low, high = jackknife_interval(values_B, 0, 1)
        drawn_P = torch.stack([_purity(near_NK[:, :k], drawn_N, kept_BN[0], k, balanced) for drawn_N in classes_PN])
        notes = neighbors.notes(layer, k)
        found = Estimate.of(
            float(values_B[0]), n, low=float(low), high=float(high), k=k, notes=notes, **null_band(drawn_P, exact)
        )
        return with_left_out(found, values_B[1:])

    return without_null([measure(layer) for layer in range(len(neighbors.problems))], permutation_problem(groups))


def chance_overlap(candidates: Tensor, k: int, score: OverlapScore = "overlap") -> float:
    """Exact expected overlap over random pairings, where the number of shared neighbors is hypergeometric.

    Args:
        candidates: (N,) number of samples that the neighbors of each sample are chosen from.
        k: Number of neighbors.
        score: 'overlap' or 'jaccard', as in ``overlap``.
    """
    if score == "overlap":
        return float((k / candidates.double()).mean())
    total_N1, count_K = candidates.double()[:, None], torch.arange(k + 1, device=candidates.device).double()
    size = count_K[-1]
    log_ways_NK = _log_choose(size, count_K) + _log_choose(total_N1 - size, size - count_K)
    chance_NK = (log_ways_NK - _log_choose(total_N1, size)).exp()
    return float((chance_NK * _score(count_K, k, score)).sum(1).mean())


def null_band(drawn: Tensor, exact: float | None) -> dict[str, float]:
    """The null fields of an Estimate: the mean of the drawn values, and the band that holds another one in 95 %.

    The half width is t(P-1) times the standard deviation, times sqrt(1 + 1/P) where the mean is drawn too, since P
    draws tell neither exactly (prediction interval of a normal law; Hahn and Meeker 1991, section 4.7).

    Args:
        drawn: (P,) values under the null; NaN are left out.
        exact: The exact mean; None where it is not known.

    Example:
        >>> band = null_band(torch.arange(-5.0, 6.0), None)  # t(10) = 2.228, times sqrt(11) and sqrt(12/11)
        >>> round(band["null_high"], 1)
        7.7
    """
    drawn = drawn[~drawn.isnan()]
    null = float(drawn.mean()) if exact is None else exact
    error = half_width(drawn.std(), len(drawn) - 1) if len(drawn) > 1 else math.nan
    half = float(error) * (math.sqrt(1 + 1 / len(drawn)) if exact is None and len(drawn) else 1.0)
    return {"null": null, "null_low": null - half, "null_high": null + half}


def _membership(near_NK: Tensor, used_NK: Tensor | bool = True) -> Tensor:
    """(N, N) bool: whether the second sample is among the neighbors of the first."""
    n = len(near_NK)
    return torch.zeros(n, n, dtype=torch.bool, device=near_NK.device).scatter_(1, near_NK, used_NK)


def _first_kept(near_NK: Tensor, kept_N: Tensor, k: int) -> Tensor:
    """(N, K) bool: the k nearest of the samples that are kept."""
    kept_NK = kept_N[near_NK]
    return kept_NK & (kept_NK.cumsum(1) <= k)


def _agreements(near_a: Tensor, near_b: Tensor, kept_BN: Tensor, k: int, score: OverlapScore) -> Tensor:
    """(B,) mean score over the samples that each leave-out set keeps."""
    return torch.stack([_agreement(near_a, near_b, kept_N, k, score) for kept_N in kept_BN])


def _agreement(near_a: Tensor, near_b: Tensor, kept_N: Tensor, k: int, score: OverlapScore) -> Tensor:
    """Mean score over the samples that are kept."""
    used_a, used_b = (_first_kept(near, kept_N, k) for near in (near_a, near_b))
    shared_N = (_membership(near_b, used_b).gather(1, near_a) & used_a).sum(1)
    return _score(shared_N[kept_N], k, score).mean()


def _purity(near_NK: Tensor, class_N: Tensor, kept_N: Tensor, k: int, balanced: bool) -> Tensor:
    """Weighted mean share of neighbors with the sample's own class, over the samples that are kept."""
    same_NK = (class_N[near_NK] == class_N[:, None]) & _first_kept(near_NK, kept_N, k)
    return (same_NK.sum(1).double() / k) @ _weights(class_N, kept_N, balanced)


def _weights(class_N: Tensor, kept_N: Tensor, balanced: bool) -> Tensor:
    """(N,) weights with sum 1: equal per sample, or per class if ``balanced``; 0 for samples that are left out."""
    kept_N = kept_N.double()
    size_C = torch.zeros(int(class_N.max()) + 1, dtype=torch.float64, device=class_N.device).index_add_(
        0, class_N, kept_N
    )
    weight_N = kept_N / size_C[class_N].clamp_min(1) if balanced else kept_N
    return weight_N / weight_N.sum()


def _score(shared: Tensor, k: int, score: OverlapScore) -> Tensor:
    shared = shared.double()
    return shared / (2 * k - shared) if score == "jaccard" else shared / k


def _log_choose(total: Tensor, count: Tensor) -> Tensor:
    """ln of the binomial coefficient; -inf where count exceeds total."""
    ways = torch.lgamma(total + 1) - torch.lgamma(count + 1) - torch.lgamma((total - count).clamp_min(0) + 1)
    return ways.masked_fill(count > total, -math.inf)
