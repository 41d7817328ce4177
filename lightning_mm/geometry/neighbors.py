"""Who is next to whom in each layer.

Data flow: ``Bank`` -> ``Neighbours`` (computed once) -> ``overlap``, ``imbalance``, ``dimension``. Neighbours at equal
distance are taken in the order of the samples, alike in every bank, which looks like agreement where there is none:
where that order chose more than a tenth of the neighbours, nothing is defined.

Shapes: L layers, N samples, K neighbours.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_mm.geometry.representations import Bank

_CHOSEN_BY_INDEX = 0.1
"""The largest share of neighbours that ties may leave to the order of the samples."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest samples of every sample, itself left out, nearest first, ties in the order of the samples.

    Args:
        indices: (L, N, K) int32.
        distances: (L, N, K) Euclidean; exactly zero where samples coincide.
        beyond: (L, N) distance of the neighbour after the last; infinite where there is none.
        candidates: (N,) of how many samples the neighbours of each were chosen.
        groups: (N,) ids whose members were not allowed as neighbours of one another; None where all were.
        width: D, the number of features.
        problems: Per layer, why nothing is defined there; empty where it is sound.
    """

    indices: Tensor
    distances: Tensor
    beyond: Tensor
    candidates: Tensor
    groups: Tensor | None
    width: int
    problems: tuple[str, ...]

    @classmethod
    def of(cls, bank: Bank, k_max: int = 64, groups: Tensor | None = None) -> "Neighbours":
        """Find them.

        Args:
            bank: The representations.
            k_max: How many to keep; fewer where there are fewer candidates.
            groups: (N,) ids of samples that shall not be neighbours of one another (the same picture); None: all may.

        Example:
            >>> Neighbours.of(Bank.of(torch.tensor([[[0.0], [1.0], [3.0]]])), k_max=2).indices.tolist()
            [[[1, 2], [0, 2], [1, 0]]]
        """
        n = bank.num_samples
        barred_NN = torch.eye(n, dtype=torch.bool, device=bank.centred.device)
        if groups is not None:
            groups = groups.to(barred_NN.device)
            barred_NN = groups[:, None] == groups
        candidates_N = (~barred_NN).sum(1)
        width = max(0, min(k_max, int(candidates_N.min())) if n else 0)
        found = [
            _blank(bank, width)
            if problem
            else _nearest(bank.squared_distances(layer).sqrt().masked_fill_(barred_NN, math.inf), width)
            for layer, problem in enumerate(bank.problems)
        ]
        indices, distances, beyond = (torch.stack(parts) for parts in zip(*found, strict=True))
        return cls(indices, distances, beyond, candidates_N, groups, bank.centred.shape[2], bank.problems)

    @cached_property
    def copies(self) -> Tensor:
        """(L, N) bool: samples that coincide with an earlier one."""
        earlier = self.indices < torch.arange(self.indices.shape[1], device=self.indices.device)[:, None]
        return ((self.distances == 0) & earlier).any(2)

    def chosen_by_index(self, k: int) -> Tensor:
        """(L, N) how many of the first k neighbours tie with the one after them, so that index order chose them."""
        last_LN = self.distances[..., k - 1]
        after_LN = self.distances[..., k] if k < self.distances.shape[2] else self.beyond
        tied_LN = (self.distances[..., :k] == last_LN[..., None]).sum(2)
        return torch.where(last_LN == after_LN, tied_LN, 0)

    def chance_of(self, classes: Tensor) -> Tensor:
        """(N,) how probable it is that a sample drawn from the candidates of each has its class (N,)."""
        same_NN = classes[:, None] == classes
        if self.groups is None:
            return (same_NN.sum(1).double() - 1) / self.candidates
        return (same_NN & (self.groups[:, None] != self.groups)).sum(1).double() / self.candidates

    def problem(self, layer: int, k: int) -> str:
        """Why no measure over k neighbours is defined in this layer; empty where one is."""
        if self.problems[layer]:
            return self.problems[layer]
        if not 1 <= k <= self.indices.shape[2]:
            return f"too few: {k} neighbours asked for, {self.indices.shape[2]} known"
        share = float(self.chosen_by_index(k)[layer].double().mean()) / k
        if share > _CHOSEN_BY_INDEX:
            return f"ties: {share:.0%} of the {k} nearest are chosen by index, not by distance"
        return ""

    def notes(self, layer: int, k: int) -> tuple[str, ...]:
        """What a reader of a measure over k neighbours must know."""
        copies, ties = int(self.copies[layer].sum()), int((self.chosen_by_index(k)[layer] > 0).sum())
        return (
            *([f"{copies} samples coincide with an earlier one"] if copies else []),
            *([f"neighbour {k} of {ties} samples ties with the next; the smaller index is taken"] if ties else []),
        )


def _nearest(distances_NN: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (N, k), distances (N, k) and the next distance (N,), ties by index."""
    k_next = min(k + 1, len(distances_NN))
    distances_NK, indices_NK = distances_NN.topk(k_next, largest=False)
    tied_N = (distances_NK.diff(dim=1) == 0).any(1)
    if tied_N.any():  # topk leaves the order of ties open
        ordered = distances_NN[tied_N].sort(stable=True)
        indices_NK[tied_N] = ordered.indices[:, :k_next]
    beyond_N = distances_NK[:, k] if k_next > k else distances_NN.new_full((len(distances_NN),), math.inf)
    return indices_NK[:, :k].int(), distances_NK[:, :k], beyond_N


def _blank(bank: Bank, k: int) -> tuple[Tensor, Tensor, Tensor]:
    n, like = bank.num_samples, bank.centred
    indices_NK = torch.zeros(n, k, dtype=torch.int32, device=like.device)
    return indices_NK, like.new_full((n, k), math.nan), like.new_full((n,), math.nan)
