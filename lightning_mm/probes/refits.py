"""What cross-fitted probes would predict, had they been trained on other samples or on exchanged labels.

The held-out predictions of a cross-fitted probe vary with the samples that it is tested on and with those that it is
trained on, and every sample is both. A refit for each of hundreds of draws is not affordable: one Newton step of the
probe's own objective stands for it. From the fitted weights, with the training samples drawn with replacement, it is
the infinitesimal form of the bootstrap; from the class frequencies, with exchanged labels, it is a ridge probe with the
same penalty, from which a logistic probe of labels without meaning differs little. ``tests/probes/test_refits.py``
compares both with refits by brute force.

Data flow: features and log-probabilities of all folds' probes -> ``CrossFit`` -> ``LayerCrossFit``, one layer at a time
-> log-probabilities after training with other weights, or on exchanged labels -> ``result``.

Shapes: L layers, N samples, E = D + 1 features and a constant, F folds, A tasks, K classes, H logits per task (1 for
two classes), B draws, R training and S test samples of a fold.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST_CURVATURE = 1e-6
"""Of the mean loss: where all predictions are certain, nothing changes them."""

_SINGLE_PRECISION = 1e5
"""Up to this sum of the features' squares over the penalty, single precision solves for the weights."""


@dataclass(frozen=True, eq=False)
class CrossFit:
    """Cross-fitted probes, every sample in one test fold.

    Args:
        x: (L, N, E) standardized features; the last is 1.
        log_p: (L, F, A, N, K) log-probabilities of each fold's probes for all samples.
        targets: (A, N) class ids.
        fold: (N,) test fold of each sample.
        c: (L, F) inverse strength of the penalty.
    """

    x: Tensor
    log_p: Tensor
    targets: Tensor
    fold: Tensor
    c: Tensor

    def layer(self, index: int) -> "LayerCrossFit":
        """The probes of one layer."""
        x_ND, classes_K = self.x[index, :, :-1], torch.arange(self.log_p.shape[4], device=self.x.device)
        one_hot_NAH = _logits_of((self.targets.T[..., None] == classes_K).to(x_ND))
        p_FNAH = _logits_of(self.log_p[index].exp()).transpose(1, 2)
        curvature_F = (p_FNAH * (1 - p_FNAH)).mean((1, 2, 3)).clamp_min(_LEAST_CURVATURE)
        # Exact for one logit; for more, the softmax's where all classes are equally likely.
        curvature_F = curvature_F * (p_FNAH.shape[3] / max(p_FNAH.shape[3] - 1, 1))
        folds = [(self.fold == number, self.fold != number) for number in range(len(p_FNAH))]
        responses = _responses(x_ND, folds, curvature_F.tolist(), (1 / self.c[index]).tolist())
        return LayerCrossFit(folds, responses, self.log_p[index].transpose(1, 2), p_FNAH, one_hot_NAH)


@dataclass(frozen=True, eq=False)
class LayerCrossFit:
    """Cross-fitted probes of one layer.

    Args:
        folds: Of each fold, (N,) which samples are tested, and which train.
        responses: Of each fold, (S, R) change of the test samples' logits per unit of the training samples' residuals.
        log_p: (F, N, A, K) log-probabilities of each fold's probes for all samples.
        p: (F, N, A, H) probabilities of the classes that have a logit.
        one_hot: (N, A, H) 1 at a sample's class; for two classes, of the second.
    """

    folds: list[tuple[Tensor, Tensor]]
    responses: list[Tensor]
    log_p: Tensor
    p: Tensor
    one_hot: Tensor

    def reweighted(self, change_BN: Tensor) -> Tensor:
        """(B, A, N, K) held-out log-probabilities after training with other weights.

        Args:
            change_BN: Change of each sample's weight in the training data, which is 1.
        """
        found_NBAK = self._empty(len(change_BN))
        for (test_N, train_N), response_SR, log_p_NAK, p_NAH in zip(
            self.folds, self.responses, self.log_p, self.p, strict=True
        ):
            residual_RAH, change_RB = (self.one_hot - p_NAH)[train_N], change_BN.T[train_N].to(p_NAH)
            shift_SBAH = _product(response_SR, change_RB[..., None, None] * residual_RAH[:, None])
            found_NBAK[test_N] = _shifted(log_p_NAK[test_N][:, None], shift_SBAH)
        return found_NBAK.permute(1, 2, 0, 3)

    def relabeled(self, rows_BN: Tensor) -> Tensor:
        """(B, A, N, K) held-out log-probabilities after training on exchanged labels.

        Args:
            rows_BN: The sample whose labels each sample gets; of its own fold.
        """
        found_NBAK = self._empty(len(rows_BN))
        for (test_N, train_N), response_SR in zip(self.folds, self.responses, strict=True):
            prior_AH = self.one_hot[train_N].mean(0)
            shift_SBAH = _product(response_SR, (self.one_hot - prior_AH)[rows_BN.T[train_N]])
            found_NBAK[test_N] = _shifted(_with_complement(prior_AH).log(), shift_SBAH)
        return found_NBAK.permute(1, 2, 0, 3)

    def _empty(self, draws: int) -> Tensor:
        num_samples, *rest = self.log_p.shape[1:]
        return self.log_p.new_empty(num_samples, draws, *rest)


def _responses(
    x_ND: Tensor, folds: list[tuple[Tensor, Tensor]], curvatures: list[float], penalties: list[float]
) -> list[Tensor]:
    """Of each fold, (S, R) change of the test samples' logits per unit of the training samples' residuals.

    With features centered on the training samples it is X_S (w X_R' X_R + penalty)^-1 X_R', by the smaller of X'X and
    XX', and 1 / (w n) for the bias, which has no penalty; w is the mean second derivative of the loss by the logit.
    """
    num_samples, num_features = x_ND.shape
    gram_NN = x_ND @ x_ND.mT if num_features > num_samples else None
    found = []
    for (test_N, train_N), w, penalty in zip(folds, curvatures, penalties, strict=True):
        exact = float(x_ND.square().sum()) * w > _SINGLE_PRECISION * penalty
        dtype = torch.float64 if exact else x_ND.dtype
        bias = 1 / (w * int(train_N.sum()))
        if gram_NN is None:
            centered_ND = (x_ND - x_ND[train_N].mean(0)).to(dtype)
            x_SD, x_RD = centered_ND[test_N], centered_ND[train_N]
            inverse_DD = _inverse(x_RD.mT @ x_RD * w, penalty)
            response_SR = x_SD @ inverse_DD @ x_RD.mT
        else:
            gram_NR = gram_NN[:, train_N].to(dtype)
            gram_NR = gram_NR - gram_NR.mean(1, keepdim=True)
            gram_NR = gram_NR - gram_NR[train_N].mean(0)
            response_SR = gram_NR[test_N] @ _inverse(gram_NR[train_N] * w, penalty)
        found.append(response_SR.to(x_ND) + bias)
    return found


def _inverse(matrix: Tensor, penalty: float) -> Tensor:
    """Inverse of a positive semidefinite matrix plus the penalty."""
    matrix.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def _product(response_SR: Tensor, values_RBAH: Tensor) -> Tensor:
    """(S, B, A, H)."""
    return (response_SR @ values_RBAH.flatten(1)).unflatten(1, values_RBAH.shape[1:])


def _logits_of(values_K: Tensor) -> Tensor:
    """(..., H) the values of the classes that have a logit of their own."""
    return values_K[..., 1:] if values_K.shape[-1] == 2 else values_K


def _with_complement(p_H: Tensor) -> Tensor:
    """(..., K) probabilities of all classes."""
    return torch.cat([1 - p_H, p_H], -1) if p_H.shape[-1] == 1 else p_H


def _shifted(log_p_K: Tensor, shift_H: Tensor) -> Tensor:
    """(..., K) log-probabilities after a change of the logits."""
    if shift_H.shape[-1] == 1:
        shift_H = F.pad(shift_H, (1, 0))
    return (log_p_K + shift_H).log_softmax(-1)
