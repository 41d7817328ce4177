"""Logistic regression on all layers at once, for all values of C, splits and tasks.

Data flow: features (L, N, D) + ``Problems`` -> ``solve`` -> ``LinearProbes``; ``fit_multinomial`` and
``fit_multilabel`` are the plain cases. The objective is scikit-learn's: C * sum of cross-entropies + half the squared
norm of the weights, bias free; two classes have one logit, more have one each.

Shapes: L layers, N samples, D features, E = D + 1 with a constant, P problems per layer, H logits per problem,
K classes or labels.

Blocks of layers worked on side by side: one thread for each core, none within an operation.

Data flow: ``protocol`` hands over what is to be done with a block of layers and gets the results in order.

Probing is a long chain of small operations. Shared among cores, each of them waits for the slowest core, for ever where
another process has it; kept to one core each, blocks wait for nobody, and results do not depend on the number of cores.

Shapes: L layers.
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
from lightning_mm.probes.batched_lbfgs import minimise
from lightning_mm.probes.cross_entropy import Features, Objective, Problems, preconditioner

TOLERANCE = 1e-4
"""Largest entry of the gradient of the objective over C and the number of training rows: scikit-learn's ``tol``."""

MAX_STEPS = 1000

_FEATURE_BYTES = {"cpu": 16 << 20, "cuda": 4 << 30}
_WEIGHT_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}
_COLUMNS = {"cpu": 64, "cuda": 1024}
"""So much is worked on at once, features, weights and logits per layer: what a CPU's cache and a GPU's memory hold."""

_ENOUGH = 4
"""Fewer columns at once cost as much time as this many."""


@dataclass(frozen=True, eq=False)
class LinearProbes:
    """Fitted weights.

    Args:
        weight: (L, P, H, E) on the features that they were fitted to, the last the bias.
        objective: (L, P) C * cross-entropy + half the squared norm of the (standardised) weights.
        steps: (L, P) steps taken.
        converged: (L, P) whether the tolerance was reached.
    """

    weight: Tensor
    objective: Tensor
    steps: Tensor
    converged: Tensor

    @exact_products()
    def logits(self, x_LNE: Tensor) -> Tensor:
        """(L, P, N, H), for rows of ``Features.x``."""
        return (self.weight.flatten(1, 2) @ x_LNE.mT).unflatten(1, self.weight.shape[1:3]).mT

    def log_probabilities(self, x_LNE: Tensor) -> Tensor:
        """(L, P, N, K); K is 2 where there is one logit."""
        logits = self.logits(x_LNE)
        return F.logsigmoid(torch.cat([-logits, logits], -1)) if logits.shape[-1] == 1 else logits.log_softmax(-1)


def num_logits(num_classes: int) -> int:
    """Two classes have one logit between them."""
    return num_classes if num_classes > 2 else 1


def fit_multinomial(
    x_LND: Tensor, labels_N: Tensor, c_values: Sequence[float], *, tolerance: float = TOLERANCE
) -> LinearProbes:
    """One classifier per layer and value of C, on the features as they are; its weights apply to these and a 1.

    Args:
        x_LND: Features; float64 is solved in float64, anything else in float32.
        labels_N: Class ids 0 to K - 1.
        c_values: P of them.
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
    """One yes-or-no classifier per layer, value of C and label; problems are ordered by C, then label.

    Args:
        x_LND: Features; float64 is solved in float64, anything else in float32.
        labels_NK: {0, 1}.
        c_values: P / K of them.
        tolerance: See ``TOLERANCE``.
    """
    c_P = torch.tensor(c_values, dtype=torch.float64).repeat_interleave(labels_NK.shape[1])
    return _fit_all_rows(x_LND, labels_NK.T.long().repeat(len(c_values), 1), c_P, 1, tolerance)


@exact_products()
def _fit_all_rows(x_LND: Tensor, targets_PN: Tensor, c_P: Tensor, logits: int, tolerance: float) -> LinearProbes:
    features = Features.of(x_LND, standardise=False)
    problems = Problems(targets_PN, torch.ones_like(targets_PN, dtype=torch.bool), c_P[None], logits)
    probes = solve(features, problems, standardise=False, tolerance=tolerance)
    weight_LPHE = probes.weight.clone()
    weight_LPHE[..., -1] -= (weight_LPHE[..., :-1] @ features.mean[:, None, :, None])[..., 0]
    return replace(probes, weight=weight_LPHE)


@exact_products()
def solve(
    features: Features,
    problems: Problems,
    *,
    standardise: bool,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> LinearProbes:
    """Fit every problem in every layer.

    Args:
        features: Shared by all problems.
        problems: What to fit.
        standardise: Each problem gives its training rows mean 0 and variance 1; constant features have no say.
        tolerance: See ``TOLERANCE``.
        max_steps: Of L-BFGS.
    """
    num_rows, by_layer = problems.num_rows, []
    for layers, parts in _blocks(features.x, problems):
        block, fits = features.part(layers, num_rows), []
        for part in parts:
            objective = Objective.of(block.x, problems.part(layers, part, num_rows), standardise)
            inverse_hessian = preconditioner(block, objective)
            found = minimise(objective, objective.start, inverse_hessian, tolerance=tolerance, max_steps=max_steps)
            value, steps, converged = (one.view_as(objective.penalty) for one in found[1:])
            fits.append((objective.on_features(found.point), value / objective.penalty, steps, converged))
        by_layer.append([torch.cat(pieces, 1) for pieces in zip(*fits, strict=True)])
    return LinearProbes(*(torch.cat(pieces) for pieces in zip(*by_layer, strict=True)))


def _blocks(x_LNE: Tensor, problems: Problems) -> Iterator[tuple[slice, list[slice]]]:
    """Which layers and problems are solved together.

    Problems with the same C take about the same steps: where there are enough of them, they are not mixed with others.
    """
    device, (num_problems, num_samples) = x_LNE.device.type, problems.targets.shape
    widest = max(_COLUMNS[device] // problems.num_logits, 1)
    same_c = torch.unique_consecutive(problems.c, dim=1, return_counts=True)[1]
    run = int(same_c.min()) if int(same_c.min()) * problems.num_logits >= _ENOUGH else num_problems
    width = min(run, widest)
    starts = [
        first for start in range(0, num_problems, run) for first in range(start, min(start + run, num_problems), width)
    ]
    parts = [slice(first, last) for first, last in pairwise([*starts, num_problems])]
    weight_bytes = 4 * width * problems.num_logits * x_LNE.shape[2]
    height = min(_FEATURE_BYTES[device] // (4 * num_samples * x_LNE.shape[2]), _WEIGHT_BYTES[device] // weight_bytes)
    for first in range(0, len(x_LNE), max(height, 1)):
        yield slice(first, first + max(height, 1)), parts


_LAYERS = 8
"""More at once bring nothing but memory."""

Result = TypeVar("Result")


def by_layers(work: Callable[[slice], Result], num_layers: int, device: torch.device) -> list[Result]:
    """What ``work`` makes of each block of layers, in order; a GPU does them one after the other.

    Example:
        >>> by_layers(lambda layers: layers.start, 20, torch.device("cuda"))
        [0, 8, 16]
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    size = max(1, min(_LAYERS, math.ceil(num_layers / threads)))
    blocks = [slice(start, start + size) for start in range(0, num_layers, size)]
    if device.type != "cpu":
        return [work(block) for block in blocks]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, blocks))
    finally:
        torch.set_num_threads(threads)
