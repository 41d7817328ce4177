"""Logistic regression with an L1 penalty, which leaves most features out.

Data flow: standardised features, a column of ones for the bias -> ``fit_l1`` -> weights, for ``predictor``.

The objective is that of scikit-learn's liblinear, the bias penalised as any weight: ||w||_1 + C sum_i log(1 + exp(-y_i
w.x_i)). It is solved by accelerated proximal gradient steps (FISTA, Beck and Teboulle 2009).

Shapes: Q questions, F features.
"""

import math

import torch
from torch import Tensor

from lightning_mm.decisions import decide

C = 0.05
"""Of 2406.04236, for hundreds of questions and more; fewer need a larger one (``strength``)."""


def strength(num_questions: int, num_features: int) -> float:
    """C = 0.05, or more where that would leave out every feature there could be.

    A standardised feature gets a weight once its mean product with the answers exceeds 2 / (C n), which no feature does
    at C = 0.05 and n = 40. The best of F features of noise reaches about sqrt(2 ln F / n); C is such that half of it
    suffices, which for the 500 questions and 1,024 heads of a 7B model is the 0.05 of 2406.04236.

    Args:
        num_questions: n that are learned from.
        num_features: F.

    Example:
        >>> round(strength(500, 1024), 3), round(strength(20, 270), 2)
        (0.05, 0.27)
    """
    found = max(C, 4 / math.sqrt(2 * num_questions * math.log(max(num_features, 2))))
    if found > C:
        decide("causal.predictor.c", f"{found:.2g}", f"{num_questions} questions are too few for {C}")
    return found


def fit_l1(x_QF: Tensor, right_Q: Tensor, c: float = C, tolerance: float = 1e-9, max_steps: int = 20000) -> Tensor:
    """(F,) float64 weights of the L1-penalised logistic regression (module docstring), without a bias of its own.

    Args:
        x_QF: Features; a column of ones makes a bias, penalised as liblinear does.
        right_Q: {0, 1}.
        c: Weight of the likelihood.
        tolerance: Largest change of a weight at which the steps end, relative to the largest weight or 1.
        max_steps: At most so many.

    Example:
        >>> x = torch.tensor([[-2.0, 0.1], [-1.0, -0.1], [1.0, 0.1], [2.0, -0.1]])
        >>> fit_l1(x, torch.tensor([0, 0, 1, 1]), 1.0) > 0
        tensor([ True, False])
    """
    x_QF, sign_Q = x_QF.double(), right_Q.double() * 2 - 1
    # The logistic loss curves by a quarter at most.
    step = 4 / (c * torch.linalg.matrix_norm(x_QF, 2).square().clamp_min(1e-12))
    weight_F = ahead_F = x_QF.new_zeros(x_QF.shape[1])
    momentum = 1.0
    for _ in range(max_steps):
        slope_F = -c * (sign_Q * torch.sigmoid(-sign_Q * (x_QF @ ahead_F))) @ x_QF
        moved_F = torch.nn.functional.softshrink(ahead_F - step * slope_F, float(step))
        change_F = moved_F - weight_F
        # Momentum that leads uphill is dropped (O'Donoghue and Candes 2015).
        if (ahead_F - moved_F) @ change_F > 0:
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead_F = moved_F + (momentum - 1) / following * change_F
        weight_F, momentum = moved_F, following
        if change_F.abs().max() <= tolerance * weight_F.abs().max().clamp_min(1):
            break
    return weight_F
