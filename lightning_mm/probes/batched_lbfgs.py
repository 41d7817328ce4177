"""L-BFGS on many smooth convex problems at once, with a line search and a stopping test of its own for each.

Data flow: ``logistic`` gives value and gradient of all problems at all points, and an approximate inverse Hessian ->
``minimize`` -> the minimum of each problem, and whether it converged.

Shapes: B problems, M unknowns per problem.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

_MEMORY = 6
"""Step and gradient-difference pairs that are kept."""

_HALVINGS = 12
"""Trial steps of a line search."""

_SUFFICIENT = 1e-4
"""Armijo's constant: share of the decrease predicted by the gradient that a step must achieve."""

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(B, M) points -> (B,) values and (B, M) gradients."""


class OptimizeResult(NamedTuple):
    """Result of ``minimize``.

    Args:
        point: (B, M) minimizers.
        value: (B,) objective there.
        steps: (B,) number of steps.
        converged: (B,) whether the gradient is within the tolerance.
    """

    point: Tensor
    value: Tensor
    steps: Tensor
    converged: Tensor


def minimize(
    evaluate: Evaluate,
    start_BM: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    tolerance: float,
    max_steps: int,
) -> OptimizeResult:
    """Minimize every problem from its start (Nocedal and Wright 2006, algorithm 7.5, with backtracking).

    Args:
        evaluate: Values and gradients of all problems at given points.
        start_BM: Initial points.
        precondition: (B, M) gradients -> their product with an approximate inverse Hessian, positive definite.
        tolerance: A problem stops once no entry of its gradient is larger.
        max_steps: A problem that has not stopped by then is returned as not converged.
    """
    point, (value, gradient) = start_BM, evaluate(start_BM)
    steps = torch.zeros(value.shape, dtype=torch.int64, device=value.device)
    stuck = torch.zeros_like(steps, dtype=torch.bool)
    history: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_MEMORY)
    for _ in range(max_steps):
        running = (gradient.abs().amax(1) > tolerance) & ~stuck
        if not running.any():
            break
        direction = _inverse_hessian_times(gradient, history, precondition).mul_(-running[:, None].to(gradient))
        new_point, new_value, new_gradient, failed = _line_search(evaluate, point, value, gradient, direction)
        step, change = new_point - point, new_gradient - gradient
        curvature = vecdot(step, change)
        history.append((step, change, torch.where(curvature > 0, 1 / curvature, 0.0)))
        point, value, gradient = new_point, new_value, new_gradient
        steps += running & ~failed
        stuck |= failed
    return OptimizeResult(point, value, steps, gradient.abs().amax(1) <= tolerance)


def _inverse_hessian_times(
    gradient: Tensor, history: deque[tuple[Tensor, Tensor, Tensor]], precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """Two-loop recursion, scaled to the last step's curvature; steps of length zero have no effect."""
    q, weights = gradient.clone(), []
    for step, change, inverse in reversed(history):
        weights.append(inverse * vecdot(step, q))
        q.addcmul_(weights[-1][:, None], change, value=-1)
    q = precondition(q)
    if history:
        step, change, inverse = history[-1]
        predicted = vecdot(change, precondition(change))
        q.mul_(torch.where(inverse > 0, vecdot(step, change) / predicted, 1.0)[:, None])
    for (step, change, inverse), weight in zip(history, reversed(weights), strict=True):
        q.addcmul_((weight - inverse * vecdot(change, q))[:, None], step)
    return q


def _line_search(
    evaluate: Evaluate, point: Tensor, value: Tensor, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Halve each problem's step until the value decreases enough; an increase within rounding is accepted.

    Returns:
        Points, values, gradients, and (B,) which problems found no step: their point is unchanged.
    """
    slope = vecdot(gradient, direction)
    slack = 10 * torch.finfo(value.dtype).eps * value.abs()
    length = torch.ones_like(value)
    for _ in range(_HALVINGS):
        new_point = torch.addcmul(point, length[:, None], direction)
        new_value, new_gradient = evaluate(new_point)
        failed = ~(new_value <= value + _SUFFICIENT * length * slope + slack)
        if not failed.any():
            return new_point, new_value, new_gradient, failed
        length = torch.where(failed, length / 2, length)
    kept = failed[:, None]
    return (
        torch.where(kept, point, new_point),
        torch.where(failed, value, new_value),
        torch.where(kept, gradient, new_gradient),
        failed,
    )
