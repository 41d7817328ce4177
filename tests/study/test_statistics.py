"""Intervals of differences: coverage on drawn data, an independent bootstrap, and planted differences."""

import random

import pytest
import torch
from scipy import stats

from lightning_mm.study.statistics import _t_quantile, contrasts, holm, levels, smooth_p_value, spearman

PICTURES, PER_PICTURE = 120, 4


def drawn_scores(generator: torch.Generator, effects: list[float], seeds: int, seed_spread: float) -> torch.Tensor:
    """(A, S, Q) scores of arms that differ by ``effects``, with pictures and seeds that are easier or harder."""
    arms, questions = len(effects), PICTURES * PER_PICTURE
    shared = torch.randn(1, 1, PICTURES, generator=generator).repeat_interleave(PER_PICTURE, 2)
    own = 0.3 * torch.randn(arms, 1, PICTURES, generator=generator).repeat_interleave(PER_PICTURE, 2)
    seeds_AS = seed_spread * torch.randn(arms, seeds, 1, generator=generator)
    noise = 0.7 * torch.randn(arms, seeds, questions, generator=generator)
    return shared + own + seeds_AS + noise + torch.tensor(effects)[:, None, None]


def picture_of() -> torch.Tensor:
    return torch.arange(PICTURES).repeat_interleave(PER_PICTURE)


@pytest.mark.parametrize("seed_spread", [0.0, 0.05, 0.3])
def test_intervals_cover_the_truth(seed_spread: float) -> None:
    """Each alone in 95 % of the draws, and all three together in 95 %: binomial bounds at 400 draws are 2.2 points.

    The noise of the questions is counted in both parts of the variance, so that rather more is covered.
    """
    generator, draws = torch.Generator().manual_seed(1), 400
    names, pairs = ["base", "a", "b", "c"], [("a", "base"), ("b", "base"), ("c", "base")]
    alone = together = 0
    for number in range(draws):
        scores = drawn_scores(generator, [0.0, 0.0, 0.0, 0.0], 3, seed_spread)
        found = contrasts(scores, picture_of(), names, pairs, resamples=300, seed=number)
        alone += found[0].low <= 0 <= found[0].high
        together += all(each.corrected_low <= 0 <= each.corrected_high for each in found)
    assert 0.925 <= alone / draws <= 0.995
    assert 0.925 <= together / draws <= 0.998


def test_a_planted_difference_is_found_and_none_is_not() -> None:
    scores = drawn_scores(torch.Generator().manual_seed(2), [0.0, 0.3, 0.0, -0.3], 3, 0.02)
    names = ["base", "better", "same", "worse"]
    found = {each.arm: each for each in contrasts(scores, picture_of(), names, [(n, "base") for n in names[1:]])}
    assert found["better"].is_higher
    assert found["worse"].is_lower
    assert not found["same"].is_higher
    assert not found["same"].is_lower
    for each in found.values():
        assert each.corrected_low <= each.low <= each.value <= each.high <= each.corrected_high
        assert (len(each.by_seed), each.num_pictures, each.num_compared) == (3, PICTURES, 3)


def test_an_arm_that_is_noisier_counts_with_its_own_noise() -> None:
    """Twice the seed noise of the others: 95 % of the draws at 400, less 2.2 points."""
    generator, covered = torch.Generator().manual_seed(6), 0
    for number in range(400):
        scores = drawn_scores(generator, [0.0] * 6, 3, 0.03)
        scores[1] += 0.06 * torch.randn(3, 1, generator=generator)
        (found, *_) = contrasts(
            scores, picture_of(), list("abcdef"), [("b", "a"), ("c", "a")], resamples=300, seed=number
        )
        covered += found.low <= 0 <= found.high
    assert covered / 400 >= 0.925


def test_one_seed_gives_the_percentiles_of_a_plain_bootstrap() -> None:
    """Python's own loop over resampled pictures; the interval is normal where that one's is of percentiles."""
    scores = (drawn_scores(torch.Generator().manual_seed(3), [0.0, 0.1], 1, 0.0) > 0).double()
    (found,) = contrasts(scores, picture_of(), ["a", "b"], [("b", "a")], resamples=4000)
    differences = (scores[1] - scores[0])[0].reshape(PICTURES, PER_PICTURE).sum(1).tolist()
    generator = random.Random(0)
    draws = sorted(sum(generator.choices(differences, k=PICTURES)) / (PICTURES * PER_PICTURE) for _ in range(4000))
    assert found.value == pytest.approx(sum(differences) / (PICTURES * PER_PICTURE))
    # Standard error of a 2.5 % quantile of 4,000 draws is 0.04 standard errors of the mean, here about 0.001.
    assert found.low == pytest.approx(draws[100], abs=0.004)
    assert found.high == pytest.approx(draws[3899], abs=0.004)


def test_seeds_that_disagree_make_the_interval_wide() -> None:
    same = torch.zeros(2, 3, PICTURES * PER_PICTURE)
    apart = same.clone()
    apart[1] += torch.tensor([0.0, 0.1, 0.2])[:, None]
    (found,) = contrasts(apart, picture_of(), ["a", "b"], [("b", "a")])
    low, high = stats.t.interval(0.95, 2, loc=0.1, scale=0.1 / 3**0.5)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-3)
    (level,) = levels(apart[1:], picture_of())
    assert (level.low, level.high) == pytest.approx((low, high), rel=1e-3)


@pytest.mark.parametrize("dof", [2.0, 2.5, 4, 9.7, 40, 1e4])
def test_quantiles_are_those_of_scipy(dof: float) -> None:
    for probability in (0.9, 0.975, 0.9975, 0.9999):
        assert _t_quantile(probability, dof) == pytest.approx(stats.t.ppf(probability, dof), rel=1e-3)


def test_rank_correlation_is_that_of_scipy() -> None:
    generator = random.Random(4)
    one = [generator.choice([1.0, 2.0, 3.0, 4.5]) for _ in range(30)]
    two = [generator.random() for _ in range(30)]
    assert spearman(one, two) == pytest.approx(stats.spearmanr(one, two).statistic, abs=1e-9)


def test_smooth_curves_that_have_nothing_in_common_are_rarely_related() -> None:
    """Random walks: permuting layers would call more than half of these pairs related at 5 %."""
    generator = torch.Generator().manual_seed(5)
    walks = torch.randn(200, 2, 30, generator=generator).cumsum(2)
    related = [smooth_p_value(a.tolist(), b.tolist(), draws=400) <= 0.05 for a, b in walks]
    assert sum(related) / 200 < 0.15
    noise = torch.randn(200, 2, 30, generator=generator)
    related = [smooth_p_value(a.tolist(), b.tolist(), draws=400) <= 0.05 for a, b in noise]
    assert 0.01 < sum(related) / 200 < 0.1
    bump = [-abs(n - 11.0) for n in range(30)]
    assert smooth_p_value(bump, [2 * value for value in bump]) < 0.02


def test_holm_is_that_of_the_definition() -> None:
    p = [0.04, float("nan"), 0.001, 0.02]
    adjusted = holm(p)
    assert adjusted[0] == pytest.approx(0.04)
    assert adjusted[1] != adjusted[1]
    assert adjusted[2:] == pytest.approx([0.003, 0.04])
