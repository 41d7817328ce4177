"""Intervals, chance bands, peaks and false discovery rates."""

import math

import pytest
import torch
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from lightning_mm.core.estimate import Estimate
from lightning_mm.probes.cross_validation import bootstrap_weights
from lightning_mm.probes.intervals import (
    benjamini_hochberg,
    bootstrap_estimates,
    mid_ranks,
    normal_null_band,
    p_value,
    peak,
    permuted_auroc,
    plateau,
)


def test_false_discovery_rates_equal_scipy() -> None:
    p_values = stats.uniform(0, 1).rvs(40, random_state=0) ** 3
    expected = stats.false_discovery_control(p_values)
    assert benjamini_hochberg(p_values.tolist()) == pytest.approx(expected.tolist(), rel=1e-12)


def test_undefined_layers_are_no_tests() -> None:
    rates = benjamini_hochberg([0.01, math.nan, 0.02])
    assert math.isnan(rates[1])
    assert [rates[0], rates[2]] == pytest.approx(benjamini_hochberg([0.01, 0.02]))


def test_mid_ranks_equal_scipy() -> None:
    scores = torch.randint(0, 6, (3, 2, 25), generator=torch.Generator().manual_seed(0)).float()
    assert mid_ranks(scores).tolist() == stats.rankdata(scores.numpy(), axis=2).tolist()


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


def test_chance_band_and_p_value() -> None:
    assert normal_null_band(0.5, 0.1) == pytest.approx({"null": 0.5, "null_low": 0.304, "null_high": 0.696}, abs=1e-3)
    assert normal_null_band(0.9, 0.1)["null_high"] == 1
    assert p_value(0.7, 0.5, 0.1) == pytest.approx(stats.norm.sf(2), rel=1e-6)
    assert p_value(0.9, 0.9, 0.0) == 1
    assert math.isnan(p_value(math.nan, 0.5, 0.1))


def test_chance_auroc_has_the_spread_of_mann_whitney() -> None:
    generator = torch.Generator().manual_seed(0)
    truth_AN = (torch.arange(60) < 20).long()[None]
    scores_LAN = torch.randn(1, 1, 60, generator=generator)
    draws_LB = permuted_auroc(scores_LAN, truth_AN, torch.zeros(60), torch.arange(60), 4000, 0)
    spread = math.sqrt(61 / (12 * 20 * 40))
    assert float(draws_LB.mean()) == pytest.approx(0.5, abs=4 * spread / 4000**0.5)
    assert float(draws_LB.std()) == pytest.approx(spread, rel=0.06)


def test_chance_auroc_moves_groups_as_wholes() -> None:
    generator = torch.Generator().manual_seed(0)
    truth_AN = (torch.arange(60) < 20).long().repeat_interleave(3)[None]
    scores_LAN = torch.randn(1, 1, 60, generator=generator).repeat_interleave(3, 2)
    order_N = torch.randperm(180, generator=generator)
    groups_N = torch.arange(60).repeat_interleave(3)
    draws_LB = permuted_auroc(
        scores_LAN[..., order_N], truth_AN[:, order_N], torch.zeros(180), groups_N[order_N], 2000, 0
    )
    # Three equal samples a group: 60 trials, not 180.
    assert float(draws_LB.std()) == pytest.approx(math.sqrt(61 / (12 * 20 * 40)), rel=0.1)


def test_auroc_of_calls_is_balanced_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    truth_N, called_N = (torch.rand(2, 50, generator=generator) < 0.4).long()
    area = roc_auc_score(truth_N.numpy(), called_N.numpy())
    assert area == pytest.approx(balanced_accuracy_score(truth_N.numpy(), called_N.numpy()))


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


def test_labels_dealt_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a draw at a time, as where there are many samples: never more than so many labels at once."""
    generator = torch.Generator().manual_seed(0)
    truth_AN, scores_LAN = (torch.rand(3, 60, generator=generator) < 0.3).long(), torch.randn(2, 3, 60).double()
    groups_N, strata_N = torch.arange(60) // 2, torch.arange(60) // 30
    whole = permuted_auroc(scores_LAN, truth_AN, strata_N, groups_N, 40, 0)
    monkeypatch.setattr("lightning_mm.probes.intervals._ENTRIES", 200)
    torch.testing.assert_close(permuted_auroc(scores_LAN, truth_AN, strata_N, groups_N, 40, 0), whole)
