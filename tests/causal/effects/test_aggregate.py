"""Averages over questions: the ratio of means against its closed forms, and its interval against simulation."""

import pytest
import torch
from scipy import stats

from lightning_mm.causal.effects.aggregate import layer_means, ratios_of_means
from lightning_mm.causal.questions.question import Question
from lightning_mm.core.estimate import Estimate


def asked(count: int, size: int = 1) -> list[Question]:
    """Questions, ``size`` of them about one picture."""
    return [Question(str(n), "?", (), (), group=f"picture {n // size}") for n in range(count)]


def ratio(effect_Q: torch.Tensor, fall_Q: torch.Tensor, size: int = 1) -> Estimate:
    return ratios_of_means(effect_Q[:, None], fall_Q, asked(len(fall_Q), size), "none")[0]


def test_a_ratio_of_means_is_that_and_its_interval_cochrans() -> None:
    generator = torch.Generator().manual_seed(0)
    fall_Q = torch.rand(20, generator=generator).double()
    effect_Q = 0.3 * fall_Q + 0.05 * torch.randn(20, generator=generator).double()
    found = ratio(effect_Q, fall_Q)
    value = float(effect_Q.mean() / fall_Q.mean())
    spread = float((effect_Q - value * fall_Q).square().sum() / 19) ** 0.5 / 20**0.5 / float(fall_Q.mean())
    assert found.value == pytest.approx(value, rel=1e-12)
    # Our quantile of Student's t is within 1 % of scipy's.
    assert found.high == pytest.approx(value + stats.t.ppf(0.975, 19) * spread, rel=1e-2)
    assert found.low == pytest.approx(value - stats.t.ppf(0.975, 19) * spread, rel=1e-2)
    assert (found.n, found.null) == (20, 0.0)


def test_effects_in_proportion_to_falls_have_no_spread() -> None:
    fall_Q = torch.tensor([0.9, 0.5, 0.01, 0.8, -0.02, 0.7, 0.6]).double()
    found = ratio(0.25 * fall_Q, fall_Q)
    assert found.value == pytest.approx(0.25, abs=1e-12)
    assert found.low == pytest.approx(0.25, abs=1e-9)


def test_layers_without_a_number_are_left_out_of_both_means() -> None:
    effect_QN = torch.tensor([[0.2, float("nan")], [0.4, 0.4], [0.3, float("nan")]]).double()
    first, second = ratios_of_means(effect_QN, torch.tensor([0.5, 0.8, 0.7]), asked(3), "none")
    assert (first.value, first.n) == (pytest.approx(0.45), 3)
    assert (second.value, second.n) == (pytest.approx(0.5), 1)
    assert second.low is None
    (empty,) = ratios_of_means(torch.full((3, 1), float("nan")), torch.ones(3), asked(3), "none")
    assert empty.undefined == "none"


def test_a_fall_that_is_not_clear_of_nothing_has_no_share() -> None:
    found = ratio(torch.tensor([0.1, 0.0, 0.1, 0.1]), torch.tensor([0.3, -0.2, 0.01, 0.05]))
    assert found.undefined.startswith("mean fall 0.04 is not clear of 0")


@pytest.mark.parametrize("size", [1, 4])
def test_its_interval_covers_and_a_mean_of_ratios_is_noisier(size: int) -> None:
    """800 simulated studies of 48 questions: true ratio 0.3, falls of 0.05 to 1, noise shared within a picture."""
    generator = torch.Generator().manual_seed(size)
    covered, ratios, means = 0, [], []
    for _ in range(800):
        fall_Q = 0.05 + 0.95 * torch.rand(48, generator=generator).double().square()
        shared = torch.randn(48 // size, generator=generator).double().repeat_interleave(size)
        effect_Q = 0.3 * fall_Q + 0.05 * (0.7 * shared + torch.randn(48, generator=generator).double())
        found = ratio(effect_Q, fall_Q, size)
        assert found.value is not None
        covered += found.low <= 0.3 <= found.high  # type: ignore[operator]
        ratios.append(found.value)
        means.append(layer_means((effect_Q / fall_Q)[:, None], asked(48, size), "none")[0].value)
    # 95 % of 800 within three standard errors of 0.8 points, and 1 point for 12 pictures' skewness.
    assert 0.917 < covered / 800 < 0.975
    assert torch.tensor(means).std() > 1.5 * torch.tensor(ratios).std()
