"""Objective of logistic regression for many problems on the same features, and its approximate inverse Hessian.

Every problem is standardized with its own training rows, yet all share one feature tensor, so that one matmul serves
all: the scale is moved from the features to the weights, and the mean to the bias, which is unpenalized. Hidden states
have steep spectra: the inverse Hessian in the leading directions of the features, where L-BFGS starts, saves most
steps.

Data flow: features (L, N, D) -> ``ProbeFeatures``; ``LogisticProblems`` -> ``LogisticLoss``, ``preconditioner`` ->
``batched_lbfgs.minimize``.

Shapes: L layers, N samples, D features, P problems per layer, H logits per problem, C = P * H, R leading directions,
E = D + 1 features and a constant, B = L * P, M = H * E unknowns per problem, S rows for the leading directions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_DIRECTIONS, _ROWS = 64, 256
"""Number of leading directions, and of rows that they are computed from."""

_ROUNDING = 1e-6
"""A feature whose standard deviation is below this share of its mean is constant; so is, among training rows, one whose
variance is below ten times this share of its mean square."""


@dataclass(frozen=True, eq=False)
class LogisticProblems:
    """P logistic regressions on the same features.

    Args:
        targets: (P, N) class ids.
        train: (P, N) bool, the training rows of each; at least one.
        c: (L, P) or (1, P) inverse strength of the penalty. Consecutive problems with the same C are solved together.
        num_logits: 1 for two classes, K for K > 2.
    """

    targets: Tensor
    train: Tensor
    c: Tensor
    num_logits: int

    def subset(self, layers: slice, problems: slice, num_rows: int) -> "LogisticProblems":
        """Some layers and problems, and the first rows."""
        c = self.c[layers] if len(self.c) > 1 else self.c
        targets, train = self.targets[problems, :num_rows], self.train[problems, :num_rows]
        return LogisticProblems(targets, train, c[:, problems], self.num_logits)

    @property
    def num_rows(self) -> int:
        """Number of rows up to the last training row of any problem."""
        return int(torch.where(self.train.any(0))[0].max()) + 1


@dataclass(frozen=True, eq=False)
class ProbeFeatures:
    """Centered, optionally scaled, features with their leading principal directions.

    Args:
        x: (L, N, E) float32 or float64; the last feature is 1.
        mean: (L, D) the mean that was subtracted.
        scale: (L, D) the standard deviation that was divided by; 1 without scaling.
        directions: (L, E, R) orthonormal principal directions, zero for the constant.
        variances: (L, R) variances along them, ascending.
    """

    x: Tensor
    mean: Tensor
    scale: Tensor
    directions: Tensor
    variances: Tensor

    @classmethod
    def of(cls, x_LND: Tensor, standardize: bool) -> "ProbeFeatures":
        """Center, and scale if ``standardize``, by the mean and standard deviation of all rows.

        Test rows leak nothing by this: with ``standardize``, ``LogisticLoss`` applies each problem's own on top.
        """
        x_LND = as_float(x_LND)
        num_layers, num_samples, num_features = x_LND.shape
        mean_LD = x_LND.mean(1)
        x_LNE = x_LND.new_ones(num_layers, num_samples, num_features + 1)
        centered_LND = x_LNE[..., :-1]
        torch.sub(x_LND, mean_LD[:, None], out=centered_LND)
        scale_LD = torch.ones_like(mean_LD)
        if standardize:
            spread_LD = centered_LND.square().mean(1).sqrt()
            # Dividing by infinity makes a constant feature zero, and so its weight.
            scale_LD = torch.where(spread_LD > _ROUNDING * mean_LD.abs(), spread_LD, torch.inf)
            centered_LND /= scale_LD[:, None]
        return cls(x_LNE, mean_LD, scale_LD, *_leading_directions(x_LNE))

    def subset(self, layers: slice, num_rows: int) -> "ProbeFeatures":
        """Views of some layers and the first rows."""
        directions, variances = self.directions[layers], self.variances[layers]
        return ProbeFeatures(self.x[layers, :num_rows], self.mean[layers], self.scale[layers], directions, variances)


def as_float(x_LND: Tensor) -> Tensor:
    """The detached features as float64 if they are float64, otherwise as float32."""
    return x_LND.detach() if x_LND.dtype == torch.float64 else x_LND.detach().float()


def _leading_directions(x_LNE: Tensor) -> tuple[Tensor, Tensor]:
    """(L, E, R) principal directions and (L, R) variances of some of the rows: enough for a preconditioner."""
    some_LSE = x_LNE[:, :: max(x_LNE.shape[1] // _ROWS, 1)]
    num_directions = min(_DIRECTIONS, some_LSE.shape[1], x_LNE.shape[2] - 1)
    some_LSE = torch.cat([some_LSE[..., :-1], torch.zeros_like(some_LSE[..., -1:])], -1)
    squares_LS, left_LSS = torch.linalg.eigh(some_LSE @ some_LSE.mT)
    squares_LR, left_LSR = squares_LS[:, -num_directions:], left_LSS[..., -num_directions:]
    # Directions of zero length are divided by the rounding error of the longest and stay short.
    lengths_LR = squares_LR.clamp_min(squares_LS[:, -1:] * 1e-6 + 1e-30).sqrt()
    return some_LSE.mT @ (left_LSR / lengths_LR[:, None]), squares_LR.clamp_min(0) / some_LSE.shape[1]


@dataclass(frozen=True, eq=False)
class LogisticLoss:
    """Mean cross-entropy + half the squared norm of the (standardized) weights over C * n, for n training rows.

    Args:
        x: (L, N, E) features.
        inverse_scale: (L, P, E) inverse standard deviation of each problem's training rows; 1 for the constant.
        truth: (P, H, N) 1 where a logit's class is the true one.
        share: (P, N) 1 / n on training rows, 0 elsewhere.
        penalty: (L, P) 1 / (C * n).
        priors: (P, H) class frequencies of the training rows plus one pseudo-row spread over all classes.
    """

    x: Tensor
    inverse_scale: Tensor
    truth: Tensor
    share: Tensor
    penalty: Tensor
    priors: Tensor

    @classmethod
    def of(cls, x_LNE: Tensor, problems: LogisticProblems, standardize: bool) -> "LogisticLoss":
        """The objective of problems on ``ProbeFeatures.x``; ``standardize`` scales by each problem's training rows."""
        n_P = problems.train.sum(1)
        share_PN = problems.train.to(x_LNE) / n_P[:, None]
        mean_LPE = share_PN @ x_LNE
        inverse_LPE = torch.ones_like(mean_LPE)
        if standardize:
            square_LPE = share_PN @ x_LNE.square()
            variance_LPE = square_LPE - mean_LPE.square()
            inverse_LPE = torch.where(variance_LPE > 10 * _ROUNDING * square_LPE, variance_LPE, 1.0).rsqrt()
        inverse_LPE[..., -1] = 1
        classes_H = torch.arange(problems.num_logits, device=x_LNE.device) + (problems.num_logits == 1)
        truth_PHN = (problems.targets[:, None] == classes_H[:, None]).to(x_LNE)
        count_PH = (truth_PHN * problems.train[:, None]).sum(2)
        priors_PH = (count_PH + 1 / max(problems.num_logits, 2)) / (n_P[:, None] + 1)
        penalty_LP = (1 / (problems.c.to(n_P.device) * n_P)).to(x_LNE).expand(len(x_LNE), -1)
        return cls(x_LNE, inverse_LPE, truth_PHN, share_PN, penalty_LP, priors_PH)

    @property
    def start(self) -> Tensor:
        """(L * P, M) initial point: zero weights, and the biases that predict the priors."""
        log_PH = self.priors.log()
        bias_PH = self.priors.logit() if log_PH.shape[1] == 1 else log_PH - log_PH.mean(1, keepdim=True)
        start_LPHE = self.x.new_zeros((*self.penalty.shape, bias_PH.shape[1], self.x.shape[2]))
        start_LPHE[..., -1] = bias_PH
        return start_LPHE.view(-1, start_LPHE[0, 0].numel())

    def on_features(self, point_BM: Tensor) -> Tensor:
        """(L, P, H, E) weights and biases for the unscaled ``x``."""
        return point_BM.view(*self.penalty.shape, self.truth.shape[1], -1) * self.inverse_scale[:, :, None]

    def __call__(self, point_BM: Tensor) -> tuple[Tensor, Tensor]:
        """(L * P,) values and (L * P, M) gradients at ``point_BM``."""
        weight_LPHE = self.on_features(point_BM)
        shape = weight_LPHE.shape[:3]
        z_LPHN = (weight_LPHE.flatten(1, 2) @ self.x.mT).view(*shape, -1)
        if shape[2] == 1:
            # Not softplus(z) - z * truth, whose difference loses the digits of small losses.
            loss_LPN, chance_LPHN = F.softplus(z_LPHN * (1 - 2 * self.truth))[:, :, 0], z_LPHN.sigmoid()
        else:
            loss_LPN, chance_LPHN = z_LPHN.logsumexp(2) - (z_LPHN * self.truth).sum(2), z_LPHN.softmax(2)
        loss_LP = (loss_LPN * self.share).sum(-1)
        excess_LPHN = (chance_LPHN - self.truth).mul_(self.share[:, None])
        pull_LPHE = (excess_LPHN.flatten(1, 2) @ self.x).view(*shape, -1)
        penalized_LPHE = point_BM.view_as(pull_LPHE) * self.penalized
        pull_LPHE.mul_(self.inverse_scale[:, :, None]).addcmul_(penalized_LPHE, self.penalty[..., None, None])
        value_LP = loss_LP + penalized_LPHE.square().sum((2, 3)) * self.penalty / 2
        return value_LP.flatten(), pull_LPHE.view_as(point_BM)

    @property
    def penalized(self) -> Tensor:
        """(E,) 1 for weights, 0 for the bias."""
        return (torch.arange(self.x.shape[2], device=self.x.device) < self.x.shape[2] - 1).to(self.x)


def preconditioner(features: ProbeFeatures, objective: LogisticLoss) -> Callable[[Tensor], Tensor]:
    """Product with the approximate inverse Hessian at the start: (L * P, M) -> (L * P, M).

    Outside the leading directions all variances are set to the smallest leading one, an upper bound: a step that is too
    short costs a step, while one that is too long breaks the line search.
    """
    curvature_PH = objective.priors * (1 - objective.priors)
    variances_LPHR = curvature_PH[..., None] * features.variances[:, None, None]
    along_LPHR = 1 / (variances_LPHR + objective.penalty[..., None, None])
    elsewhere_LPH1 = along_LPHR.amax(-1, keepdim=True)
    extra_LCR = (along_LPHR - elsewhere_LPH1).flatten(1, 2)

    def apply(gradient_BM: Tensor) -> Tensor:
        gradient_LPHE = gradient_BM.view(*along_LPHR.shape[:3], -1)
        leading_LCR = gradient_LPHE.flatten(1, 2) @ features.directions * extra_LCR
        step_LPHE = (leading_LCR @ features.directions.mT).view_as(gradient_LPHE)
        step_LPHE.addcmul_(gradient_LPHE, elsewhere_LPH1)
        step_LPHE[..., -1] = gradient_LPHE[..., -1] / curvature_PH
        return step_LPHE.view_as(gradient_BM)

    return apply
