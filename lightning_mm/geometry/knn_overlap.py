"""How far two readings of the same samples agree about who is next to whom, or one reading with labels.

Data flow: two ``Neighbours`` of the same samples (or one, and labels) -> one Estimate per layer, or a matrix of all
layer pairs. Agreement falls as N grows and rises with k (Koepke et al.): compare at equal N and k only. Intervals are
those of a jackknife that takes samples out of all neighbourhoods: the spread of the terms over sqrt(N) is 1.1 to 2.5
times too small, since the terms share samples; the jackknife's is 1.0 to 1.7 times too wide (Efron and Stein 1981).

Shapes: L layers, N samples, K neighbours, P permutations, B sets of samples that stay (the first is everyone).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.hsic import kept_sets
from lightning_mm.geometry.neighbors import Neighbours
from lightning_mm.geometry.resampling import dependent, jackknife_interval, permutations, too_fixed, withheld

_DRAWS = 50
"""Random pairings behind the band of chance: its half width is known to a tenth."""

Score = Literal["overlap", "jaccard"]


def overlap(
    a: Neighbours, b: Neighbours, k: int = 10, groups: Tensor | None = None, score: Score = "overlap", seed: int = 0
) -> list[Estimate]:
    """Mutual k-nearest-neighbour overlap layer by layer: the mean of |N_a(i) & N_b(i)| / k.

    Neighbourhood overlap of Doimo et al. (2020), mutual kNN of Huh et al. (2024) without its clamp. Chance is exactly
    k/(N-1); where several samples share a picture it is what re-pairing whole pictures gives.

    Args:
        a: L layers; best with 2k neighbours or more, for the interval.
        b: As many layers of the same samples.
        k: Neighbours.
        groups: (N,) int ids of samples that depend on one another (the picture of each sample); None: none do.
        score: 'overlap', or 'jaccard' for |N_a & N_b| / |N_a | N_b| of each sample.
        seed: Of the pairings that the band of chance is drawn from.

    Example:
        >>> from lightning_mm.geometry.representations import Bank
        >>> near = Neighbours.of(Bank.of(torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(0))))
        >>> [(each.value, round(each.null, 3)) for each in overlap(near, near, k=10)]
        [(1.0, 0.256)]
    """
    assert a.indices.shape[:2] == b.indices.shape[:2], "two banks of the same samples, layer by layer"
    n, groups, device = a.indices.shape[1], dependent(groups), a.indices.device
    kept_BN = kept_sets(a.distances[0], groups).T.bool()
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
        return Estimate.of(
            float(values_B[0]), n, low=float(low), high=float(high), k=k, notes=notes, **band(drawn_P, exact)
        )

    return withheld([measure(layer) for layer in range(len(a.problems))], too_fixed(groups))


def overlap_gain(
    a: Neighbours, b: Neighbours, rival: tuple[Neighbours, Neighbours], k: int = 10, groups: Tensor | None = None
) -> list[Estimate]:
    """How much more two readings overlap, layer by layer, than a rival pair does on the same samples; chance is 0.

    The two overlaps rise and fall together with the samples drawn, so that the jackknife of their difference is
    narrower than either interval.

    Args:
        a: L layers with 2k neighbours or more.
        b: As many layers of the same samples.
        rival: Two readings of one layer each.
        k: Neighbours.
        groups: (N,) int ids of samples that depend on one another.

    Example:
        >>> from lightning_mm.geometry.representations import Bank
        >>> near = Neighbours.of(Bank.of(torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(0))))
        >>> overlap_gain(near, near, (near, near), k=5)[0].value
        0.0
    """
    n, kept_BN = a.indices.shape[1], kept_sets(a.distances[0], dependent(groups)).T.bool()
    assert rival[0].indices.shape[1] == n, "a rival on the same samples"
    missing = rival[0].problem(0, k) or rival[1].problem(0, k)
    near_c, near_d = (side.indices[0, :, : 2 * k].long() for side in rival)
    rival_B = None if missing else _agreements(near_c, near_d, kept_BN, k, "overlap")

    def measure(layer: int) -> Estimate:
        if rival_B is None or (a.problem(layer, k) or b.problem(layer, k)):
            return Estimate.undefined_because(missing or a.problem(layer, k) or b.problem(layer, k), n)
        near_a, near_b = (side.indices[layer, :, : 2 * k].long() for side in (a, b))
        gain_B = _agreements(near_a, near_b, kept_BN, k, "overlap") - rival_B
        low, high = jackknife_interval(gain_B, -1, 1)
        return Estimate.of(float(gain_B[0]), n, low=float(low), high=float(high), null=0.0, k=k)

    return [measure(layer) for layer in range(len(a.problems))]


def overlap_matrix(a: Neighbours, b: Neighbours, k: int = 10) -> Tensor:
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
    neighbours: Neighbours,
    labels: Tensor,
    k: int = 10,
    groups: Tensor | None = None,
    balanced: bool = False,
    seed: int = 0,
) -> list[Estimate]:
    """Share of the k nearest that carry the sample's own label (Doimo et al. 2020), layer by layer.

    Chance is what the class frequencies give, sum_c n_c (n_c - 1) / (N (N - 1)) where all may be neighbours.

    Args:
        neighbours: L layers; best with 2k neighbours or more, for the interval.
        labels: (N,) int classes.
        k: Neighbours.
        groups: (N,) int ids of samples that depend on one another.
        balanced: Every class weighs the same, however many samples it has (DADApy's weighted).
        seed: Of the re-labellings that the band of chance is drawn from.
    """
    n, device = len(labels), neighbours.indices.device
    class_N = torch.unique(labels.to(device), return_inverse=True)[1]
    if n == 0 or int(class_N.max()) == 0:
        return [
            Estimate.undefined_because(p or "one class: all samples carry the same label", n)
            for p in neighbours.problems
        ]
    groups, kept_BN = dependent(groups), kept_sets(neighbours.distances[0], groups).T.bool()
    classes_PN = class_N[permutations(n, _DRAWS, seed, groups).to(device)]
    null = float(neighbours.chance_of(class_N) @ _weights(class_N, kept_BN[0], balanced))
    exact = None if groups is not None else null

    def measure(layer: int) -> Estimate:
        if problem := neighbours.problem(layer, k):
            return Estimate.undefined_because(problem, n)
        near_NK = neighbours.indices[layer, :, : 2 * k].long()
        values_B = torch.stack([_purity(near_NK, class_N, kept_N, k, balanced) for kept_N in kept_BN])
        low, high = jackknife_interval(values_B, 0, 1)
        drawn_P = torch.stack([_purity(near_NK[:, :k], drawn_N, kept_BN[0], k, balanced) for drawn_N in classes_PN])
        notes = neighbours.notes(layer, k)
        return Estimate.of(
            float(values_B[0]), n, low=float(low), high=float(high), k=k, notes=notes, **band(drawn_P, exact)
        )

    return withheld([measure(layer) for layer in range(len(neighbours.problems))], too_fixed(groups))


def chance_overlap(candidates: Tensor, k: int, score: Score = "overlap") -> float:
    """Exact expectation over random pairings, in which the shared neighbours are hypergeometric.

    Args:
        candidates: (N,) of how many samples each chooses its neighbours.
        k: Neighbours.
        score: As in ``overlap``.
    """
    if score == "overlap":
        return float((k / candidates.double()).mean())
    total_N1, count_K = candidates.double()[:, None], torch.arange(k + 1, device=candidates.device).double()
    size = count_K[-1]
    log_ways_NK = _log_choose(size, count_K) + _log_choose(total_N1 - size, size - count_K)
    chance_NK = (log_ways_NK - _log_choose(total_N1, size)).exp()
    return float((chance_NK * _score(count_K, k, score)).sum(1).mean())


def band(drawn: Tensor, exact: float | None) -> dict[str, float]:
    """The null fields of an Estimate from chance values (P,) without NaN; their mean unless the exact one is known."""
    drawn = drawn[~drawn.isnan()]
    null = float(drawn.mean()) if exact is None else exact
    error = float(drawn.std()) if len(drawn) > 1 else math.nan
    return {"null": null, "null_low": null - 1.96 * error, "null_high": null + 1.96 * error}


def _membership(near_NK: Tensor, used_NK: Tensor | bool = True) -> Tensor:
    """(N, N) bool: whether the second sample is among the neighbours of the first."""
    n = len(near_NK)
    return torch.zeros(n, n, dtype=torch.bool, device=near_NK.device).scatter_(1, near_NK, used_NK)


def _first_kept(near_NK: Tensor, kept_N: Tensor, k: int) -> Tensor:
    """(N, K) bool: the k nearest of those that stay."""
    kept_NK = kept_N[near_NK]
    return kept_NK & (kept_NK.cumsum(1) <= k)


def _agreements(near_a: Tensor, near_b: Tensor, kept_BN: Tensor, k: int, score: Score) -> Tensor:
    """(B,) mean score among those of each set."""
    return torch.stack([_agreement(near_a, near_b, kept_N, k, score) for kept_N in kept_BN])


def _agreement(near_a: Tensor, near_b: Tensor, kept_N: Tensor, k: int, score: Score) -> Tensor:
    """Mean score among the samples that stay."""
    used_a, used_b = (_first_kept(near, kept_N, k) for near in (near_a, near_b))
    shared_N = (_membership(near_b, used_b).gather(1, near_a) & used_a).sum(1)
    return _score(shared_N[kept_N], k, score).mean()


def _purity(near_NK: Tensor, class_N: Tensor, kept_N: Tensor, k: int, balanced: bool) -> Tensor:
    """Weighted mean share of neighbours with the sample's own class, among the samples that stay."""
    same_NK = (class_N[near_NK] == class_N[:, None]) & _first_kept(near_NK, kept_N, k)
    return (same_NK.sum(1).double() / k) @ _weights(class_N, kept_N, balanced)


def _weights(class_N: Tensor, kept_N: Tensor, balanced: bool) -> Tensor:
    """(N,) with sum 1: equal, or the same for every class; 0 for samples that are left out."""
    kept_N = kept_N.double()
    size_C = torch.zeros(int(class_N.max()) + 1, dtype=torch.float64, device=class_N.device).index_add_(
        0, class_N, kept_N
    )
    weight_N = kept_N / size_C[class_N].clamp_min(1) if balanced else kept_N
    return weight_N / weight_N.sum()


def _score(shared: Tensor, k: int, score: Score) -> Tensor:
    shared = shared.double()
    return shared / (2 * k - shared) if score == "jaccard" else shared / k


def _log_choose(total: Tensor, count: Tensor) -> Tensor:
    """ln of the binomial coefficient; -inf where more are chosen than there are."""
    ways = torch.lgamma(total + 1) - torch.lgamma(count + 1) - torch.lgamma((total - count).clamp_min(0) + 1)
    return ways.masked_fill(count > total, -math.inf)
