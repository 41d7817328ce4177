"""Intervals, chance bands, peaks, and their judgement over all layers."""

import math

import pytest
import torch
from scipy import stats

from lightning_mm.core.estimate import Estimate
from lightning_mm.probes.cross_validation import bootstrap_weights
from lightning_mm.probes.intervals import (
    bootstrap_estimates,
    max_t_p_values,
    peak,
    plateau,
    widened,
    with_null,
)


def test_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    right_N = (torch.arange(400) % 5 > 0).float()
    groups_N = torch.arange(400)
    draws_LB = (bootstrap_weights(groups_N, 4000, 0) @ right_N / 400)[None]
    (found,) = bootstrap_estimates(right_N.mean()[None], draws_LB, n=400, k=2, groups=400)
    reach = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    # The quantiles of 4000 draws have sd of about 4 % of the reach.
    assert found.low == pytest.approx(0.8 - reach, abs=0.15 * reach)
    assert found.high == pytest.approx(0.8 + reach, abs=0.15 * reach)


def test_samples_of_a_group_count_once() -> None:
    right_N = (torch.arange(100) % 5 > 0).float().repeat_interleave(4)
    groups_N = torch.arange(100).repeat_interleave(4)
    draws_LB = (bootstrap_weights(groups_N, 4000, 0) @ right_N / 400)[None]
    (found,) = bootstrap_estimates(right_N.mean()[None], draws_LB, n=400, k=2, groups=100)
    reach = 1.96 * math.sqrt(0.8 * 0.2 / 100)
    assert found.low == pytest.approx(0.8 - reach, abs=0.15 * reach)


def test_a_faultless_score_is_not_certain() -> None:
    (found,) = bootstrap_estimates(torch.ones(1), torch.ones(1, 50), n=40, k=2, groups=20)
    assert found.low == pytest.approx(stats.binomtest(20, 20).proportion_ci(method="exact").low, rel=1e-9)
    assert found.high == 1


def test_intervals_stay_in_range_and_hold_the_value() -> None:
    draws_LB = 0.3 + 0.1 * torch.rand(1, 500, generator=torch.Generator().manual_seed(0))
    (found,) = bootstrap_estimates(torch.tensor([0.02]), draws_LB, n=30, k=2, groups=30)
    assert found.low == 0
    assert found.high is not None
    assert 0.02 < found.high < 0.1


def test_chance_band_is_normal_and_in_range() -> None:
    found = with_null(Estimate(0.6, n=10), 0.5, 0.1)
    assert (found.null, found.null_low, found.null_high) == pytest.approx((0.5, 0.304, 0.696), abs=1e-3)
    assert with_null(Estimate(0.6, n=10), 0.9, 0.1).null_high == 1
    assert with_null(Estimate(0.6, n=10), 0.5, None).null_high is None


def test_one_layer_has_the_p_value_of_its_rank() -> None:
    null_LB = 0.5 + 0.01 * torch.arange(-50, 49)[None]
    (found,) = max_t_p_values([Estimate(0.9, n=10, null=0.5)], null_LB.double())
    assert found.p_adjusted == pytest.approx((9 + 1) / (99 + 1)), "nine draws reach 0.9"


def test_the_best_of_many_layers_is_judged_as_the_best_of_many() -> None:
    """Independent layers: the adjusted p-value is that of Sidak, 1 - (1 - p)^L; alike layers: the p-value of one."""
    generator = torch.Generator().manual_seed(0)
    rows = [Estimate(0.72, n=10, null=0.5)] + [Estimate(0.5, n=10, null=0.5)] * 29
    independent_LB = 0.5 + 0.1 * torch.randn(30, 4000, generator=generator, dtype=torch.float64)
    single = float(stats.norm.sf(2.2))
    found = max_t_p_values(rows, independent_LB)
    # 4000 draws have a standard error of 0.008; the spread of each layer is estimated within 1 %.
    assert found[0].p_adjusted == pytest.approx(1 - (1 - single) ** 30, abs=0.03)
    assert found[1].p_adjusted > 0.99
    assert max_t_p_values(rows, independent_LB[:1].expand(30, -1))[0].p_adjusted == pytest.approx(single, abs=0.01)


def test_layers_without_value_or_spread_are_no_tests() -> None:
    null_LB = torch.stack(
        [0.5 + 0.1 * torch.randn(400).double(), torch.full((400,), math.nan), torch.full((400,), 0.5)]
    )
    undefined = Estimate.undefined_because("why", 10)
    found = max_t_p_values([Estimate(0.9, n=10, null=0.5), undefined, Estimate(0.5, n=10, null=0.5)], null_LB)
    assert found[0].p_adjusted < 0.01
    assert found[1] == undefined
    assert found[2].p_adjusted > 0.4


def test_variance_by_training_adds_to_that_by_testing() -> None:
    draws_LB = 0.6 + 0.1 * torch.randn(2, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = widened(torch.tensor([0.6, 0.7]).double(), draws_LB, torch.tensor([0.0, 0.01]).double(), groups=10**6)
    assert found.mean(1).tolist() == pytest.approx([0.6, 0.7], abs=1e-6)
    # 5000 draws: a standard deviation within 1 %, three times over.
    assert found.std(1).tolist() == pytest.approx([0.1, math.sqrt(0.02)], rel=0.03)
    few = widened(torch.tensor([0.6]).double(), draws_LB[:1], torch.zeros(1).double(), groups=12)
    assert float(few.std() / found[0].std()) == pytest.approx(2.201 / 1.96 * math.sqrt(12 / 11), rel=1e-3)


def rows(*levels: float | None) -> list[Estimate]:
    return [Estimate.undefined_because("why", 10) if v is None else Estimate(v, n=10, high=v + 0.05) for v in levels]


def test_peak_has_the_layers_where_draws_peak() -> None:
    generator = torch.Generator().manual_seed(0)
    level_L = torch.tensor([0.5, 0.70, 0.71, 0.5, 0.5])
    draws_LB = level_L[:, None] + 0.01 * torch.randn(5, 1000, generator=generator)
    assert peak(rows(*level_L.tolist()), draws_LB) == (2, 1, 2)


def test_peak_and_plateau_pass_over_undefined_layers() -> None:
    draws_LB = torch.tensor([[torch.nan], [0.6], [torch.nan], [0.8]]).repeat(1, 20)
    assert peak(rows(None, 0.6, None, 0.8), draws_LB) == (3, 3, 3)
    assert peak(rows(None, None), torch.full((2, 5), torch.nan)) is None
    assert plateau(rows(None, None)) is None
    assert plateau(rows(0.8, None, 0.78, 0.8, 0.79, 0.6, 0.79)) == (0, 0)
    assert plateau(rows(0.6, 0.78, 0.8, 0.79, 0.6, 0.79)) == (1, 3)


def test_a_score_of_nothing_is_not_certain_either() -> None:
    (found,) = bootstrap_estimates(torch.zeros(1), torch.zeros(1, 50), n=40, k=2, groups=20)
    assert found.low == 0
    assert found.high == pytest.approx(stats.binomtest(0, 20).proportion_ci(method="exact").high, rel=1e-9)
    (loss,) = bootstrap_estimates(torch.zeros(1), torch.zeros(1, 50), n=40, k=2, groups=20, most=math.inf)
    assert (loss.low, loss.high) == (0, 0), "a loss is no share of trials"
