"""Linear separability of two modalities: held-out AUROC of a ridge classifier.

Data flow: two ``Representations`` of the same samples -> ridge regression on the modality, each fold scored by the
classifier that was trained on the others -> area under the ROC curve, one Estimate per layer.

Shapes: N samples, D features, M = 2N rows (the first representation, then the second), F samples of a fold, P labelings
(the true one first).
"""

import math

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.modality_gap import swap_signs
from lightning_mm.geometry.peak import left_out_means, with_left_out
from lightning_mm.geometry.representations import Representations, exact_products, one_thread, pair_problems
from lightning_mm.geometry.resampling import (
    clustered_mean_interval,
    faultless_bound,
    jackknife_blocks,
    swap_problem,
    t_quantile,
    without_null,
)

_MIN_SAMPLES = 10
"""Samples below which no classifier is trained."""

_DRAWS = 50
"""Random labelings of the null."""

_GRAM_SHARE = 0.5
"""Share of the penalty that is added to the Gram matrix before its Cholesky factorization, so that it is positive
definite in float32."""


def separability(
    a: Representations,
    b: Representations,
    groups: Tensor | None = None,
    folds: int = 5,
    ridge: float = 1.0,
    seed: int = 0,
) -> list[Estimate]:
    """Area under the ROC curve of a ridge classifier of the modality, on samples that it was not trained on.

    0.5 where the modalities mix, 1 where a hyperplane separates them. Both representations of a sample, and all samples
    of a group, are in one fold, so that each fold is balanced and nothing leaks; the mean that is subtracted is that of
    all samples. The null swaps the modalities of random samples and trains again.

    The interval is that of the ranks (DeLong et al. 1988, clustered by group), which takes the classifiers for given;
    it is widened by what training adds: the spread of the areas of the swapped labelings over the same interval's mean
    standard error there, for one as for the other the two readings of a sample depend on each other. An area of 1 has
    the interval of no fault in as many trials as there are groups (Clopper and Pearson 1934).

    Args:
        a: L layers.
        b: As many layers of the same samples and features.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
        folds: Number of folds.
        ridge: Penalty as a share of the mean squared norm of a row.
        seed: Seed of the folds and of the null.
    """
    n = a.num_samples
    assert a.centered.shape == b.centered.shape, "two representations of the same samples and features, layer by layer"
    parts = jackknife_blocks(n, groups, folds, seed)
    few = "" if len(parts) > 1 else "one group: nothing is left to train on"
    sign_PN = torch.cat([torch.ones(1, n), swap_signs(n, _DRAWS, groups, seed)])
    estimates = []
    for layer, pair in enumerate(pair_problems(a, b, _MIN_SAMPLES)):
        if pair or few:
            estimates.append(Estimate.undefined_because(pair or few, n))
            continue
        shift_D = (b.mean[layer] - a.mean[layer]) / 2
        rows_MD = torch.cat([a.centered[layer] - shift_D, b.centered[layer] + shift_D])
        estimates.append(_area(rows_MD, sign_PN, parts, ridge, groups))
    return without_null(estimates, swap_problem(groups), exact=True)


def _area(rows_MD: Tensor, sign_PN: Tensor, parts: list[Tensor], ridge: float, groups: Tensor | None) -> Estimate:
    """Mean over the folds of P(second scores above first); each sample counts in both classes (DeLong et al. 1988)."""
    n = len(rows_MD) // 2
    target_MP = torch.cat([-sign_PN, sign_PN], 1).T.to(rows_MD)
    score_MP = cross_val_ridge_scores(rows_MD, target_MP, parts, ridge)
    if not torch.isfinite(score_MP).all():
        return Estimate.undefined_because("no line: the products of the rows overflow or lose their digits", n)
    wins_PN = torch.zeros(len(sign_PN), n, dtype=torch.float64)
    for part in parts:
        first_FP, second_FP, kept_FP = score_MP[part], score_MP[n + part], sign_PN.T[part].to(score_MP) > 0
        wins_PN[:, part] = _wins(first_FP.where(kept_FP, second_FP), second_FP.where(kept_FP, first_FP)).T.cpu()
    area_P, low_P, _ = clustered_mean_interval(wins_PN, groups)
    value, error, half_P = float(area_P[0]), float(area_P[1:].std()), area_P - low_P
    few, trials = t_quantile(_DRAWS - 1), n if groups is None else len(torch.unique(groups))
    # t of both: the ratio of two spreads, of which the draws tell one
    wider = max(1.0, float(error * few / half_P[1:].square().mean().sqrt()))  # NaN: 1
    low, high = max(value - wider * float(half_P[0]), 0.0), min(value + wider * float(half_P[0]), 1.0)  # NaN stays NaN
    if value in (0.0, 1.0):
        low, high = (faultless_bound(trials), 1.0) if value == 1 else (0.0, 1 - faultless_bound(trials))
    band = {"null": 0.5, "null_low": 0.5 - few * error, "null_high": 0.5 + few * error}
    return with_left_out(Estimate.of(value, n, low=low, high=high, **band), left_out_means(wins_PN[0], groups, wider))


def _wins(low_FP: Tensor, high_FP: Tensor) -> Tensor:
    """(F, P) mean over a sample's two scores of the share of the other class that each is rightly above or below.

    Their mean over the samples is the AUROC. Ties count half.
    """
    wins = [
        (torch.searchsorted(others_PF, own_PF) + torch.searchsorted(others_PF, own_PF, right=True)) / 2
        for others_PF, own_PF in (
            (low_FP.T.contiguous().sort(1).values, high_FP.T.contiguous()),
            (high_FP.T.contiguous().sort(1).values, low_FP.T.contiguous()),
        )
    ]
    count = len(low_FP)
    return (wins[0].double() + count - wins[1].double()).T / (2 * count)


def cross_val_ridge_scores(rows_MD: Tensor, target_MP: Tensor, parts: list[Tensor], ridge: float) -> Tensor:
    """(M, P) predictions of ridge regression for each row from the fit without its fold; NaN beyond the precision.

    The D x D sums of a fold are subtracted from those of all rows. Where D exceeds M, the rows are first replaced by
    those of the M x M Cholesky factor of their Gram matrix plus half of the penalty: equal inner products, and one
    feature of its own per row, which predicts nothing for other rows and shrinks the weights as that half does.

    Args:
        rows_MD: Features, both representations below each other.
        target_MP: Targets.
        parts: Per fold the indices of its samples.
        ridge: Penalty as a share of the mean squared norm of a row.
    """
    half, (m, width) = len(rows_MD) // 2, rows_MD.shape
    score_MP = torch.empty_like(target_MP)
    with exact_products():
        penalty = ridge * rows_MD.square().sum(1).mean()
        if width > m:
            rows_MD = _factor(rows_MD @ rows_MD.T + _GRAM_SHARE * penalty * torch.eye(m).to(rows_MD))
            penalty = (1 - _GRAM_SHARE) * penalty
        folds = [rows_MD[torch.cat([part, half + part])] for part in parts]
        targets = [target_MP[torch.cat([part, half + part])] for part in parts]
        total_DD, total_DP = rows_MD.T @ rows_MD, rows_MD.T @ target_MP
        total_DD.diagonal().add_(penalty)
        for part, fold_FD, target_FP in zip(parts, folds, targets, strict=True):
            rest_DD, rest_DP = total_DD - fold_FD.T @ fold_FD, total_DP - fold_FD.T @ target_FP
            with one_thread():
                line_DP = torch.cholesky_solve(rest_DP, _factor(rest_DD))
            score_MP[torch.cat([part, half + part])] = fold_FD @ line_DP
    return score_MP


@one_thread()
def _factor(matrix_DD: Tensor) -> Tensor:
    """Lower Cholesky factor; NaN where the matrix is not positive definite."""
    root_DD, failed = torch.linalg.cholesky_ex(matrix_DD)
    return torch.full_like(root_DD, math.nan) if failed else root_DD
