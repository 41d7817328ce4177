"""Which samples are learned from and which are tested on: by hash, so that nothing depends on order, step or chance.

Data flow: labels (N,) or (N, K) and group ids (N,) -> parts of whole groups, control labels, bootstrap weights.
A group holds the samples that must not be told apart by what they share: those of one picture.

Shapes: N samples, K classes or labels, G groups, B draws.

What probes say of samples whose groups they have not seen, with C chosen without looking at those either.

Data flow: features (L, N, D), targets (T, A, N) and the part of each sample -> for every test part: probes for each C
on three parts, the C that the fourth prefers, probes on these four -> log-probabilities of the test part's samples.

Shapes: L layers, N samples, D features, T targets (true, control), A tasks (labels of a multi-label problem, otherwise
1), K classes, F test parts, V values of C, P = T * F * A problems, M tested samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mm.probes.cross_entropy import Features, Problems
from lightning_mm.probes.logistic import num_logits, solve

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


PARTS = 5

_CHOICE_TOLERANCE = 1e-3
"""Enough to tell one C from another."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Predictions for M tested samples.

    Args:
        rows: (M,) which samples.
        part: (T, M) the test part of each: what one set of probes has predicted.
        log_p: (L, T, A, M, K) log-probabilities.
        frequency: (T, A, M, K) of the classes in the training of each sample's probe.
        c: (L, T, F) the chosen C.
        unfinished: (L, T) share of the probes that predict which have not converged.
    """

    rows: Tensor
    part: Tensor
    log_p: Tensor
    frequency: Tensor
    c: Tensor
    unfinished: Tensor


def held_out(
    x_LND: Tensor, targets_TAN: Tensor, num_classes: int, part_TN: Tensor, test_parts: int, c_values: Sequence[float]
) -> HeldOut:
    """Fit, choose, refit, predict.

    Args:
        x_LND: Features.
        targets_TAN: Class ids.
        num_classes: K.
        part_TN: Of ``PARTS``, whole groups in each.
        test_parts: F; the first so many parts are tested: the same samples for all targets.
        c_values: Inverse strengths of the penalty.
    """
    number_F1 = torch.arange(test_parts, device=x_LND.device)[:, None]
    test_TFN, choice_TFN = part_TN[:, None] == number_F1, part_TN[:, None] == (number_F1 + 1) % PARTS
    rows_M = torch.where(test_TFN[0].any(0))[0]
    fits = _Fits(Features.of(x_LND, standardise=True), targets_TAN, num_classes, test_TFN, choice_TFN)
    c_LTF = fits.choose(c_values)
    log_p_LTAMK, unfinished_LT = fits.predict(c_LTF, rows_M)
    classes_K = torch.arange(num_classes, device=x_LND.device)
    is_class_TANK = (targets_TAN[..., None] == classes_K).double()
    learned_TFN = (~test_TFN).double()
    frequency_TAFK = torch.einsum("tank,tfn->tafk", is_class_TANK, learned_TFN / learned_TFN.sum(2, keepdim=True))
    part_TM = part_TN[:, rows_M]
    frequency_TAMK = torch.stack([row[:, part] for row, part in zip(frequency_TAFK, part_TM, strict=True)])
    return HeldOut(rows_M, part_TM, log_p_LTAMK, frequency_TAMK, c_LTF, unfinished_LT)


@dataclass(frozen=True, eq=False)
class _Fits:
    """The problems; test and choice parts are (T, F, N)."""

    features: Features
    targets: Tensor
    num_classes: int
    test: Tensor
    choice: Tensor

    def _problems(self, train_TFN: Tensor, c: Tensor, times: int) -> Problems:
        """All targets, parts and tasks, so many times; ``c`` for each."""
        shape = (*train_TFN.shape[:2], *self.targets.shape[1:])
        targets_PN = self.targets[:, None].expand(shape).flatten(0, 2).repeat(times, 1)
        train_PN = train_TFN[:, :, None].expand(shape).flatten(0, 2).repeat(times, 1)
        return Problems(targets_PN, train_PN, c, num_logits(self.num_classes))

    def choose(self, c_values: Sequence[float]) -> Tensor:
        """(L, T, F) the C with the least negative log-likelihood on the part left for the choice."""
        shape = (len(c_values), *self.test.shape[:2], self.targets.shape[1])
        c_V = torch.tensor(c_values, dtype=torch.float64, device=self.targets.device)
        problems = self._problems(
            ~(self.test | self.choice), c_V.repeat_interleave(math.prod(shape[1:]))[None], shape[0]
        )
        rows_N = self.choice.any(0).any(0)
        probes = solve(self.features, problems, standardise=True, tolerance=_CHOICE_TOLERANCE)
        log_p_LPNK = probes.log_probabilities(self.features.x[:, rows_N])
        truth_PN = problems.targets[:, rows_N]
        true_LPN = log_p_LPNK.gather(3, truth_PN.expand(len(log_p_LPNK), -1, -1)[..., None])[..., 0]
        true_LVTFAN = true_LPN.unflatten(1, shape)
        gain_LVTF = (true_LVTFAN * self.choice[:, :, None, rows_N]).sum((-2, -1))
        return c_V[gain_LVTF.argmax(1)]

    def predict(self, c_LTF: Tensor, rows_M: Tensor) -> tuple[Tensor, Tensor]:
        """(L, T, A, M, K) log-probabilities of tested samples, by the probes that have not seen them.

        And (L, T), which share of these probes has not converged.
        """
        tasks = self.targets.shape[1]
        c_LP = c_LTF[..., None].expand(*c_LTF.shape, tasks).flatten(1)
        probes = solve(self.features, self._problems(~self.test, c_LP, 1), standardise=True)
        log_p_LTFAMK = probes.log_probabilities(self.features.x[:, rows_M]).unflatten(1, (*c_LTF.shape[1:], tasks))
        unfinished_LT = 1 - probes.converged.double().unflatten(1, (len(c_LTF[0]), -1)).mean(2)
        return torch.where(self.test[:, :, None, rows_M, None], log_p_LTFAMK, 0.0).sum(2), unfinished_LT
