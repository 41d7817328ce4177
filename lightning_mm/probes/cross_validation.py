"""Cross-validation of probes over whole groups, with C selected on data that is neither trained nor tested on.

Folds, control labels and bootstrap draws depend on hashes of ids and seeds only, not on the order of the samples. A
group holds the samples that must not be split between training and test: those of one picture.

Data flow: labels and group ids -> ``LearnableLabels`` -> folds of whole groups -> per test fold: probes for each C on
three folds, the C that the fourth prefers, refit on these four -> log-probabilities of the test fold.

Shapes: L layers, N samples, D features, G groups, B bootstrap draws, T targets (true, control), A tasks (labels of a
multi-label problem, otherwise 1), K classes or labels, F test folds, V values of C, P = T * F * A problems, M tested
samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mm.probes.cross_entropy import LogisticProblems, ProbeFeatures
from lightning_mm.probes.logistic import fit_problems, num_logits
from lightning_mm.probes.refits import CrossFit

NUM_FOLDS = 5
MIN_GROUPS = 10
MIN_GROUPS_PER_CLASS = 5

_ROUNDING = 1e-6
"""A layer whose samples differ by less than this share of its largest value is constant."""

_SELECTION_TOLERANCE = 1e-3
"""Enough to compare values of C."""


def hash_uniform(ids_N: Tensor, seed: int) -> Tensor:
    """(N,) float64, a uniform number in [0, 1) for each id, always the same (splitmix64, Steele et al. 2014).

    Args:
        ids_N: Integer ids.
        seed: Another seed gives other numbers.

    Example:
        >>> hash_uniform(torch.tensor([7, 8, 7]), 0).mul(100).int().tolist()
        [15, 89, 15]
    """
    start = (seed + 1) * 0x632BE5AB & ((1 << 64) - 1)
    z = ids_N.cpu().long() * -0x61C8864680B583EB + (start - ((start >> 63) << 64))
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        # The shift of a negative number fills with ones: the mask makes zeros of them.
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((z >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def label_indicators(labels: Tensor) -> Tensor:
    """(N, K) {0, 1} of class ids (N,); labels (N, K) are returned as they are."""
    return F.one_hot(labels.long()) if labels.ndim == 1 else labels.long()


def stratified_group_folds(labels: Tensor, groups_N: Tensor, num_folds: int, seed: int) -> Tensor:
    """(N,) fold of each sample: equally many whole groups in each fold, labels as evenly spread as possible.

    Groups are sorted by their labels, rare labels first, then by hash, and assigned to the folds in turn.

    Args:
        labels: (N,) class ids or (N, K) {0, 1}.
        groups_N: Ids of the groups.
        num_folds: Number of folds.
        seed: Seed of the hash.
    """
    ids_G, group_N = torch.unique(groups_N.cpu(), return_inverse=True)
    holds_NK = label_indicators(labels.cpu())
    holds_GK = torch.zeros(len(ids_G), holds_NK.shape[1], dtype=torch.long).index_add_(0, group_N, holds_NK)
    rare_first_K = torch.argsort((holds_GK > 0).sum(0), stable=True)
    _, kind_G = torch.unique(holds_GK[:, rare_first_K], dim=0, return_inverse=True)
    by_hash_G = torch.argsort(hash_uniform(ids_G, seed))
    order_G = by_hash_G[torch.argsort(kind_G[by_hash_G], stable=True)]
    fold_G = torch.empty(len(ids_G), dtype=torch.long)
    fold_G[order_G] = torch.arange(len(ids_G)) % num_folds
    return fold_G[group_N]


def control_labels(labels: Tensor, types_N: Tensor, seed: int) -> Tensor:
    """Random labels, one per type, drawn with the frequencies of the true ones (Hewitt and Liang 2019).

    Args:
        labels: (N,) class ids or (N, K) {0, 1}.
        types_N: Ids of the types (word, caption, kind of object): samples of a type get the same label.
        seed: Seed of the draw.
    """
    rows, counts = torch.unique(labels.cpu(), dim=0, return_counts=True)
    heights = counts.cumsum(0).double() / counts.sum()
    drawn_N = torch.searchsorted(heights, hash_uniform(types_N, seed), right=True)
    return rows[drawn_N.clamp_max(len(rows) - 1)]


def bootstrap_weights(groups_N: Tensor, draws: int, seed: int) -> Tensor:
    """(B, N) float32, how often each sample occurs when as many groups as there are are drawn with replacement.

    Args:
        groups_N: Ids of the groups.
        draws: B.
        seed: Seed of the draws.
    """
    ids_G, group_N = torch.unique(groups_N.cpu(), return_inverse=True)
    g = len(ids_G)
    chosen_BG = torch.randint(g, (draws, g), generator=torch.Generator().manual_seed(seed))
    times_BG = torch.zeros(draws, g).scatter_add_(1, chosen_BG, torch.ones(draws, g))
    return times_BG[:, group_N]


def num_groups(groups_N: Tensor) -> int:
    """Number of different groups."""
    return len(torch.unique(groups_N))


def layer_problems(x_LND: Tensor) -> list[str]:
    """Per layer, why no probe is defined: constant or not finite; empty where one is."""
    problems = []
    for x_ND in x_LND:
        low_D, high_D = x_ND.amin(0), x_ND.amax(0)
        size = float(torch.maximum(low_D.abs(), high_D.abs()).max())
        if not math.isfinite(size):
            problems.append(f"not finite: {int((~torch.isfinite(x_ND)).any(1).sum())} of {len(x_ND)} samples")
        elif float((high_D - low_D).max()) <= _ROUNDING * size:
            problems.append(f"constant: all {len(x_ND)} samples coincide")
        else:
            problems.append("")
    return problems


@dataclass(frozen=True, eq=False)
class LearnableLabels:
    """The samples and labels that a probe can be trained and tested on.

    Args:
        rows: (M,) indices of the samples that are kept.
        labels: (M,) class ids from 0 without gaps, or (M, K) {0, 1}.
        note: What was left out, and why; may be empty.
        problem: Why nothing can be learned; empty where something can.
    """

    rows: Tensor
    labels: Tensor
    note: str
    problem: str

    @classmethod
    def of(cls, labels: Tensor, groups_N: Tensor) -> "LearnableLabels":
        """Leave out what cannot be in every fold: classes in few groups, labels that few groups have or lack.

        Args:
            labels: (N,) class ids or (N, K) {0, 1}.
            groups_N: Ids of the groups.
        """
        labels, rows_M, note = labels.long(), torch.arange(len(labels)), ""
        alike = bool((labels == labels[:1]).all())
        if num_groups(groups_N) < MIN_GROUPS:
            return cls(rows_M, labels, note, _too_few_groups(groups_N))
        if labels.ndim == 1:
            labels = torch.unique(labels, return_inverse=True)[1]
            kept_K = _groups_with(label_indicators(labels), groups_N) >= MIN_GROUPS_PER_CLASS
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
            return cls(rows_M, labels, note, _too_few_groups(groups_N[rows_M]))
        rare = f"too rare: nothing to tell apart is in {MIN_GROUPS_PER_CLASS} groups or more"
        return cls(rows_M, labels, note, "one class: nothing to tell apart" if alike else rare)


def _too_few_groups(groups_N: Tensor) -> str:
    groups = num_groups(groups_N)
    return f"too few: {groups} groups, at least {MIN_GROUPS} are needed" if groups < MIN_GROUPS else ""


def _groups_with(holds_NK: Tensor, groups_N: Tensor) -> Tensor:
    """(K,) number of groups that have a sample with each label."""
    ids_G, group_N = torch.unique(groups_N, return_inverse=True)
    return (torch.zeros(len(ids_G), holds_NK.shape[1], dtype=torch.long).index_add_(0, group_N, holds_NK) > 0).sum(0)


@dataclass(frozen=True, eq=False)
class CrossValPredictions:
    """Predictions for M tested samples, each by the probe that was not trained on its fold.

    Args:
        rows: (M,) indices of the tested samples.
        fold: (T, M) test fold of each sample: the samples of one fold are predicted by one set of probes.
        log_p: (L, T, A, M, K) log-probabilities.
        frequency: (T, A, M, K) class frequencies in the training data of each sample's probe.
        c: (L, T, F) the selected C.
        unconverged: (L, T) share of the predicting probes that have not converged.
        refits: What refits of each target need; empty where a single fold is tested.
    """

    rows: Tensor
    fold: Tensor
    log_p: Tensor
    frequency: Tensor
    c: Tensor
    unconverged: Tensor
    refits: tuple[CrossFit, ...]


def cross_val_predict(
    x_LND: Tensor,
    targets_TAN: Tensor,
    num_classes: int,
    fold_TN: Tensor,
    num_test_folds: int,
    c_values: Sequence[float],
) -> CrossValPredictions:
    """Fit for each C, select C on the validation fold, refit, predict the test fold.

    Args:
        x_LND: Features.
        targets_TAN: Class ids.
        num_classes: K.
        fold_TN: Fold of each sample, 0 to ``NUM_FOLDS`` - 1; whole groups in each.
        num_test_folds: F; folds 0 to F - 1 are tested. With 1, they must be the same samples for all targets.
        c_values: Inverse strengths of the penalty.
    """
    number_F1 = torch.arange(num_test_folds, device=x_LND.device)[:, None]
    test_TFN, validation_TFN = fold_TN[:, None] == number_F1, fold_TN[:, None] == (number_F1 + 1) % NUM_FOLDS
    rows_M = torch.where(test_TFN[0].any(0))[0]
    features = ProbeFeatures.of(x_LND, standardize=True)
    fits = _CrossValidation(features, targets_TAN, num_classes, test_TFN, validation_TFN)
    c_LTF = fits.select_c(c_values)
    # Cross-fitted, all samples are tested: refits start from each probe's predictions for its training samples.
    log_p_LTFAMK, unconverged_LT = fits.predict(c_LTF, rows_M)
    held_out_LTAMK = torch.where(test_TFN[:, :, None, rows_M, None], log_p_LTFAMK, 0.0).sum(2)
    refits = [
        CrossFit(features.x, log_p_LTFAMK[:, target], targets_TAN[target], fold_TN[target], c_LTF[:, target])
        for target in range(len(targets_TAN) if num_test_folds == NUM_FOLDS else 0)
    ]
    classes_K = torch.arange(num_classes, device=x_LND.device)
    is_class_TANK = (targets_TAN[..., None] == classes_K).double()
    train_TFN = (~test_TFN).double()
    frequency_TAFK = torch.einsum("tank,tfn->tafk", is_class_TANK, train_TFN / train_TFN.sum(2, keepdim=True))
    fold_TM = fold_TN[:, rows_M]
    frequency_TAMK = torch.stack([row[:, fold] for row, fold in zip(frequency_TAFK, fold_TM, strict=True)])
    return CrossValPredictions(rows_M, fold_TM, held_out_LTAMK, frequency_TAMK, c_LTF, unconverged_LT, tuple(refits))


@dataclass(frozen=True, eq=False)
class _CrossValidation:
    """All fits of one cross-validation; ``test`` and ``validation`` are (T, F, N) bool."""

    features: ProbeFeatures
    targets: Tensor
    num_classes: int
    test: Tensor
    validation: Tensor

    def _problems(self, train_TFN: Tensor, c: Tensor, times: int) -> LogisticProblems:
        """One problem per target, fold and task, all of them ``times`` times; ``c`` has the C of each."""
        shape = (*train_TFN.shape[:2], *self.targets.shape[1:])
        targets_PN = self.targets[:, None].expand(shape).flatten(0, 2).repeat(times, 1)
        train_PN = train_TFN[:, :, None].expand(shape).flatten(0, 2).repeat(times, 1)
        return LogisticProblems(targets_PN, train_PN, c, num_logits(self.num_classes))

    def select_c(self, c_values: Sequence[float]) -> Tensor:
        """(L, T, F) the C with the least negative log-likelihood on the validation fold."""
        shape = (len(c_values), *self.test.shape[:2], self.targets.shape[1])
        c_V = torch.tensor(c_values, dtype=torch.float64, device=self.targets.device)
        c_P = c_V.repeat_interleave(math.prod(shape[1:]))
        problems = self._problems(~(self.test | self.validation), c_P[None], shape[0])
        rows_N = self.validation.any(0).any(0)
        probes = fit_problems(self.features, problems, standardize=True, tolerance=_SELECTION_TOLERANCE)
        log_p_LPNK = probes.log_probabilities(self.features.x[:, rows_N])
        truth_PN = problems.targets[:, rows_N]
        true_LPN = log_p_LPNK.gather(3, truth_PN.expand(len(log_p_LPNK), -1, -1)[..., None])[..., 0]
        true_LVTFAN = true_LPN.unflatten(1, shape)
        gain_LVTF = (true_LVTFAN * self.validation[:, :, None, rows_N]).sum((-2, -1))
        return c_V[gain_LVTF.argmax(1)]

    def predict(self, c_LTF: Tensor, rows_M: Tensor) -> tuple[Tensor, Tensor]:
        """(L, T, F, A, M, K) log-probabilities of samples by each probe, and (L, T) share of unconverged probes."""
        tasks = self.targets.shape[1]
        c_LP = c_LTF[..., None].expand(*c_LTF.shape, tasks).flatten(1)
        probes = fit_problems(self.features, self._problems(~self.test, c_LP, 1), standardize=True)
        log_p_LTFAMK = probes.log_probabilities(self.features.x[:, rows_M]).unflatten(1, (*c_LTF.shape[1:], tasks))
        unconverged_LT = 1 - probes.converged.double().unflatten(1, (len(c_LTF[0]), -1)).mean(2)
        return log_p_LTFAMK, unconverged_LT
