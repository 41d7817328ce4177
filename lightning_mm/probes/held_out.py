"""What probes say of samples whose groups they have not seen, with C chosen without looking at those either.

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

from lightning_mm.probes.cross_entropy import Features, Problems
from lightning_mm.probes.logistic import num_logits, solve

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
