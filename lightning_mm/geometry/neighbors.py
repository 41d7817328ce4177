"""Nearest neighbors of every sample in each layer.

Neighbors at equal distance are taken in the order of the samples, equally in all representations, which looks like
agreement where there is none: where that order chose more than a tenth of the neighbors, no measure is defined.

Data flow: ``Representations`` -> ``Neighbors`` (computed once) -> ``knn_overlap``, ``information_imbalance``,
``intrinsic_dimension``.

Shapes: L layers, N samples, K neighbors.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_mm.geometry.representations import Representations

_CHOSEN_BY_INDEX = 0.1
"""Largest share of neighbors that may be chosen by the order of the samples because of ties."""


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The nearest samples of every sample, itself left out, nearest first, ties in the order of the samples.

    Args:
        indices: (L, N, K) int32.
        distances: (L, N, K) Euclidean; exactly zero where samples coincide.
        beyond: (L, N) distance of the neighbor after the last; infinite where there is none.
        candidates: (N,) number of samples that the neighbors of each sample were chosen from.
        groups: (N,) int ids; samples of a group are not neighbors of one another. None: all may be.
        width: D, the number of features.
        problems: Per layer, why no measure is defined there; empty where all are.
    """

    indices: Tensor
    distances: Tensor
    beyond: Tensor
    candidates: Tensor
    groups: Tensor | None
    width: int
    problems: tuple[str, ...]

    @classmethod
    def of(cls, reps: Representations, k_max: int = 64, groups: Tensor | None = None) -> "Neighbors":
        """Find the nearest neighbors.

        Args:
            reps: The representations.
            k_max: Number of neighbors; fewer where there are fewer candidates.
            groups: (N,) int ids; samples of a group (same picture) are not neighbors of one another. None: all may be.

        Example:
            >>> Neighbors.of(Representations.of(torch.tensor([[[0.0], [1.0], [3.0]]])), k_max=2).indices.tolist()
            [[[1, 2], [0, 2], [1, 0]]]
        """
        n = reps.num_samples
        barred_NN = torch.eye(n, dtype=torch.bool, device=reps.centered.device)
        if groups is not None:
            groups = groups.to(barred_NN.device)
            barred_NN = groups[:, None] == groups
        candidates_N = (~barred_NN).sum(1)
        width = max(0, min(k_max, int(candidates_N.min())) if n else 0)
        found = [
            _undefined_neighbors(reps, width)
            if problem
            else _nearest(reps.squared_distances(layer).sqrt().masked_fill_(barred_NN, math.inf), width)
            for layer, problem in enumerate(reps.problems)
        ]
        indices, distances, beyond = (torch.stack(parts) for parts in zip(*found, strict=True))
        return cls(indices, distances, beyond, candidates_N, groups, reps.centered.shape[2], reps.problems)

    @cached_property
    def duplicated(self) -> Tensor:
        """(L, N) bool: samples that coincide with an earlier one."""
        earlier = self.indices < torch.arange(self.indices.shape[1], device=self.indices.device)[:, None]
        return ((self.distances == 0) & earlier).any(2)

    def num_tie_broken(self, k: int) -> Tensor:
        """(L, N) number of the first k neighbors that tie with the next one, so that sample order chose them."""
        last_LN = self.distances[..., k - 1]
        after_LN = self.distances[..., k] if k < self.distances.shape[2] else self.beyond
        tied_LN = (self.distances[..., :k] == last_LN[..., None]).sum(2)
        return torch.where(last_LN == after_LN, tied_LN, 0)

    def same_class_probability(self, classes: Tensor) -> Tensor:
        """(N,) probability that a random candidate of each sample has the sample's own class.

        Args:
            classes: (N,) int classes.
        """
        same_NN = classes[:, None] == classes
        if self.groups is None:
            return (same_NN.sum(1).double() - 1) / self.candidates
        return (same_NN & (self.groups[:, None] != self.groups)).sum(1).double() / self.candidates

    def problem(self, layer: int, k: int) -> str:
        """Why no measure over k neighbors is defined in this layer; empty where all are."""
        if self.problems[layer]:
            return self.problems[layer]
        if not 1 <= k <= self.indices.shape[2]:
            return f"too few: {k} neighbours asked for, {self.indices.shape[2]} known"
        share = float(self.num_tie_broken(k)[layer].double().mean()) / k
        if share > _CHOSEN_BY_INDEX:
            return f"ties: {share:.0%} of the {k} nearest are chosen by index, not by distance"
        return ""

    def notes(self, layer: int, k: int) -> tuple[str, ...]:
        """Caveats of a measure over k neighbors: duplicates and ties."""
        copies, ties = int(self.duplicated[layer].sum()), int((self.num_tie_broken(k)[layer] > 0).sum())
        return (
            *([f"{copies} samples coincide with an earlier one"] if copies else []),
            *([f"neighbour {k} of {ties} samples ties with the next; the smaller index is taken"] if ties else []),
        )


def _nearest(distances_NN: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (N, k), distances (N, k) and the next distance (N,); ties in the order of the samples."""
    k_next = min(k + 1, len(distances_NN))
    distances_NK, indices_NK = distances_NN.topk(k_next, largest=False)
    tied_N = (distances_NK.diff(dim=1) == 0).any(1)
    if tied_N.any():  # topk leaves the order of ties open
        ordered = distances_NN[tied_N].sort(stable=True)
        indices_NK[tied_N] = ordered.indices[:, :k_next]
    beyond_N = distances_NK[:, k] if k_next > k else distances_NN.new_full((len(distances_NN),), math.inf)
    return indices_NK[:, :k].int(), distances_NK[:, :k], beyond_N


def _undefined_neighbors(reps: Representations, k: int) -> tuple[Tensor, Tensor, Tensor]:
    n, like = reps.num_samples, reps.centered
    indices_NK = torch.zeros(n, k, dtype=torch.int32, device=like.device)
    return indices_NK, like.new_full((n, k), math.nan), like.new_full((n,), math.nan)
