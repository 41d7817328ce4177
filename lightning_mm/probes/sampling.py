"""Which samples are learned from and which are tested on: by hash, so that nothing depends on order, step or chance.

Data flow: labels (N,) or (N, K) and group ids (N,) -> parts of whole groups, control labels, bootstrap weights.
A group holds the samples that must not be told apart by what they share: those of one picture.

Shapes: N samples, K classes or labels, G groups, B draws.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_GROUPS = 10
MIN_GROUPS_PER_CLASS = 5
_ROUNDING = 1e-6
"""A layer whose samples differ by less than this share of their size is constant."""


def hashed(ids_N: Tensor, seed: int) -> Tensor:
    """(N,) float64, a uniform number in [0, 1) for each id: always the same (splitmix64, Steele et al. 2014).

    Example:
        >>> hashed(torch.tensor([7, 8, 7]), 0).mul(100).int().tolist()
        [15, 89, 15]
    """
    start = (seed + 1) * 0x632BE5AB & ((1 << 64) - 1)
    z = ids_N.cpu().long() * -0x61C8864680B583EB + (start - ((start >> 63) << 64))
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        # The shift of a negative number fills with ones: the mask makes zeros of them.
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((z >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def indicators(labels: Tensor) -> Tensor:
    """(N, K) {0, 1} of class ids (N,); labels that are so already stay as they are."""
    return F.one_hot(labels.long()) if labels.ndim == 1 else labels.long()


def dealt(labels: Tensor, groups_N: Tensor, parts: int, seed: int) -> Tensor:
    """(N,) in which of so many parts each sample is: parts of equally many groups, with labels as even as they get.

    Groups are sorted by what labels they hold, rare labels first, then by hash, and dealt out in turn.
    """
    ids_G, group_N = torch.unique(groups_N.cpu(), return_inverse=True)
    holds_NK = indicators(labels.cpu())
    holds_GK = torch.zeros(len(ids_G), holds_NK.shape[1], dtype=torch.long).index_add_(0, group_N, holds_NK)
    rare_first_K = torch.argsort((holds_GK > 0).sum(0), stable=True)
    _, kind_G = torch.unique(holds_GK[:, rare_first_K], dim=0, return_inverse=True)
    by_hash_G = torch.argsort(hashed(ids_G, seed))
    order_G = by_hash_G[torch.argsort(kind_G[by_hash_G], stable=True)]
    part_G = torch.empty(len(ids_G), dtype=torch.long)
    part_G[order_G] = torch.arange(len(ids_G)) % parts
    return part_G[group_N]


def control_labels(labels: Tensor, types_N: Tensor, seed: int) -> Tensor:
    """Labels that mean nothing: one for each type, drawn as often as the true ones occur (Hewitt and Liang 2019)."""
    rows, counts = torch.unique(labels.cpu(), dim=0, return_counts=True)
    heights = counts.cumsum(0).double() / counts.sum()
    drawn_N = torch.searchsorted(heights, hashed(types_N, seed), right=True)
    return rows[drawn_N.clamp_max(len(rows) - 1)]


def group_draws(groups_N: Tensor, draws: int, seed: int) -> Tensor:
    """(B, N) float32, how often each sample occurs when as many groups as there are are drawn with replacement."""
    ids_G, group_N = torch.unique(groups_N.cpu(), return_inverse=True)
    g = len(ids_G)
    chosen_BG = torch.randint(g, (draws, g), generator=torch.Generator().manual_seed(seed))
    times_BG = torch.zeros(draws, g).scatter_add_(1, chosen_BG, torch.ones(draws, g))
    return times_BG[:, group_N]


def num_groups(groups_N: Tensor) -> int:
    """How many different groups there are."""
    return len(torch.unique(groups_N))


def unsound(x_LND: Tensor) -> list[str]:
    """Per layer, why nothing can be read from it; empty where it is sound."""
    faults = []
    for x_ND in x_LND:
        low_D, high_D = x_ND.amin(0), x_ND.amax(0)
        size = float(torch.maximum(low_D.abs(), high_D.abs()).max())
        if not math.isfinite(size):
            faults.append(f"not finite: {int((~torch.isfinite(x_ND)).any(1).sum())} of {len(x_ND)} samples")
        elif float((high_D - low_D).max()) <= _ROUNDING * size:
            faults.append(f"constant: all {len(x_ND)} samples coincide")
        else:
            faults.append("")
    return faults


@dataclass(frozen=True, eq=False)
class Subject:
    """What of the labels can be learned and tested.

    Args:
        rows: (M,) the samples that are kept.
        labels: (M,) class ids from 0 without gaps, or (M, K) {0, 1}.
        note: What was left out, and why; may be empty.
        fault: Why nothing can be learned; empty where something can.
    """

    rows: Tensor
    labels: Tensor
    note: str
    fault: str

    @classmethod
    def of(cls, labels: Tensor, groups_N: Tensor) -> "Subject":
        """Leave out what cannot be in every part: classes that few groups have, labels that few have or few lack."""
        labels, rows_M, note = labels.long(), torch.arange(len(labels)), ""
        alike = bool((labels == labels[:1]).all())
        if num_groups(groups_N) < MIN_GROUPS:
            return cls(rows_M, labels, note, _too_few(groups_N))
        if labels.ndim == 1:
            labels = torch.unique(labels, return_inverse=True)[1]
            kept_K = _groups_with(indicators(labels), groups_N) >= MIN_GROUPS_PER_CLASS
            rows_M = torch.where(kept_K[labels])[0]
            left_out = f"{len(labels) - len(rows_M)} samples, whose {int((~kept_K).sum())} classes are"
            labels, enough = torch.unique(labels[rows_M], return_inverse=True)[1], int(kept_K.sum()) > 1
        else:
            having, lacking = _groups_with(labels, groups_N), _groups_with(1 - labels, groups_N)
            kept_K = torch.minimum(having, lacking) >= MIN_GROUPS_PER_CLASS
            left_out = f"{int((~kept_K).sum())} of {len(kept_K)} labels, which are present or absent"
            labels, enough = labels[:, kept_K], bool(kept_K.any())
        if not kept_K.all():
            note = f"left out: {left_out} in fewer than {MIN_GROUPS_PER_CLASS} groups"
        if enough:
            return cls(rows_M, labels, note, _too_few(groups_N[rows_M]))
        rare = f"too rare: nothing to tell apart is in {MIN_GROUPS_PER_CLASS} groups or more"
        return cls(rows_M, labels, note, "one class: nothing to tell apart" if alike else rare)


def _too_few(groups_N: Tensor) -> str:
    groups = num_groups(groups_N)
    return f"too few: {groups} groups, at least {MIN_GROUPS} are needed" if groups < MIN_GROUPS else ""


def _groups_with(holds_NK: Tensor, groups_N: Tensor) -> Tensor:
    """(K,) how many groups have a sample with each label."""
    ids_G, group_N = torch.unique(groups_N, return_inverse=True)
    return (torch.zeros(len(ids_G), holds_NK.shape[1], dtype=torch.long).index_add_(0, group_N, holds_NK) > 0).sum(0)
