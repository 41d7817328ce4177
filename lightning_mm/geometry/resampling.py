"""How sure a number is and what chance gives: delete-group jackknife, intervals of means, permutations.

Data flow: every measure in ``geometry`` gets its interval and its permuted pairings here. Rows are never drawn twice:
a duplicated row is its own nearest neighbour and a perfect match in a Gram matrix, so the bootstrap is wrong there.
Samples that share a picture (equal ``groups``) are left out together and moved together.

Shapes: L layers, N samples, G groups, B blocks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate

_MIN_BLOCKS = 3
"""Fewer independent parts give no usable standard error."""

_MOST_HELD = 0.2
"""Share of the samples that a draw of chance may leave where they are: their pairs are the square of it, 4 %."""


def deletion_blocks(n: int, groups: Tensor | None = None, blocks: int = 12, seed: int = 0) -> list[Tensor]:
    """Cut the samples at random into blocks of nearly equal size; a group is never cut.

    Args:
        n: Samples.
        groups: (N,) int ids of what is sampled independently (the picture of each sample); None: every sample.
        blocks: How many at most; there are never more than groups.
        seed: Of the cut.

    Returns:
        Per block the sorted (n_b,) indices of its samples; together they are 0..N-1.

    Example:
        >>> [len(block) for block in deletion_blocks(10, blocks=5)]
        [2, 2, 2, 2, 2]
    """
    group_N = torch.arange(n) if groups is None else torch.unique(groups.cpu(), return_inverse=True)[1]
    sizes_G = torch.bincount(group_N, minlength=1)
    order_G = torch.randperm(len(sizes_G), generator=torch.Generator().manual_seed(seed))
    middle_G = sizes_G[order_G].cumsum(0) - (sizes_G[order_G] + 1) // 2
    block_G = torch.empty_like(order_G)
    block_G[order_G] = middle_G * min(blocks, len(sizes_G)) // max(n, 1)
    block_N = block_G[group_N]
    return [torch.nonzero(block_N == block).flatten() for block in torch.unique(block_N)]


def jackknife_error(left_out: Tensor) -> Tensor:
    """Standard error (...) from the statistic (B, ...) recomputed without each block; NaN with fewer than 3 blocks.

    Source: delete-group jackknife, se^2 = (B-1)/B sum_b (t_b - mean t)^2 (Kott 2001; Shao and Tu 1995, 2.3).
    """
    if len(left_out) < _MIN_BLOCKS:
        return left_out.new_full(left_out.shape[1:], math.nan)
    return ((left_out - left_out.mean(0)).square().mean(0) * (len(left_out) - 1)).sqrt()


def group_jackknife(
    statistic: Callable[[Tensor], Tensor],
    n: int,
    groups: Tensor | None = None,
    blocks: int = 12,
    seed: int = 0,
) -> tuple[Tensor, int]:
    """Standard error of any statistic of N samples.

    Args:
        statistic: Takes the sorted (n_kept,) indices of the samples that stay and returns a tensor (...).
        n: Samples.
        groups: (N,) int ids of what is sampled independently.
        blocks: How many parts are left out, one at a time.
        seed: Of the cut.

    Returns:
        The standard error (...), and its degrees of freedom for ``half_width``. With fewer than 3 parts it is NaN,
        and the statistic is not asked about what they leave: it may be nothing.

    Example:
        >>> x = torch.arange(100.0)
        >>> error, dof = group_jackknife(lambda kept: x[kept].mean(), 100)
        >>> 2 < float(error) < 4, dof  # the textbook value is 2.9
        (True, 11)
    """
    deleted = deletion_blocks(n, groups, blocks, seed)
    everyone = torch.arange(n)
    if len(deleted) < _MIN_BLOCKS:
        return torch.full_like(statistic(everyone), math.nan), len(deleted) - 1
    left_out = torch.stack([statistic(everyone[~torch.isin(everyone, block)]) for block in deleted])
    return jackknife_error(left_out), len(deleted) - 1


def jackknife_interval(values: Tensor, least: float = -math.inf, most: float = math.inf) -> tuple[Tensor, Tensor]:
    """Low and high (...) of the 95 % interval around ``values[0]`` (all samples), given ``values[1:]`` (B, ...).

    Args:
        values: (1+B, ...) the statistic of everyone, then without each block.
        least: The smallest value that can be.
        most: The largest.
    """
    width = half_width(jackknife_error(values[1:]), len(values) - 2)
    return (values[0] - width).clamp_min(least), (values[0] + width).clamp_max(most)


def half_width(error: Tensor, dof: int) -> Tensor:
    """Half of the 95 % interval that belongs to a standard error with ``dof`` degrees of freedom; NaN below 2."""
    return error * t_quantile(dof)


def t_quantile(dof: int) -> float:
    """97.5 % quantile of Student's t, within 1 % for dof >= 2; NaN below.

    Source: Abramowitz and Stegun 26.7.5.

    Example:
        >>> round(t_quantile(11), 3), round(t_quantile(100000), 3)
        (2.201, 1.96)
    """
    if dof < _MIN_BLOCKS - 1:
        return math.nan
    z = 1.959963985
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / dof**power for power, term in enumerate(terms))


def mean_interval(terms_LN: Tensor, groups: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of per-sample terms with its 95 % interval; the terms of a group count as dependent.

    Args:
        terms_LN: (L, N) what is averaged.
        groups: (N,) int ids of what is sampled independently.

    Returns:
        (L,) float64 mean, low and high; low and high are NaN with fewer than 3 groups.

    Source: cluster-robust variance of a mean, G/(G-1) sum_g (sum of residuals in g)^2 / N^2 (Liang and Zeger 1986).

    Example:
        >>> mean, low, high = mean_interval(torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
        >>> round(float(mean), 2), round(float(high - mean), 2)  # 0.577/2 times t(3)
        (0.5, 0.92)
    """
    mean_L = terms_LN.double().mean(1)
    residual_LG = terms_LN.double() - mean_L[:, None]
    if (groups := dependent(groups)) is not None:
        residual_LG = _group_sums(residual_LG, groups)
    count = residual_LG.shape[1]
    error_L = (residual_LG.square().sum(1) * count / max(count - 1, 1)).sqrt() / terms_LN.shape[1]
    width_L = half_width(error_L, count - 1)
    return mean_L, mean_L - width_L, mean_L + width_L


def _group_sums(terms_LN: Tensor, groups: Tensor) -> Tensor:
    """(L, G) from running sums on the CPU: scattered sums on a GPU come out different every time."""
    _, group_N, size_G = torch.unique(groups.cpu(), return_inverse=True, return_counts=True)
    running_LN = terms_LN.cpu()[:, torch.argsort(group_N, stable=True)].cumsum(1)
    ends_LG = running_LN[:, size_G.cumsum(0) - 1]
    return ends_LG.diff(dim=1, prepend=torch.zeros_like(ends_LG[:, :1])).to(terms_LN.device)


def dependent(groups: Tensor | None) -> Tensor | None:
    """The groups, or None where each has one member, so that closed forms hold."""
    return None if groups is None or len(torch.unique(groups)) == len(groups) else groups


def permutations(n: int, count: int, seed: int = 0, groups: Tensor | None = None) -> Tensor:
    """Re-pairings of N samples under which nothing but chance relates two banks.

    Args:
        n: Samples.
        count: How many.
        seed: Of the draw.
        groups: (N,) int ids; whole groups change places with groups of their own size, since their samples depend on
            one another. A group whose size no other has stays where it is.

    Returns:
        (count, N) indices; each row is a permutation.

    Example:
        >>> permutations(4, 2).sort(1).values.tolist()
        [[0, 1, 2, 3], [0, 1, 2, 3]]
    """
    generator = torch.Generator().manual_seed(seed)
    if groups is None:
        return torch.stack([torch.randperm(n, generator=generator) for _ in range(count)])
    group_N = torch.unique(groups.cpu(), return_inverse=True)[1]
    size_N = torch.bincount(group_N)[group_N]
    drawn = torch.arange(n).repeat(count, 1)
    for size in torch.unique(size_N).tolist():
        members = torch.nonzero(size_N == size).flatten()
        rows = members[torch.sort(group_N[members], stable=True).indices].view(-1, size)
        for permutation in drawn:
            permutation[rows] = rows[torch.randperm(len(rows), generator=generator)]
    return drawn


def too_fixed(groups: Tensor | None) -> str:
    """Why ``permutations`` of these groups are no picture of chance; empty where they are.

    Of all groups of one size one stays where it is on average, and the only one of its size always does.

    Example:
        >>> too_fixed(torch.tensor([0, 1, 1, 2, 2, 2]))
        'chance is not drawn: groups change places with their like only, and 100% of the samples would stay'
    """
    if (groups := dependent(groups)) is None:
        return ""
    sizes_G = torch.unique(groups, return_counts=True)[1]
    held = float(torch.unique(sizes_G).sum()) / len(groups)
    stay = f"groups change places with their like only, and {held:.0%} of the samples would stay"
    return f"chance is not drawn: {stay}" if held > _MOST_HELD else ""


def too_joined(groups: Tensor | None) -> str:
    """Why swapping the two readings of whole groups is no picture of chance; empty where it is."""
    if (groups := dependent(groups)) is None:
        return ""
    shares_G = torch.unique(groups, return_counts=True)[1].double() / len(groups)
    effective = 1 / float(shares_G.square().sum())
    few = f"chance is not drawn: whole groups swap their readings, and there are as good as {effective:.1f} groups"
    return few if effective < 1 / _MOST_HELD else ""


def withheld(estimates: Sequence[Estimate], why: str, exact: bool = False) -> list[Estimate]:
    """The same without their chance level, and why; as they are where there is no reason.

    Args:
        estimates: Of one measure.
        why: From ``too_fixed`` or ``too_joined``.
        exact: The null itself does not rest on draws, and stays.
    """
    if not why:
        return list(estimates)
    return [
        one
        if one.undefined
        else replace(one, null=one.null if exact else None, null_low=None, null_high=None).noted(why)
        for one in estimates
    ]
