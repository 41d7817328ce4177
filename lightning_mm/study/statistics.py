"""Differences of arms with intervals over pictures and seeds, and the correction for looking at several arms.

The questions of a picture stay together, and all arms of a seed are asked the same questions: differences are paired.
What an interval covers: the draw of the pictures, and the draw of the seeds (order of the rows, random layers), as far
as the seeds at hand can tell; with one seed, the pictures only.

Data flow: scores (arm x seed x question) + picture of each question -> ``contrasts`` -> one ``Contrast`` per arm.

The variance has two parts: a bootstrap over pictures of the mean over seeds, and the spread of the per-seed means over
their number. Three seeds tell little of their spread: it is pooled over all arms (the interaction of arm and seed, as
in a block design whose blocks are the seeds), and an arm that spreads more counts with its own. Degrees of freedom are
joined after Satterthwaite (1946). What the noise of the questions adds to the spread of seeds is not taken out, so that
intervals are rather too wide; an arm that is many times noisier than the others has too narrow ones. Over several arms
the level is that of the largest standardized difference in joint draws (max-T, Westfall and Young 1993), which knows
that arms asked the same questions err together.

Shapes: A arms, S seeds, Q questions, P pictures, R resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

LEVEL = 0.95
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Contrast:
    """The difference of two arms, first minus second.

    Args:
        arm: The first.
        against: The second.
        value: Mean over questions and seeds.
        low: Lower end of the interval of this difference alone.
        high: Its upper end.
        corrected_low: Lower end of the interval that holds together with those of all arms of the comparison.
        corrected_high: Its upper end.
        by_seed: The difference in each seed.
        num_pictures: Number of pictures, the units that were resampled.
        num_compared: Number of differences that the correction is for.
    """

    arm: str
    against: str
    value: float
    low: float
    high: float
    corrected_low: float
    corrected_high: float
    by_seed: tuple[float, ...]
    num_pictures: int
    num_compared: int

    @property
    def is_higher(self) -> bool:
        """Whether the corrected interval lies above zero."""
        return self.corrected_low > 0

    @property
    def is_lower(self) -> bool:
        """Whether the corrected interval lies below zero."""
        return self.corrected_high < 0


@dataclass(frozen=True)
class Level:
    """A mean with its interval.

    Args:
        value: Mean over questions and seeds.
        low: Lower end of its 95 % interval.
        high: Upper end.
        by_seed: The mean in each seed.
    """

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]


def contrasts(
    scores_ASQ: Tensor,
    picture_Q: Tensor,
    names: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    resamples: int = 2000,
    seed: int = 0,
    families: int = 1,
) -> list[Contrast]:
    """The differences of pairs of arms, with intervals alone and together.

    Args:
        scores_ASQ: What is compared, such as 1 for each question that is answered exactly.
        picture_Q: Picture of each question; questions of one are drawn together.
        names: (A,) of the arms.
        pairs: Which are compared, first minus second; all of these are corrected for together.
        resamples: R.
        seed: Of the draws.
        families: Number of such comparisons on other questions, as of other types, that are corrected for too.

    Example:
        >>> same = torch.tensor([[1.0, 0, 1, 0, 1, 0]]).expand(2, 2, 6)
        >>> (found,) = contrasts(same, torch.arange(6), ["a", "b"], [("a", "b")])
        >>> found.value, found.is_higher, found.is_lower
        (0.0, False, False)
    """
    index = {name: number for number, name in enumerate(names)}
    first = torch.tensor([index[one] for one, _ in pairs])
    second = torch.tensor([index[two] for _, two in pairs])
    differences_CSQ = scores_ASQ.double()[first] - scores_ASQ.double()[second]
    summed = _Summed.of(differences_CSQ, picture_Q)
    drawn = _draws(summed, resamples, seed)
    level = _joint_level(drawn) / families
    pooled = 2 * _interaction(_Summed.of(scores_ASQ.double(), picture_Q).mean_CS)
    found = []
    for place, ((one, two), variance) in enumerate(
        zip(pairs, _variances(summed, drawn, pooled, len(names)), strict=True)
    ):
        value, by_seed = float(summed.mean_C[place]), tuple(summed.mean_CS[place].tolist())
        alone, together = (variance.half_width(each) for each in (1 - LEVEL, level))
        ends = (value - alone, value + alone, value - together, value + together)
        found.append(Contrast(one, two, value, *ends, by_seed, summed.num_pictures, len(pairs) * families))
    return found


def levels(scores_ASQ: Tensor, picture_Q: Tensor, resamples: int = 2000, seed: int = 0) -> list[Level]:
    """The mean of each arm with its interval over pictures and seeds; arguments as in ``contrasts``."""
    summed = _Summed.of(scores_ASQ.double(), picture_Q)
    pooled = float(summed.mean_CS.var(1).mean()) if summed.mean_CS.shape[1] > 1 else 0.0
    variances = _variances(summed, _draws(summed, resamples, seed), pooled, len(scores_ASQ))
    found = []
    for value, by_seed, variance in zip(summed.mean_C.tolist(), summed.mean_CS.tolist(), variances, strict=True):
        width = variance.half_width(1 - LEVEL)
        found.append(Level(value, value - width, value + width, tuple(by_seed)))
    return found


@dataclass(frozen=True)
class _Summed:
    """Sums per picture: of C differences in S seeds, and the number of questions."""

    sums_CSP: Tensor
    counts_P: Tensor

    @classmethod
    def of(cls, values_CSQ: Tensor, picture_Q: Tensor) -> "_Summed":
        _, group_Q = torch.unique(picture_Q, return_inverse=True)
        counts_P = torch.bincount(group_Q).double()
        sums_CSP = values_CSQ.new_zeros(*values_CSQ.shape[:2], len(counts_P)).index_add_(2, group_Q, values_CSQ)
        return cls(sums_CSP, counts_P)

    @property
    def mean_CS(self) -> Tensor:
        return self.sums_CSP.sum(2) / self.counts_P.sum()

    @property
    def mean_C(self) -> Tensor:
        return self.mean_CS.mean(1)

    @property
    def num_pictures(self) -> int:
        return len(self.counts_P)


@dataclass(frozen=True)
class _Draws:
    """Means of resampled pictures.

    Args:
        means_CSR: In each seed.
        joint_CR: Over resampled seeds, whose spread is scaled to be that of independent seeds.
    """

    means_CSR: Tensor
    joint_CR: Tensor


@dataclass(frozen=True)
class _Variance:
    """The parts of a mean's variance.

    Args:
        pictures: Of the draw of pictures, seeds as they are.
        seeds: Spread of the per-seed means over their number.
        pictures_dof: Degrees of freedom of the first.
        seeds_dof: Degrees of freedom of the second; 0: there is one seed.
    """

    pictures: float
    seeds: float
    pictures_dof: int
    seeds_dof: int

    def half_width(self, level: float) -> float:
        """Half of the interval that misses the truth with this probability."""
        total = self.pictures + self.seeds
        parts = self.pictures**2 / max(self.pictures_dof, 1) + self.seeds**2 / max(self.seeds_dof, 1)
        return _t_quantile(1 - level / 2, total**2 / parts) * math.sqrt(total) if parts > 0 else 0.0


def _draws(summed: _Summed, resamples: int, seed: int) -> _Draws:
    generator = torch.Generator().manual_seed(seed)
    num_pictures, num_seeds = summed.num_pictures, summed.sums_CSP.shape[1]
    chosen_RP = torch.randint(num_pictures, (resamples, num_pictures), generator=generator)
    weights_RP = torch.zeros(resamples, num_pictures, dtype=torch.float64)
    weights_RP.scatter_add_(1, chosen_RP, torch.ones_like(weights_RP))
    means_CSR = summed.sums_CSP @ weights_RP.T / (weights_RP @ summed.counts_P)
    if num_seeds == 1:
        return _Draws(means_CSR, means_CSR[:, 0])
    seeds_RS = torch.randint(num_seeds, (resamples, num_seeds), generator=generator)
    shares_RS = torch.nn.functional.one_hot(seeds_RS, num_seeds).double().mean(1) - 1 / num_seeds
    spread_CR = torch.einsum("cs,rs->cr", summed.mean_CS, shares_RS) * math.sqrt(num_seeds / (num_seeds - 1))
    return _Draws(means_CSR, means_CSR.mean(1) + spread_CR)


def _variances(summed: _Summed, drawn: _Draws, pooled: float, num_arms: int) -> list[_Variance]:
    """The parts of each variance; ``pooled`` is what all arms say of the spread of one difference over seeds."""
    num_seeds = summed.sums_CSP.shape[1]
    seeds_dof = max(num_arms - 1, 1) * (num_seeds - 1)
    found = []
    for pictures, by_seed in zip(drawn.means_CSR.mean(1).var(1).tolist(), summed.mean_CS, strict=True):
        seeds = max(float(by_seed.var()), pooled) / num_seeds if num_seeds > 1 else 0.0
        found.append(_Variance(pictures, seeds, summed.num_pictures - 1, seeds_dof))
    return found


def _interaction(mean_AS: Tensor) -> float:
    """Variance of the per-seed means that neither arm nor seed explains, per arm."""
    num_arms, num_seeds = mean_AS.shape
    if num_arms < 2 or num_seeds < 2:
        return 0.0
    rest_AS = mean_AS - mean_AS.mean(0) - mean_AS.mean(1, keepdim=True) + mean_AS.mean()
    return float(rest_AS.square().sum()) / ((num_arms - 1) * (num_seeds - 1))


def _joint_level(drawn: _Draws) -> float:
    """The level at which all intervals hold together in 95 % of the draws."""
    moving_CR = drawn.joint_CR[drawn.joint_CR.std(1) > 0]
    if not len(moving_CR):
        return 1 - LEVEL
    centered_CR = moving_CR - moving_CR.mean(1, keepdim=True)
    largest_R = (centered_CR / moving_CR.std(1, keepdim=True)).abs().amax(0)
    return min(2 * (1 - _NORMAL.cdf(float(torch.quantile(largest_R, LEVEL)))), 1 - LEVEL)


def _t_quantile(probability: float, dof: float) -> float:
    """Quantile of Student's t for degrees of freedom of 1 or more, within 1 % below 2 (Hill 1970, algorithm 396).

    Example:
        >>> round(_t_quantile(0.975, 2), 3), round(_t_quantile(0.975, 10.0), 3), round(_t_quantile(0.975, 1e9), 3)
        (4.303, 2.228, 1.96)
    """
    if not math.isfinite(dof) or dof > 1e6:
        return _NORMAL.inv_cdf(probability)
    tail = 2 * (1 - probability)
    if dof <= 1:
        return math.tan(math.pi / 2 * (1 - tail))
    if dof == 2:
        return math.sqrt(2 / (tail * (2 - tail)) - 2)
    a = 1 / (dof - 0.5)
    b = 48 / a**2
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * dof
    x = d * tail
    y = x ** (2 / dof)
    if y > 0.05 + a:
        x = _NORMAL.inv_cdf(tail / 2)
        y = x**2
        if dof < 5:
            c += 0.3 * (dof - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = a * y**2
        y = math.expm1(y)
    else:
        y = ((1 / (((dof + 6) / (dof * y) - 0.089 * d - 0.822) * (dof + 2) * 3) + 0.5 / (dof + 4)) * y - 1) * (
            dof + 1
        ) / (dof + 2) + 1 / y
    return math.sqrt(dof * y)


def spearman(one: Sequence[float], two: Sequence[float]) -> float:
    """Rank correlation of two curves; NaN where one is constant.

    Example:
        >>> spearman([1, 2, 3], [1, 4, 9]), spearman([1, 2, 3], [3, 2, 1])
        (1.0, -1.0)
    """
    ranks = [_ranks(torch.tensor(each, dtype=torch.float64)) for each in (one, two)]
    a, b = (each - each.mean() for each in ranks)
    norm = float(a.norm() * b.norm())
    return round(float(a @ b) / norm, 12) if norm > 0 else math.nan


def smooth_p_value(one: Sequence[float], two: Sequence[float], draws: int = 2000, seed: int = 0) -> float:
    """How often a curve as smooth as the second one correlates as strongly with the first by chance.

    Curves over layers are smooth: permuting single layers would take most pairs of smooth curves for related. Random
    curves with the second one's spectrum (random phases, Theiler et al. 1992, of its ranks and their mirror image, so
    that the ends meet) are as smooth as it is.

    Args:
        one: A value per layer.
        two: Another one.
        draws: Number of random curves.
        seed: Of the draws.

    Returns:
        The share of curves that correlate as strongly, in either direction; NaN where a curve is constant.
    """
    observed = spearman(one, two)
    if math.isnan(observed):
        return math.nan
    first, second = (_ranks(torch.tensor(each, dtype=torch.float64)) for each in (one, two))
    spectrum = torch.fft.rfft(torch.cat([second, second.flip(0)]) - second.mean())
    generator = torch.Generator().manual_seed(seed)
    phases = 2 * math.pi * torch.rand(draws, len(spectrum), generator=generator, dtype=torch.float64)
    random_RL = torch.fft.irfft(spectrum.abs() * torch.exp(1j * phases), n=2 * len(second))[:, : len(second)]
    ranks_RL = random_RL.argsort(1).argsort(1).double()
    centered_RL = ranks_RL - ranks_RL.mean(1, keepdim=True)
    centered = first - first.mean()
    found_R = (centered_RL @ centered) / (centered_RL.norm(dim=1) * centered.norm())
    return (1 + int((found_R.abs() >= abs(observed) - 1e-12).sum())) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979); NaN stay.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = list(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        least = max(least, min(1.0, p * (len(order) - rank)))
        adjusted[place] = round(least, 12)
    return adjusted


def _ranks(values: Tensor) -> Tensor:
    """Ranks, ties at their mean."""
    less = (values[:, None] > values[None]).double().sum(1)
    equal = (values[:, None] == values[None]).double().sum(1)
    return less + (equal - 1) / 2
