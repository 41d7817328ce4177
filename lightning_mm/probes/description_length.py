"""How briefly labels can be told to someone who has the representation: minimum description length by an online code.

Data flow: features (L, N, D) and labels -> probes learned from ever longer beginnings of the data -> the bits that the
labels of the next block cost (Voita and Titov 2020) -> compression, the bits of a code that knows nothing over these.

Probabilities are mixed with one imaginary sample spread over all classes, as no code may give a label none. C is not
chosen but paid for: the probability of all labels is the mean of what each C gives them, at most log2 of their number
in bits above the best.

Shapes: L layers, N samples, D features, A tasks (labels of a multi-label problem, otherwise 1), K classes, V values
of C.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.representations import exact_products
from lightning_mm.probes.cross_entropy import Features, Problems
from lightning_mm.probes.cross_validation import group_draws, hashed, num_groups
from lightning_mm.probes.intervals import estimates
from lightning_mm.probes.logistic import num_logits, solve
from lightning_mm.probes.result import unfinished

FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Where the blocks end."""

_FIRST = 10
"""The least samples that are learned from."""

_TOLERANCE = 1e-3
_DRAWS = 500


@exact_products()
def description_length(
    x_LND: Tensor, targets_AN: Tensor, num_classes: int, groups_N: Tensor, c_values: Sequence[float], *, seed: int
) -> list[Estimate]:
    """Compression of the labels, one Estimate per layer: 1 says nothing is gained, N / n_1 nothing is left to tell.

    Args:
        x_LND: Finite features that vary.
        targets_AN: Class ids of A tasks.
        num_classes: K of each task.
        groups_N: Groups are told in an order that hangs on their ids and the seed, each as a whole.
        c_values: Inverse strengths of the penalty.
        seed: Of order and bootstrap.

    Returns:
        With the compression by class frequencies alone as null, and an interval over groups given the probes.
    """
    order_N, ends = _blocks(groups_N, seed)
    rows_N, groups_N = order_N.to(x_LND.device), groups_N.cpu()[order_N]
    targets_AN, features = targets_AN[:, rows_N], Features.of(x_LND[:, rows_N], standardise=True)
    plain = math.log(num_classes)
    first = (len(c_values), len(x_LND), len(targets_AN), ends[0])
    log_p, share_L = [torch.full(first, -plain, dtype=torch.float64, device=x_LND.device)], torch.zeros(len(x_LND))
    null_AN = torch.full_like(targets_AN, plain, dtype=torch.float64)
    for start, end in pairwise(ends):
        told, finished_L = _next_block(features, targets_AN, num_classes, c_values, start, end)
        log_p.append(told)
        share_L = share_L + (1 - finished_L.cpu()) / (len(ends) - 1)
        null_AN[:, start:end] = -_frequencies(targets_AN, num_classes, start)[:, start:end].log()
    # The mean over C of the probability of all labels so far: a C that has told well weighs more in what follows.
    so_far_LAN = torch.cat(log_p, 3).cumsum(3).logsumexp(0) - math.log(len(c_values))
    nats_LAN = -so_far_LAN.diff(dim=2, prepend=torch.zeros_like(so_far_LAN[..., :1]))
    weights_BN = group_draws(groups_N, _DRAWS, seed).to(nats_LAN)
    draws_LB = plain * weights_BN.sum(1) / (nats_LAN.mean(1) @ weights_BN.T)
    n, groups, null = len(groups_N), num_groups(groups_N), plain / float(null_AN.mean())
    value_L = plain / nats_LAN.mean((1, 2))
    return unfinished(
        estimates(value_L, draws_LB, n=n, k=num_classes, groups=groups, most=math.inf, null=null), share_L
    )


def _blocks(groups_N: Tensor, seed: int) -> tuple[Tensor, list[int]]:
    """The order of the samples, and where blocks end: at the first whole group beyond each fraction."""
    order_N = torch.argsort(hashed(groups_N, seed), stable=True)
    _, sizes = torch.unique_consecutive(groups_N.cpu()[order_N], return_counts=True)
    ends_G, n = sizes.cumsum(0), len(groups_N)
    at = torch.searchsorted(ends_G, torch.tensor([fraction * n for fraction in FRACTIONS]).round().long())
    ends = torch.unique(ends_G[at.clamp_max(len(ends_G) - 1)])
    return order_N, ends[(ends >= _FIRST) | (ends == n)].tolist()


def _frequencies(targets_AN: Tensor, num_classes: int, start: int) -> Tensor:
    """(A, N) how frequent each sample's class is among the first ones, with the imaginary sample."""
    classes_K = torch.arange(num_classes, device=targets_AN.device)
    count_AK = (targets_AN[:, :start, None] == classes_K).sum(1)
    return ((count_AK + 1 / num_classes) / (start + 1)).gather(1, targets_AN)


def _next_block(
    features: Features, targets_AN: Tensor, num_classes: int, c_values: Sequence[float], start: int, end: int
) -> tuple[Tensor, Tensor]:
    """(V, L, A, samples of the block) log-probability of the right labels, by probes of all samples before.

    And (L,), which share of these probes has converged.
    """
    tasks, values = len(targets_AN), len(c_values)
    seen_AN = targets_AN[:, :start].repeat(values, 1)
    c_P = torch.tensor(c_values, dtype=torch.float64).repeat_interleave(tasks)
    problems = Problems(seen_AN, torch.ones_like(seen_AN, dtype=torch.bool), c_P[None], num_logits(num_classes))
    probes = solve(features, problems, standardise=True, tolerance=_TOLERANCE)
    log_p_LPNK = probes.log_probabilities(features.x[:, start:end])
    truth_PN = targets_AN[:, start:end].repeat(values, 1)
    p_LPN = log_p_LPNK.gather(3, truth_PN.expand(len(log_p_LPNK), -1, -1)[..., None])[..., 0].exp()
    mixed_LPN = (start * p_LPN + 1 / num_classes) / (start + 1)
    return mixed_LPN.double().log().unflatten(1, (values, tasks)).transpose(0, 1), probes.converged.double().mean(1)
