"""Classification scores for all layers and all bootstrap draws at once.

Without a value (recall of a class that does not occur, ranking without positives) a score is NaN.

Data flow: predictions (L, N) or log-probabilities (L, N, K) and labels (N,) -> scores (L,). With ``weights`` (B, N),
how often each sample occurs in each of B draws, the scores are (L, B); with None all samples count once, and the labels
of accuracy, balanced accuracy and AUROC may be (L, N).

Shapes: L layers, N samples, M samples of a stratum, K classes, B draws, P positives, Q negatives.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

_BINS = 15
"""Bins of the calibration error."""


def _weighted_sum(values_LN: Tensor, weights: Tensor) -> Tensor:
    """Sums over samples, (L,) or (L, B)."""
    return torch.tensordot(values_LN.to(weights.dtype), weights, dims=([-1], [-1]))


def _weights_or_ones(weights: Tensor | None, labels_N: Tensor) -> Tensor:
    ones = torch.ones(labels_N.shape[-1], dtype=torch.float64, device=labels_N.device)
    return ones if weights is None else weights


def accuracy(predicted_LN: Tensor, labels_N: Tensor, weights: Tensor | None = None) -> Tensor:
    """Share of samples whose predicted class is the true one.

    Example:
        >>> accuracy(torch.tensor([[0, 1, 1], [0, 0, 0]]), torch.tensor([0, 1, 0])).tolist()
        [0.6666666666666666, 0.6666666666666666]
    """
    weights = _weights_or_ones(weights, labels_N)
    return _weighted_sum(predicted_LN == labels_N, weights) / weights.sum(-1)


def balanced_accuracy(
    predicted_LN: Tensor, labels_N: Tensor, num_classes: int, weights: Tensor | None = None
) -> Tensor:
    """Mean recall of the classes that occur."""
    weights = _weights_or_ones(weights, labels_N)
    recalls = [
        _weighted_sum((predicted_LN == label) & (labels_N == label), weights) / (weights * (labels_N == label)).sum(-1)
        for label in range(num_classes)
    ]
    return torch.stack(recalls).nanmean(0)


def macro_f1(predicted_LN: Tensor, labels_N: Tensor, num_classes: int, weights: Tensor | None = None) -> Tensor:
    """Mean F1 of the classes that occur or are predicted."""
    weights = _weights_or_ones(weights, labels_N)
    f1 = [
        2
        * _weighted_sum((predicted_LN == label) & (labels_N == label), weights)
        / (_weighted_sum(predicted_LN == label, weights) + (weights * (labels_N == label)).sum(-1))
        for label in range(num_classes)
    ]
    return torch.stack(f1).nanmean(0)


def nll(log_p_LNK: Tensor, labels_N: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean negative log-probability of the true class, in nats."""
    weights = _weights_or_ones(weights, labels_N)
    return -_weighted_sum(true_class_log_prob(log_p_LNK, labels_N), weights) / weights.sum(-1)


def v_information(log_p_LNK: Tensor, labels_N: Tensor, weights: Tensor | None = None) -> Tensor:
    """V-information in bits (Xu et al. 2020): entropy of the classes minus ``nll``.

    Negative where the probe is worse than the class frequencies.
    """
    weights = _weights_or_ones(weights, labels_N)
    is_class_NK = F.one_hot(labels_N, log_p_LNK.shape[2]).to(weights)
    entropy = torch.special.entr(weights @ is_class_NK / weights.sum(-1, keepdim=True)).sum(-1)
    return (entropy - nll(log_p_LNK, labels_N, weights)) / math.log(2)


def true_class_log_prob(log_p_LNK: Tensor, labels_N: Tensor) -> Tensor:
    """(L, N) log-probability of the true class."""
    return log_p_LNK.gather(2, labels_N.expand(len(log_p_LNK), -1)[..., None])[..., 0]


def calibration_error(log_p_LNK: Tensor, labels_N: Tensor, weights: Tensor | None = None) -> Tensor:
    """Expected calibration error over 15 bins of equal width (Guo et al. 2017): mean gap of confidence and accuracy."""
    weights = _weights_or_ones(weights, labels_N)
    log_confidence_LN, predicted_LN = log_p_LNK.max(2)
    confidence_LN = log_confidence_LN.exp()
    gap_LN = confidence_LN - (predicted_LN == labels_N).to(confidence_LN)
    bin_LN = (confidence_LN * _BINS).long().clamp_max(_BINS - 1)
    gaps = [_weighted_sum(gap_LN * (bin_LN == index), weights).abs() for index in range(_BINS)]
    return torch.stack(gaps).sum(0) / weights.sum(-1)


def auroc(scores_LN: Tensor, labels_N: Tensor, weights: Tensor | None = None, strata_N: Tensor | None = None) -> Tensor:
    """Area under the ROC curve: share of positive-negative pairs that are ranked correctly; ties count half.

    Args:
        scores_LN: Higher means positive.
        labels_N: {0, 1}.
        weights: (B, N) or (N,) counts of the samples; None: 1.
        strata_N: Only pairs of the same stratum count, as scores of different models are not comparable. None: all.
    """
    if weights is None:
        return _unweighted_auroc(scores_LN, labels_N, strata_N)
    right = pairs = weights.new_zeros(())
    for rows, w_BN in _strata(strata_N, weights):
        positive_M, w_MB = labels_N[rows] > 0, w_BN.T[rows]
        right = right + torch.stack([_correct_pairs(scores_M, positive_M, w_MB) for scores_M in scores_LN[:, rows]])
        pairs = pairs + w_MB[positive_M].sum(0) * w_MB[~positive_M].sum(0)
    return (right / pairs).view(-1, *weights.shape[:-1])


def _unweighted_auroc(scores_LN: Tensor, labels_N: Tensor, strata_N: Tensor | None) -> Tensor:
    """(L,) by the ranks of the positives (Mann and Whitney 1947)."""
    right = pairs = torch.zeros((), dtype=torch.float64, device=scores_LN.device)
    for rows in _strata_rows(strata_N, labels_N):
        positive = (labels_N[..., rows] > 0).double()
        count = positive.sum(-1)
        right = right + (mid_ranks(scores_LN[..., rows]) * positive).sum(-1) - count * (count + 1) / 2
        pairs = pairs + count * (len(rows) - count)
    return right / pairs


def mid_ranks(scores: Tensor) -> Tensor:
    """(..., N) float64 ranks from 1; ties are averaged.

    Example:
        >>> mid_ranks(torch.tensor([0.3, 0.1, 0.3])).tolist()
        [2.5, 1.0, 2.5]
    """
    ordered, scores = scores.sort(-1).values.contiguous(), scores.contiguous()
    below = torch.searchsorted(ordered, scores)
    return (below + torch.searchsorted(ordered, scores, right=True) + 1).double() / 2


def average_precision(
    scores_LN: Tensor, labels_N: Tensor, weights: Tensor | None = None, strata_N: Tensor | None = None
) -> Tensor:
    """Mean, over positives, of the precision among all samples scored at least as high; arguments as for ``auroc``."""
    if weights is None:
        return _unweighted_precision(scores_LN, labels_N, strata_N)
    total = positives = weights.new_zeros(())
    for rows, w_BN in _strata(strata_N, weights):
        positive_M, w_MB = labels_N[rows] > 0, w_BN.T[rows]
        total = total + torch.stack([_precisions(scores_M, positive_M, w_MB) for scores_M in scores_LN[:, rows]])
        positives = positives + w_MB[positive_M].sum(0)
    return (total / positives).view(-1, *weights.shape[:-1])


def _unweighted_precision(scores_LN: Tensor, labels_N: Tensor, strata_N: Tensor | None) -> Tensor:
    """(L,) mean, over positives, of the hits among all samples ranked at least as high."""
    total, positives = torch.zeros((), dtype=torch.float64, device=scores_LN.device), 0
    for rows in _strata_rows(strata_N, labels_N):
        positive_M = labels_N[rows] > 0
        all_LM = -scores_LN[..., rows]
        at_LP = all_LM[..., positive_M].sort(-1).values.contiguous()
        seen_LP = torch.searchsorted(all_LM.sort(-1).values.contiguous(), at_LP, right=True)
        total = total + (torch.searchsorted(at_LP, at_LP, right=True).double() / seen_LP).sum(-1)
        positives += int(positive_M.sum())
    return total / positives if positives else torch.full_like(total, math.nan)


def _correct_pairs(scores_M: Tensor, positive_M: Tensor, w_MB: Tensor) -> Tensor:
    """(B,) weight of the correctly ranked positive-negative pairs, by running sums over the sorted negatives."""
    at_P, (ranked_Q, order_Q) = scores_M[positive_M], scores_M[~positive_M].sort()
    below_QB = F.pad(w_MB[~positive_M][order_Q].cumsum(0), (0, 0, 1, 0))
    first_P, after_P = (torch.searchsorted(ranked_Q, at_P, right=right) for right in (False, True))
    return (w_MB[positive_M] * (below_QB[first_P] + below_QB[after_P])).sum(0) / 2


def _precisions(scores_M: Tensor, positive_M: Tensor, w_MB: Tensor) -> Tensor:
    """(B,) weighted sum, over positives, of the precision among all samples scored at least as high."""
    at_P, w_PB = -scores_M[positive_M], w_MB[positive_M]
    seen_PB, hits_PB = (_at_most(at_P, -of, w) for of, w in ((scores_M, w_MB), (scores_M[positive_M], w_PB)))
    return (w_PB * hits_PB / seen_PB.clamp_min(1)).sum(0)


def _at_most(at_P: Tensor, values_M: Tensor, w_MB: Tensor) -> Tensor:
    """(P, B) weight of the values that are at most as large as each of ``at_P``, which is one of them."""
    ranked_M, order_M = values_M.sort()
    return w_MB[order_M].cumsum(0)[torch.searchsorted(ranked_M, at_P, right=True) - 1]


def _strata(strata_N: Tensor | None, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of each stratum, and (B, N) weights."""
    w_BN = weights.reshape(-1, weights.shape[-1])
    for rows in _strata_rows(strata_N, w_BN):
        yield rows, w_BN


def _strata_rows(strata_N: Tensor | None, like_N: Tensor) -> Iterator[Tensor]:
    """The rows of each stratum; all rows without strata."""
    all_rows = torch.arange(like_N.shape[-1], device=like_N.device)
    if strata_N is None:
        yield all_rows
        return
    for stratum in torch.unique(strata_N):
        yield all_rows[strata_N == stratum]
