"""Failure prediction: attention to the constraint, and confidence, as predictors of whether an answer is correct.

Data flow: ``ActivationCache`` -> ``contribution_features``: per layer and head, the largest contribution of a
constraint token to the last token -> L1 logistic regression on half of the questions, scores of the other half ->
AUROC and risk, compared with those of the answer's probability. Intervals bootstrap the questions, clustered by
image, with the regressions fixed.

After Basu et al. 2024, arXiv:2406.04236: features standardized on the training half, L1 penalty, C = 0.05 (or
``l1_strength``, for few questions), halves with equally many correct answers, seed 0. The paper draws one split; here
splits are repeated, both halves are tested, and questions about one image are in the same half.

Shapes: Q questions, F features (layers x heads), S splits, B bootstrap draws, U distinct scores.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mm.causal.effects.aggregate import group_ids
from lightning_mm.causal.effects.attention_flow import contribution_norms
from lightning_mm.causal.interventions.activation_cache import ActivationCache
from lightning_mm.causal.questions.question import EncodedQuestion, Question
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.estimate import Estimate
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.probes.cross_validation import (
    MIN_GROUPS_PER_CLASS,
    bootstrap_weights,
    num_groups,
    stratified_group_folds,
)
from lightning_mm.probes.intervals import percentile_interval
from lightning_mm.probes.scores import auroc

C = 0.05
"""Of Basu et al. 2024, for hundreds of questions and more; fewer need a larger one (``l1_strength``)."""


def l1_strength(num_questions: int, num_features: int) -> float:
    """C = 0.05, or larger if that would leave every possible feature without a weight.

    A standardized feature gets a weight once its mean product with the labels exceeds 2 / (C n), which no feature can
    at C = 0.05 and n = 40. The best of F noise features reaches about sqrt(2 ln F / n); C is such that half of that is
    enough, which for the 500 questions and 1,024 heads of a 7B model is the 0.05 of Basu et al. 2024.

    Args:
        num_questions: n, number of training questions.
        num_features: F, number of features.

    Example:
        >>> round(l1_strength(500, 1024), 3), round(l1_strength(20, 270), 2)
        (0.05, 0.27)
    """
    c = max(C, 4 / math.sqrt(2 * num_questions * math.log(max(num_features, 2))))
    if c > C:
        log_decision("causal.predictor.c", f"{c:.2g}", f"{num_questions} questions are too few for {C}")
    return c


def fit_l1(x_QF: Tensor, right_Q: Tensor, c: float = C, tolerance: float = 1e-9, max_steps: int = 20000) -> Tensor:
    """(F,) float64 weights of L1-penalized logistic regression, without a separate bias.

    Minimizes scikit-learn's liblinear objective ||w||_1 + C sum_i log(1 + exp(-y_i w.x_i)) by accelerated proximal
    gradient steps (FISTA, Beck and Teboulle 2009).

    Args:
        x_QF: Features; a column of ones acts as the bias, penalized as in liblinear.
        right_Q: Labels, 0 or 1.
        c: C, weight of the likelihood against the penalty.
        tolerance: Stop once no weight changes by more, relative to the largest weight or 1.
        max_steps: Largest number of steps.

    Example:
        >>> x = torch.tensor([[-2.0, 0.1], [-1.0, -0.1], [1.0, 0.1], [2.0, -0.1]])
        >>> fit_l1(x, torch.tensor([0, 0, 1, 1]), 1.0) > 0
        tensor([ True, False])
    """
    x_QF, sign_Q = x_QF.double(), right_Q.double() * 2 - 1
    # The second derivative of the logistic loss is at most 1/4.
    step = 4 / (c * torch.linalg.matrix_norm(x_QF, 2).square().clamp_min(1e-12))
    weight_F = ahead_F = x_QF.new_zeros(x_QF.shape[1])
    momentum = 1.0
    for _ in range(max_steps):
        slope_F = -c * (sign_Q * torch.sigmoid(-sign_Q * (x_QF @ ahead_F))) @ x_QF
        moved_F = torch.nn.functional.softshrink(ahead_F - step * slope_F, float(step))
        change_F = moved_F - weight_F
        # Restart the momentum when it leads uphill (O'Donoghue and Candes 2015).
        if (ahead_F - moved_F) @ change_F > 0:
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead_F = moved_F + (momentum - 1) / following * change_F
        weight_F, momentum = moved_F, following
        if change_F.abs().max() <= tolerance * weight_F.abs().max().clamp_min(1):
            break
    return weight_F


COVERAGE = 0.2
_DRAWS = 1000


@dataclass(frozen=True)
class FailurePrediction:
    """How well two predictors separate correct from wrong answers.

    Args:
        contributions: AUROC of the regression on contributions.
        confidence: AUROC of the answer's probability.
        difference: AUROC of contributions minus confidence, on the same questions and bootstrap draws; null is 0.
        risk_contributions: Error rate among the ``COVERAGE`` of answers that the regression trusts most; null is the
            overall error rate.
        risk_confidence: Error rate among those that the answer's probability trusts most.
        kept: Number of features with nonzero weight, mean over splits.
        c: C, weight of the likelihood against the penalty.
    """

    contributions: Estimate
    confidence: Estimate
    difference: Estimate
    risk_contributions: Estimate
    risk_confidence: Estimate
    kept: float
    c: float

    def table(self) -> dict[str, Any]:
        """A table of causal.json."""
        rows = (
            ("AUROC", "attention to the constraint", self.contributions),
            ("AUROC", "confidence", self.confidence),
            ("AUROC", "difference", self.difference),
            ("risk@20%", "attention to the constraint", self.risk_contributions),
            ("risk@20%", "confidence", self.risk_confidence),
        )
        note = (
            f"Logistic regression (L1, C = {self.c:.2g}) on contributions to the last token, tested on halves not "
            f"learned from; {self.kept:.1f} features kept on average. Risk: wrong answers among the fifth that is "
            "trusted most."
        )
        cells = [[measure, by, *_cells(estimate)] for measure, by, estimate in rows]
        columns = ["measure", "predictor", "value", "low", "high", "chance", "n", "note"]
        return {"title": "Are wrong answers foreseen?", "columns": columns, "rows": cells, "note": note}


def contribution_features(mm: MultimodalModel, cache: ActivationCache, encoded: EncodedQuestion) -> Tensor:
    """(F,) largest norm of a constraint token's contribution to the last token, for each layer and head.

    Cross-attention layers have no features.

    Raises:
        UserError: The question has no constraint.
    """
    if not len(encoded.constraint):
        raise UserError(f"Question {encoded.question.id} has no constraint.", "None was given.", "Leave it out.")
    last = torch.tensor([encoded.length - 1])
    features = []
    for layer in sorted(cache.attention_calls):
        heads_H1K = contribution_norms(mm, cache, layer, last).heads
        if heads_H1K.shape[2] == cache.length:
            features.append(heads_H1K[:, 0, encoded.constraint.to(heads_H1K.device)].amax(1).cpu())
    if not features:
        raise UserError("Contributions cannot be told.", "No layer attends to the tokens.", "Leave the predictor out.")
    return torch.cat(features)


def predict_failure(
    feature_QF: Tensor, confidence_Q: Tensor, right_Q: Tensor, questions: Sequence[Question], splits: int = 10
) -> FailurePrediction:
    """Evaluate both predictors on the same questions.

    Args:
        feature_QF: ``contribution_features`` of each question.
        confidence_Q: Probability of the answer's token.
        right_Q: Whether the answer is correct, bool.
        questions: The Q questions, for their groups.
        splits: S, number of random splits into halves.

    Returns:
        The prediction; its estimates are undefined if there are too few correct or wrong answers for two halves.
    """
    group_Q, label_Q = group_ids(questions), right_Q.long().cpu()
    if why := _too_few(label_Q, group_Q):
        none = Estimate.undefined_because(why, len(label_Q))
        return FailurePrediction(none, none, none, none, none, kept=0.0, c=C)
    part_SQ = torch.stack([stratified_group_folds(label_Q, group_Q, 2, seed) for seed in range(splits)])
    c = l1_strength(len(label_Q) // 2, feature_QF.shape[1])
    scored = [_cross_scores(feature_QF.double().cpu(), label_Q, part_Q, c) for part_Q in part_SQ]
    # All questions once, then the bootstrap draws.
    weight_BQ = torch.cat([torch.ones(1, len(label_Q)), bootstrap_weights(group_Q, _DRAWS, 0)]).double()
    known_Q = confidence_Q.double().cpu()

    def everywhere(score: Callable[..., Tensor], scores: Sequence[Tensor]) -> Tensor:
        """(1 + B,) mean over splits; scores of different regressions are never ranked together."""
        pairs = zip(scores, part_SQ, strict=True)
        return torch.stack([score(each, label_Q, weight_BQ, part_Q) for each, part_Q in pairs]).nanmean(0)

    by_both = [[score for score, _ in scored], [known_Q] * splits]
    ranked = [everywhere(_auroc, scores) for scores in by_both]
    risks = [everywhere(_risk, scores) for scores in by_both]
    n, wrong = len(label_Q), 1 - float(label_Q.double().mean())
    return FailurePrediction(
        contributions=_estimate(ranked[0], n, 0.5),
        confidence=_estimate(ranked[1], n, 0.5),
        difference=_estimate(ranked[0] - ranked[1], n, 0.0, least=-1.0),
        risk_contributions=_estimate(risks[0], n, wrong),
        risk_confidence=_estimate(risks[1], n, wrong),
        kept=sum(kept for _, kept in scored) / splits,
        c=c,
    )


def _cross_scores(feature_QF: Tensor, label_Q: Tensor, part_Q: Tensor, c: float) -> tuple[Tensor, float]:
    """(Q,) score of each question by the regression not trained on it, and the mean number of nonzero weights."""
    score_Q, kept = torch.zeros(len(label_Q), dtype=torch.float64), 0.0
    for tested in (0, 1):
        learned, held = part_Q != tested, part_Q == tested
        mean_F, spread_F = feature_QF[learned].mean(0), feature_QF[learned].std(0, correction=0)
        varies = spread_F > 1e-12 * mean_F.abs()
        x_QF = (feature_QF - mean_F) / torch.where(varies, spread_F, 1) * varies
        x_QF = torch.cat([x_QF, x_QF.new_ones(len(x_QF), 1)], 1)
        weight_F = fit_l1(x_QF[learned], label_Q[learned], c)
        score_Q[held] = x_QF[held] @ weight_F
        kept += float((weight_F[:-1] != 0).sum()) / 2
    return score_Q, kept


def _auroc(score_Q: Tensor, label_Q: Tensor, weight_BQ: Tensor, part_Q: Tensor) -> Tensor:
    return auroc(score_Q[None], label_Q, weight_BQ, part_Q)[0]


def _risk(score_Q: Tensor, label_Q: Tensor, weight_BQ: Tensor, part_Q: Tensor) -> Tensor:
    """(B,) error rate among the most trusted fifth of each half; tied scores share their places."""
    risks = []
    for part in (0, 1):
        rows = part_Q == part
        _, number_Q = torch.unique(-score_Q[rows], return_inverse=True)
        one_hot_QU = torch.nn.functional.one_hot(number_Q).double()
        weight_BU = weight_BQ[:, rows] @ one_hot_QU
        wrong_BU = (weight_BQ[:, rows] * (1 - label_Q[rows])) @ one_hot_QU
        room_B1 = COVERAGE * weight_BU.sum(1, keepdim=True)
        before_BU = weight_BU.cumsum(1) - weight_BU
        taken_BU = torch.minimum((room_B1 - before_BU).clamp_min(0), weight_BU)
        risks.append((taken_BU * wrong_BU / weight_BU.clamp_min(1e-12)).sum(1) / room_B1[:, 0])
    return torch.stack(risks).nanmean(0)


def _estimate(value_B: Tensor, n: int, null: float, least: float = 0.0) -> Estimate:
    """Value on all questions, with the 95 % bootstrap interval."""
    low, high = percentile_interval(value_B[None, 1:])[0].clamp(least, 1).tolist()
    return Estimate.of(float(value_B[0]), n, low=low, high=high, null=null)


def _too_few(label_Q: Tensor, group_Q: Tensor) -> str:
    """Why the questions cannot be split; empty if they can."""
    for label, name in ((1, "right"), (0, "wrong")):
        groups = num_groups(group_Q[label_Q == label])
        if not groups:
            return f"none of {len(label_Q)} answers is {name}"
        if groups < MIN_GROUPS_PER_CLASS:
            return f"too few: answers to {groups} pictures are {name}, at least {MIN_GROUPS_PER_CLASS} are needed"
    return ""


def _cells(estimate: Estimate) -> list[Any]:
    if estimate.value is None:
        return [None, None, None, None, estimate.n, estimate.undefined]
    ends = (estimate.value, estimate.low, estimate.high, estimate.null)
    return [*(None if end is None else round(end, 4) for end in ends), estimate.n, "; ".join(estimate.notes)]
