"""Exchanges of labels that leave a data set as it is if the labels mean nothing: what chance is drawn from.

Labels are exchanged within a picture, and whole pictures exchange their labels within a fold. Samples of one picture
are near one another: where each picture brings one true and one false caption, a probe that confuses them errs on both
or on neither, and chance is narrower than independent samples would have it; where all samples of a picture share a
label, it is wider.

Data flow: labels, groups and folds -> ``exchanged_rows`` -> (B, N) rows whose labels each sample gets -> ``refits``,
``result``.

Shapes: N samples, B draws, M samples of a fold.
"""

import torch
from torch import Tensor


def exchanged_rows(labels_N: Tensor, groups_N: Tensor, fold_N: Tensor, draws: int, seed: int) -> Tensor:
    """(B, N) the sample whose label each sample gets; a permutation of the samples of each fold.

    Within a group, samples of a label stay together and the labels change places, if they are equally many;
    otherwise the samples are permuted singly. Then the groups of a fold are dealt in random order, each group's labels
    together; groups of equal sizes exchange them as wholes.

    Args:
        labels_N: Class ids, equal where all labels of two samples are.
        groups_N: Ids of the groups.
        fold_N: Fold of each sample; whole groups in each.
        draws: B.
        seed: Seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    labels_N, groups_N, fold_N = labels_N.cpu(), groups_N.cpu(), fold_N.cpu()
    rows_BN = torch.empty(draws, len(labels_N), dtype=torch.long)
    for number in torch.unique(fold_N):
        rows_M = torch.where(fold_N == number)[0]
        # Samples in the order of groups, and in a group of labels: those of one label lie together.
        order_M = rows_M[torch.argsort(labels_N[rows_M], stable=True)]
        order_M = order_M[torch.argsort(groups_N[order_M], stable=True)]
        within_BM = _exchanged_within(labels_N[order_M], groups_N[order_M], draws, generator)
        dealt_BM = _dealt(groups_N[order_M], draws, generator)
        rows_BN[:, order_M] = order_M[within_BM.gather(1, dealt_BM)]
    return rows_BN


def label_ids(labels: Tensor) -> Tensor:
    """(N,) ids of the distinct rows of labels (A, N)."""
    return torch.unique(labels.cpu(), dim=1, return_inverse=True)[1]


def _exchanged_within(labels_M: Tensor, groups_M: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """(B, M) permutation of positions within every group; positions are sorted by group, then label."""
    _, group_M = torch.unique_consecutive(groups_M, return_inverse=True)
    _, run_M = torch.unique_consecutive(torch.stack([group_M, labels_M]), dim=1, return_inverse=True)
    size_U = torch.bincount(run_M)
    num_groups = int(group_M[-1]) + 1
    most_G = torch.zeros(num_groups, dtype=torch.long).scatter_reduce_(0, group_M, size_U[run_M], "amax")
    least_G = torch.full_like(most_G, len(labels_M)).scatter_reduce_(0, group_M, size_U[run_M], "amin")
    unit_M = torch.where((most_G == least_G)[group_M], run_M, torch.arange(len(run_M)) + len(size_U))
    # Random keys of the units, added to the number of their group: sorting them permutes the units of every group.
    key_BU = torch.rand(draws, int(unit_M.max()) + 1, generator=generator, dtype=torch.float64)
    return torch.argsort(group_M + 0.999 * key_BU[:, unit_M], dim=1, stable=True)


def _dealt(groups_M: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """(B, M) positions with the groups in random order."""
    _, group_M = torch.unique_consecutive(groups_M, return_inverse=True)
    key_BM = torch.rand(draws, int(group_M[-1]) + 1, generator=generator, dtype=torch.float64)[:, group_M]
    return torch.argsort(key_BM, dim=1, stable=True)
