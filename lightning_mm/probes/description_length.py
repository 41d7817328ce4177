"""Minimum description length of labels given a representation, by an online (prequential) code.

Probes are trained on ever longer prefixes of the data; the code length of the next block of labels is its negative
log-likelihood (Voita and Titov 2020). Compression is the code length of a uniform code over this one. Probabilities are
mixed with one pseudo-sample spread over all classes, as no code may give a label probability zero. C is not selected
but paid for: the probability of all labels is the mean over the values of C, at most log2 of their number in bits above
the best.

Data flow: features (L, N, D) and labels -> probes on growing prefixes -> code lengths of the blocks -> compression, one
Estimate per layer.

Shapes: L layers, N samples, D features, A tasks (labels of a multi-label problem, otherwise 1), K classes, V values
of C, P problems, G groups, B bootstrap draws.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.representations import exact_products
from lightning_mm.probes.cross_entropy import LogisticProblems, ProbeFeatures
from lightning_mm.probes.cross_validation import bootstrap_weights, hash_uniform, num_groups
from lightning_mm.probes.intervals import bootstrap_estimates
from lightning_mm.probes.logistic import fit_problems, num_logits
from lightning_mm.probes.result import note_unconverged

FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Ends of the blocks, as shares of the data."""

_FIRST = 10
"""Fewest training samples."""

_TOLERANCE = 1e-3
_DRAWS = 500


@exact_products()
def description_length(
    x_LND: Tensor, targets_AN: Tensor, num_classes: int, groups_N: Tensor, c_values: Sequence[float], *, seed: int
) -> list[Estimate]:
    """Compression of the labels, one Estimate per layer: 1 is no gain; the maximum is N over the first block's size.

    Args:
        x_LND: Finite features that vary.
        targets_AN: Class ids of A tasks.
        num_classes: K of each task.
        groups_N: Group ids; whole groups are coded in an order that depends on their ids and the seed.
        c_values: Inverse strengths of the penalty.
        seed: Seed of the order and of the bootstrap.

    Returns:
        Estimates with the compression by class frequencies alone as null, and a bootstrap interval over groups for
        fixed probes.
    """
    order_N, ends = _blocks(groups_N, seed)
    rows_N, groups_N = order_N.to(x_LND.device), groups_N.cpu()[order_N]
    targets_AN, features = targets_AN[:, rows_N], ProbeFeatures.of(x_LND[:, rows_N], standardize=True)
    plain = math.log(num_classes)
    first = (len(c_values), len(x_LND), len(targets_AN), ends[0])
    log_p, share_L = [torch.full(first, -plain, dtype=torch.float64, device=x_LND.device)], torch.zeros(len(x_LND))
    null_AN = torch.full_like(targets_AN, plain, dtype=torch.float64)
    for start, end in pairwise(ends):
        log_p_block, finished_L = _next_block(features, targets_AN, num_classes, c_values, start, end)
        log_p.append(log_p_block)
        share_L = share_L + (1 - finished_L.cpu()) / (len(ends) - 1)
        null_AN[:, start:end] = -_frequencies(targets_AN, num_classes, start)[:, start:end].log()
    # Mean over C of the probability of all labels so far: a C that predicted well weighs more in later blocks.
    so_far_LAN = torch.cat(log_p, 3).cumsum(3).logsumexp(0) - math.log(len(c_values))
    nats_LAN = -so_far_LAN.diff(dim=2, prepend=torch.zeros_like(so_far_LAN[..., :1]))
    weights_BN = bootstrap_weights(groups_N, _DRAWS, seed).to(nats_LAN)
    draws_LB = plain * weights_BN.sum(1) / (nats_LAN.mean(1) @ weights_BN.T)
    n, groups, null = len(groups_N), num_groups(groups_N), plain / float(null_AN.mean())
    value_L = plain / nats_LAN.mean((1, 2))
    return note_unconverged(
        bootstrap_estimates(value_L, draws_LB, n=n, k=num_classes, groups=groups, most=math.inf, null=null), share_L
    )


def _blocks(groups_N: Tensor, seed: int) -> tuple[Tensor, list[int]]:
    """Order of the samples, and ends of the blocks: the first whole group beyond each fraction."""
    order_N = torch.argsort(hash_uniform(groups_N, seed), stable=True)
    _, sizes = torch.unique_consecutive(groups_N.cpu()[order_N], return_counts=True)
    ends_G, n = sizes.cumsum(0), len(groups_N)
    at = torch.searchsorted(ends_G, torch.tensor([fraction * n for fraction in FRACTIONS]).round().long())
    ends = torch.unique(ends_G[at.clamp_max(len(ends_G) - 1)])
    return order_N, ends[(ends >= _FIRST) | (ends == n)].tolist()


def _frequencies(targets_AN: Tensor, num_classes: int, start: int) -> Tensor:
    """(A, N) frequency of each sample's class among the first ``start`` samples and the pseudo-sample."""
    classes_K = torch.arange(num_classes, device=targets_AN.device)
    count_AK = (targets_AN[:, :start, None] == classes_K).sum(1)
    return ((count_AK + 1 / num_classes) / (start + 1)).gather(1, targets_AN)


def _next_block(
    features: ProbeFeatures, targets_AN: Tensor, num_classes: int, c_values: Sequence[float], start: int, end: int
) -> tuple[Tensor, Tensor]:
    """(V, L, A, samples of the block) log-probability of the true labels by probes trained on all samples before.

    Also (L,) the share of these probes that has converged.
    """
    tasks, values = len(targets_AN), len(c_values)
    seen_AN = targets_AN[:, :start].repeat(values, 1)
    c_P = torch.tensor(c_values, dtype=torch.float64).repeat_interleave(tasks)
    problems = LogisticProblems(seen_AN, torch.ones_like(seen_AN, dtype=torch.bool), c_P[None], num_logits(num_classes))
    probes = fit_problems(features, problems, standardize=True, tolerance=_TOLERANCE)
    log_p_LPNK = probes.log_probabilities(features.x[:, start:end])
    truth_PN = targets_AN[:, start:end].repeat(values, 1)
    p_LPN = log_p_LPNK.gather(3, truth_PN.expand(len(log_p_LPNK), -1, -1)[..., None])[..., 0].exp()
    mixed_LPN = (start * p_LPN + 1 / num_classes) / (start + 1)
    return mixed_LPN.double().log().unflatten(1, (values, tasks)).transpose(0, 1), probes.converged.double().mean(1)
