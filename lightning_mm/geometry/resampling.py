"""Confidence intervals and random pairings: delete-group jackknife, intervals of means, permutations.

Rows are never drawn twice: a duplicated row is its own nearest neighbor and a perfect match in a Gram matrix, so the
bootstrap is wrong for these measures. Samples of a group (same picture) are left out together and permuted together.

Data flow: every measure in ``geometry`` takes its interval and its random pairings from here.

Shapes: L layers, N samples, G groups, B blocks or leave-out sets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.core.simultaneous import student_quantile

_MIN_BLOCKS = 3
"""Fewer independent blocks give no usable standard error."""

_MAX_FIXED = 0.2
"""Share of the samples that a random pairing may leave in place; of the pairs that is its square, 4 %."""


def jackknife_blocks(n: int, groups: Tensor | None = None, blocks: int = 12, seed: int = 0) -> list[Tensor]:
    """Random blocks of nearly equal size that keep groups together.

    Args:
        n: Number of samples.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
        blocks: Largest number of blocks; there are never more than groups.
        seed: Seed of the assignment.

    Returns:
        Per block the sorted (n_b,) indices of its samples; together they are 0..N-1.

    Example:
        >>> [len(block) for block in jackknife_blocks(10, blocks=5)]
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


def leave_out_masks(like_NN: Tensor, groups: Tensor | None) -> Tensor:
    """(N, B) leave-out sets of a delete-group jackknife: 1 for samples that are kept; the first set keeps all.

    Args:
        like_NN: Matrix whose first dimension, dtype and device the result has.
        groups: (N,) int ids, equal for samples that depend on one another; None: all are independent.
    """
    deleted = jackknife_blocks(len(like_NN), groups)
    kept_NB = torch.ones(len(like_NN), 1 + len(deleted))
    for column, block in enumerate(deleted, start=1):
        kept_NB[block, column] = 0
    return kept_NB.to(like_NN)


def jackknife_error(left_out: Tensor) -> Tensor:
    """Standard error (...) from the statistic (B, ...) recomputed without each block; NaN with fewer than 3 blocks.

    Delete-group jackknife: se^2 = (B-1)/B sum_b (t_b - mean t)^2 (Kott 2001; Shao and Tu 1995, 2.3).
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
    """Delete-group jackknife standard error of any statistic of N samples.

    Args:
        statistic: Takes the sorted (n_kept,) indices of the samples that are kept and returns a tensor (...).
        n: Number of samples.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
        blocks: Number of blocks that are left out, one at a time.
        seed: Seed of the assignment to blocks.

    Returns:
        The standard error (...), and its degrees of freedom for ``half_width``. With fewer than 3 blocks it is NaN and
        the statistic is not computed without them: nothing may be left.

    Example:
        >>> x = torch.arange(100.0)
        >>> error, dof = group_jackknife(lambda kept: x[kept].mean(), 100)
        >>> 2 < float(error) < 4, dof  # the textbook value is 2.9
        (True, 11)
    """
    left_out = group_left_out(statistic, n, groups, blocks, seed)
    return jackknife_error(left_out), len(left_out) - 1


def group_left_out(
    statistic: Callable[[Tensor], Tensor],
    n: int,
    groups: Tensor | None = None,
    blocks: int = 12,
    seed: int = 0,
) -> Tensor:
    """(B, ...) the statistic without each block, as ``group_jackknife`` has them; NaN with fewer than 3 blocks."""
    deleted = jackknife_blocks(n, groups, blocks, seed)
    all_N = torch.arange(n)
    if len(deleted) < _MIN_BLOCKS:
        return torch.full_like(statistic(all_N), math.nan)[None].repeat_interleave(len(deleted), 0)
    return torch.stack([statistic(all_N[~torch.isin(all_N, block)]) for block in deleted])


def jackknife_interval(values: Tensor, least: float = -math.inf, most: float = math.inf) -> tuple[Tensor, Tensor]:
    """Low and high (...) of the 95 % interval around ``values[0]``, from the leave-out values ``values[1:]``.

    Args:
        values: (1+B, ...) the statistic of all samples, then without each block.
        least: Smallest possible value of the statistic.
        most: Largest possible value of the statistic.
    """
    width = half_width(jackknife_error(values[1:]), len(values) - 2)
    return (values[0] - width).clamp_min(least), (values[0] + width).clamp_max(most)


def half_width(error: Tensor, dof: int) -> Tensor:
    """Half width of the 95 % interval of a standard error with ``dof`` degrees of freedom; NaN below 2."""
    return error * t_quantile(dof)


def t_quantile(dof: int) -> float:
    """97.5 % quantile of Student's t, within 1 % for dof >= 2; NaN below (Abramowitz and Stegun 26.7.5).

    Example:
        >>> round(t_quantile(11), 3), round(t_quantile(100000), 3)
        (2.201, 1.96)
    """
    return student_quantile(dof) if dof >= _MIN_BLOCKS - 1 else math.nan


def faultless_bound(trials: int) -> float:
    """Lower end of the 95 % interval of a share of which no fault was seen in so many trials (Clopper, Pearson 1934).

    Example:
        >>> round(faultless_bound(10), 2)
        0.69
    """
    return 0.025 ** (1 / max(trials, 1))


def clustered_mean_interval(terms_LN: Tensor, groups: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of per-sample terms with its cluster-robust 95 % interval.

    The variance is G/(G-1) sum_g (sum of residuals in g)^2 / N^2 (Liang and Zeger 1986).

    Args:
        terms_LN: Per-sample terms.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.

    Returns:
        (L,) float64 mean, low and high; low and high are NaN with fewer than 3 groups.

    Example:
        >>> mean, low, high = clustered_mean_interval(torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
        >>> round(float(mean), 2), round(float(high - mean), 2)  # 0.577/2 times t(3)
        (0.5, 0.92)
    """
    mean_L = terms_LN.double().mean(1)
    residual_LG = terms_LN.double() - mean_L[:, None]
    if (groups := nontrivial_groups(groups)) is not None:
        residual_LG = _group_sums(residual_LG, groups)
    count = residual_LG.shape[1]
    error_L = (residual_LG.square().sum(1) * count / max(count - 1, 1)).sqrt() / terms_LN.shape[1]
    width_L = half_width(error_L, count - 1)
    return mean_L, mean_L - width_L, mean_L + width_L


def _group_sums(terms_LN: Tensor, groups: Tensor) -> Tensor:
    """(L, G) sums per group, from running sums on the CPU: scattered sums on a GPU are not deterministic."""
    _, group_N, size_G = torch.unique(groups.cpu(), return_inverse=True, return_counts=True)
    running_LN = terms_LN.cpu()[:, torch.argsort(group_N, stable=True)].cumsum(1)
    ends_LG = running_LN[:, size_G.cumsum(0) - 1]
    return ends_LG.diff(dim=1, prepend=torch.zeros_like(ends_LG[:, :1])).to(terms_LN.device)


def nontrivial_groups(groups: Tensor | None) -> Tensor | None:
    """The groups, or None where each has one member, so that closed forms for independent samples hold."""
    return None if groups is None or len(torch.unique(groups)) == len(groups) else groups


def permutations(n: int, count: int, seed: int = 0, groups: Tensor | None = None) -> Tensor:
    """Random permutations of N samples, which pair two representations at random.

    Args:
        n: Number of samples.
        count: Number of permutations.
        seed: Seed of the draw.
        groups: (N,) int ids; whole groups are exchanged with groups of the same size, since their samples depend on one
            another. A group of unique size stays in place. None: all samples are independent.

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


def permutation_problem(groups: Tensor | None) -> str:
    """Why ``permutations`` of these groups give no valid null; empty where they do.

    Of all groups of one size one stays in place on average, and a group of unique size always does.

    Example:
        >>> permutation_problem(torch.tensor([0, 1, 1, 2, 2, 2]))
        'chance is not drawn: groups change places with their like only, and 100% of the samples would stay'
    """
    if (groups := nontrivial_groups(groups)) is None:
        return ""
    sizes_G = torch.unique(groups, return_counts=True)[1]
    held = float(torch.unique(sizes_G).sum()) / len(groups)
    stay = f"groups change places with their like only, and {held:.0%} of the samples would stay"
    return f"chance is not drawn: {stay}" if held > _MAX_FIXED else ""


def swap_problem(groups: Tensor | None) -> str:
    """Why swapping the two representations of whole groups gives no valid null; empty where it does."""
    if (groups := nontrivial_groups(groups)) is None:
        return ""
    shares_G = torch.unique(groups, return_counts=True)[1].double() / len(groups)
    effective = 1 / float(shares_G.square().sum())
    few = f"chance is not drawn: whole groups swap their readings, and there are as good as {effective:.1f} groups"
    return few if effective < 1 / _MAX_FIXED else ""


def without_null(estimates: Sequence[Estimate], why: str, exact: bool = False) -> list[Estimate]:
    """The estimates without null and null band, with a note why; unchanged if there is no reason.

    Args:
        estimates: Estimates of one measure.
        why: From ``permutation_problem`` or ``swap_problem``; empty changes nothing.
        exact: The null itself is not drawn: only its band is removed.
    """
    if not why:
        return list(estimates)
    return [
        one
        if one.undefined
        else replace(one, null=one.null if exact else None, null_low=None, null_high=None).noted(why)
        for one in estimates
    ]
