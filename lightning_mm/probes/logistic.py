"""Logistic regression on all layers at once, for all values of C, folds and tasks.

The objective is scikit-learn's: C * sum of cross-entropies + half the squared norm of the weights, bias unpenalized;
two classes have one logit, more have one each.

Data flow: features (L, N, D) + ``LogisticProblems`` -> ``fit_problems`` -> ``LinearProbes``; ``fit_multinomial`` and
``fit_multilabel`` are the cases without folds. ``probe`` fits blocks of layers in parallel by ``map_layer_blocks``.

Shapes: L layers, N samples, D features, E = D + 1 with a constant, P problems per layer, H logits per problem,
K classes or labels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mm.geometry.representations import exact_products
from lightning_mm.probes.batched_lbfgs import minimize
from lightning_mm.probes.cross_entropy import LogisticLoss, LogisticProblems, ProbeFeatures, preconditioner

TOLERANCE = 1e-4
"""Largest entry of the gradient of the objective over C and the number of training rows: scikit-learn's ``tol``."""

MAX_STEPS = 1000

_FEATURE_BYTES = {"cpu": 16 << 20, "cuda": 4 << 30}
_WEIGHT_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}
_COLUMNS = {"cpu": 64, "cuda": 1024}
"""Size of one batch of problems (features, weights, logits per layer): what a CPU cache or GPU memory holds."""

_MIN_COLUMNS = 4
"""Fewer columns at once take as long as this many."""

_LAYERS_PER_BLOCK = 8
"""Larger blocks take more memory and no less time."""

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class LinearProbes:
    """Fitted weights.

    Args:
        weight: (L, P, H, E) weights on the features that they were fitted to; the last is the bias.
        objective: (L, P) C * cross-entropy + half the squared norm of the (standardized) weights.
        steps: (L, P) L-BFGS steps.
        converged: (L, P) whether the tolerance was reached.
    """

    weight: Tensor
    objective: Tensor
    steps: Tensor
    converged: Tensor

    @exact_products()
    def logits(self, x_LNE: Tensor) -> Tensor:
        """(L, P, N, H) logits for rows of ``ProbeFeatures.x``."""
        return (self.weight.flatten(1, 2) @ x_LNE.mT).unflatten(1, self.weight.shape[1:3]).mT

    def log_probabilities(self, x_LNE: Tensor) -> Tensor:
        """(L, P, N, K) log-probabilities for rows of ``ProbeFeatures.x``; K is 2 where there is one logit."""
        logits = self.logits(x_LNE)
        return F.logsigmoid(torch.cat([-logits, logits], -1)) if logits.shape[-1] == 1 else logits.log_softmax(-1)


def num_logits(num_classes: int) -> int:
    """Logits of a problem: one for two classes, else one per class."""
    return num_classes if num_classes > 2 else 1


def fit_multinomial(
    x_LND: Tensor, labels_N: Tensor, c_values: Sequence[float], *, tolerance: float = TOLERANCE
) -> LinearProbes:
    """One classifier per layer and value of C, on the unscaled features with a constant 1 appended.

    Args:
        x_LND: Features; float64 is solved in float64, anything else in float32.
        labels_N: Class ids 0 to K - 1.
        c_values: Inverse strengths of the penalty; P of them.
        tolerance: See ``TOLERANCE``.

    Example:
        >>> x, labels = torch.tensor([[[-2.0], [-1.0], [1.0], [2.0]]]), torch.tensor([0, 0, 1, 1])
        >>> probes = fit_multinomial(x, labels, [1.0])
        >>> probes.logits(torch.tensor([[[-3.0, 1.0], [3.0, 1.0]]])).sign().flatten().tolist()
        [-1.0, 1.0]
    """
    c_P = torch.tensor(c_values, dtype=torch.float64)
    return _fit_all_rows(x_LND, labels_N.expand(len(c_P), -1), c_P, num_logits(int(labels_N.max()) + 1), tolerance)


def fit_multilabel(
    x_LND: Tensor, labels_NK: Tensor, c_values: Sequence[float], *, tolerance: float = TOLERANCE
) -> LinearProbes:
    """One binary classifier per layer, value of C and label; problems are ordered by C, then label.

    Args:
        x_LND: Features; float64 is solved in float64, anything else in float32.
        labels_NK: {0, 1}.
        c_values: Inverse strengths of the penalty; P / K of them.
        tolerance: See ``TOLERANCE``.
    """
    c_P = torch.tensor(c_values, dtype=torch.float64).repeat_interleave(labels_NK.shape[1])
    return _fit_all_rows(x_LND, labels_NK.T.long().repeat(len(c_values), 1), c_P, 1, tolerance)


@exact_products()
def _fit_all_rows(x_LND: Tensor, targets_PN: Tensor, c_P: Tensor, logits: int, tolerance: float) -> LinearProbes:
    features = ProbeFeatures.of(x_LND, standardize=False)
    problems = LogisticProblems(targets_PN, torch.ones_like(targets_PN, dtype=torch.bool), c_P[None], logits)
    probes = fit_problems(features, problems, standardize=False, tolerance=tolerance)
    weight_LPHE = probes.weight.clone()
    weight_LPHE[..., -1] -= (weight_LPHE[..., :-1] @ features.mean[:, None, :, None])[..., 0]
    return replace(probes, weight=weight_LPHE)


@exact_products()
def fit_problems(
    features: ProbeFeatures,
    problems: LogisticProblems,
    *,
    standardize: bool,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> LinearProbes:
    """Fit every problem in every layer.

    Args:
        features: Features shared by all problems.
        problems: Targets, training rows and C of each problem.
        standardize: Scale each problem's training rows to mean 0 and variance 1; constant features get no weight.
        tolerance: See ``TOLERANCE``.
        max_steps: Largest number of L-BFGS steps.
    """
    num_rows, by_layer = problems.num_rows, []
    for layers, parts in _blocks(features.x, problems):
        block, fits = features.subset(layers, num_rows), []
        for part in parts:
            objective = LogisticLoss.of(block.x, problems.subset(layers, part, num_rows), standardize)
            inverse_hessian = preconditioner(block, objective)
            found = minimize(objective, objective.start, inverse_hessian, tolerance=tolerance, max_steps=max_steps)
            value, steps, converged = (one.view_as(objective.penalty) for one in found[1:])
            fits.append((objective.on_features(found.point), value / objective.penalty, steps, converged))
        by_layer.append([torch.cat(pieces, 1) for pieces in zip(*fits, strict=True)])
    return LinearProbes(*(torch.cat(pieces) for pieces in zip(*by_layer, strict=True)))


def _blocks(x_LNE: Tensor, problems: LogisticProblems) -> Iterator[tuple[slice, list[slice]]]:
    """Layers and problems that are solved together.

    Problems with the same C take about as many steps: where there are enough of them, they are not mixed with others.
    """
    device, (num_problems, num_samples) = x_LNE.device.type, problems.targets.shape
    widest = max(_COLUMNS[device] // problems.num_logits, 1)
    same_c = torch.unique_consecutive(problems.c, dim=1, return_counts=True)[1]
    run = int(same_c.min()) if int(same_c.min()) * problems.num_logits >= _MIN_COLUMNS else num_problems
    width = min(run, widest)
    starts = [
        first for start in range(0, num_problems, run) for first in range(start, min(start + run, num_problems), width)
    ]
    parts = [slice(first, last) for first, last in pairwise([*starts, num_problems])]
    weight_bytes = 4 * width * problems.num_logits * x_LNE.shape[2]
    height = min(_FEATURE_BYTES[device] // (4 * num_samples * x_LNE.shape[2]), _WEIGHT_BYTES[device] // weight_bytes)
    for first in range(0, len(x_LNE), max(height, 1)):
        yield slice(first, first + max(height, 1)), parts


def map_layer_blocks(work: Callable[[slice], Result], num_layers: int, device: torch.device) -> list[Result]:
    """Results of a function for each block of layers, in order.

    On a CPU each core works on one block with one thread; on a GPU blocks run one after the other. Probing is a chain
    of small operations: if each is split among cores, it waits for the slowest core, which may be busy with another
    process. The result does not depend on the number of cores.

    Args:
        work: Function of a slice of layers.
        num_layers: L.
        device: Where the features are.

    Example:
        >>> map_layer_blocks(lambda layers: layers.start, 20, torch.device("cuda"))
        [0, 8, 16]
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    size = max(1, min(_LAYERS_PER_BLOCK, math.ceil(num_layers / threads)))
    blocks = [slice(start, start + size) for start in range(0, num_layers, size)]
    if device.type != "cpu":
        return [work(block) for block in blocks]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, blocks))
    finally:
        torch.set_num_threads(threads)
