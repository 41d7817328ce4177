"""Intrinsic dimension: laws of the ratios, clouds of known dimension, copies, ties, calibration."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.intrinsic_dimension import (
    Gride,
    TwoNN,
    calibrated_dimension,
    calibration_curve,
    gride,
    log_ratios,
    noise_dimension,
    two_nn,
)
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.representations import Representations


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(features: Tensor, k: int = 32) -> Neighbors:
    return Neighbors.of(Representations.of(features), k)


@pytest.mark.parametrize("dimension", [1.0, 12.0, 300.0])
def test_pareto_ratios(dimension: float) -> None:
    """(1-U)^(-1/d) is r2/r1 exactly; the maximum likelihood error is d/sqrt(N-2), the fit's at most 1.5 times that."""
    uniform = torch.rand(1, 4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratios = -torch.log1p(-uniform) / dimension
    error = dimension / 3998**0.5
    assert float(TwoNN("ml")(ratios)) == pytest.approx(dimension, abs=4 * error)
    assert float(TwoNN("fit")(ratios)) == pytest.approx(dimension, abs=4 * 1.5 * error)
    assert float(Gride(1, 2)(ratios)) == pytest.approx(float(TwoNN("ml")(ratios)), rel=1e-9)  # the same equation


@pytest.mark.parametrize("dimension", [2.0, 12.0, 300.0])
def test_beta_ratios(dimension: float) -> None:
    """(r16/r32)^d is Beta(16, 16) exactly; independent samples make Fisher's error the right one."""
    torch.manual_seed(0)
    shares = torch.distributions.Beta(16.0, 16.0).sample((20, 2000)).double()
    ratios = -shares.log() / dimension
    found = Gride()(ratios)
    error = Gride().fisher_error(ratios, found)
    assert float(found.mean()) == pytest.approx(dimension, abs=4 * float(error.mean()) / 20**0.5)
    assert float(found.std()) == pytest.approx(float(error.mean()), rel=0.5)  # of 20: the sd of an sd is 0.16


CLOUDS = {
    "gaussian": lambda n, d: noise(1, n, d),
    "sphere": lambda n, d: torch.nn.functional.normalize(noise(1, n, d + 1), dim=2),
    "cube": lambda n, d: torch.rand(1, n, d, generator=torch.Generator().manual_seed(d)),
}


@pytest.mark.parametrize(
    ("cloud", "dimension", "first", "second"),
    [
        ("gaussian", 2, 1.98, 2.04),
        ("gaussian", 10, 9.53, 8.83),
        ("gaussian", 50, 34.1, 26.1),
        ("sphere", 5, 4.84, 4.87),
        ("sphere", 20, 16.4, 14.8),
        ("cube", 2, 2.01, 1.91),
        ("cube", 10, 8.55, 7.92),
        ("cube", 50, 31.3, 26.5),
    ],
)
def test_clouds_of_known_dimension(cloud: str, dimension: int, first: float, second: float) -> None:
    """What DADApy says of other draws of 2500: 4 sd of a difference, sd 1.25 d/sqrt(N) for TwoNN, half for GRIDE."""
    found = near(CLOUDS[cloud](2500, dimension))
    assert float(TwoNN()(log_ratios(found, 1, 2))) == pytest.approx(first, abs=max(0.3, 4 * 2**0.5 * 1.25 * first / 50))
    assert float(Gride()(log_ratios(found, 16, 32))) == pytest.approx(
        second, abs=max(0.3, 4 * 2**0.5 * 0.6 * second / 50)
    )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_scale_place_and_rotation_do_not_matter(seed: int, scale: float) -> None:
    x = noise(1, 60, 6, seed=seed).double()
    moved = scale * x @ torch.linalg.qr(noise(6, 6, seed=seed + 1).double()).Q + 7
    for measure in (two_nn, gride):
        assert measure(near(moved))[0].value == pytest.approx(measure(near(x))[0].value, rel=1e-8)


def test_padding_changes_nothing() -> None:
    """Rows that a sampler repeats are left out: the same numbers as without them, and a note."""
    x = noise(2, 300, 8)
    padded = torch.cat([x, x[:, :40], x[:, :10]], 1)
    for measure in (two_nn, lambda each: two_nn(each, "ml"), gride):
        plain, with_copies = measure(near(x, 64)), measure(near(padded, 64))
        for before, after in zip(plain, with_copies, strict=True):
            assert after.value == pytest.approx(before.value, rel=1e-4)  # the mean that is subtracted differs
            assert (after.n, after.notes) == (300, ("50 samples that coincide with an earlier one are left out",))
    naive = near(padded, 2).distances[0]
    assert not torch.isfinite((naive[:, 1] / naive[:, 0]).log().sum()), "copies do spoil the plain ratio"


def test_a_rogue_dimension_changes_nothing() -> None:
    x = noise(1, 400, 30)
    shifted = x.clone()
    shifted[..., 4] += 1000
    assert two_nn(near(shifted))[0].value == pytest.approx(two_nn(near(x))[0].value, rel=0.01)  # rounding at 1000: 6e-5


def test_quantised_coordinates_are_told() -> None:
    x = (4 * noise(1, 300, 2)).round() / 4
    found = two_nn(near(x, 64))[0]
    assert any("coincide with an earlier one are left out" in note for note in found.notes)
    assert any("are equally far" in note for note in found.notes)
    grid = torch.cartesian_prod(torch.arange(15.0), torch.arange(15.0))[None]
    assert two_nn(near(grid))[0].undefined == "ties: neighbours 1 and 2 are equally far for 225 samples"


def test_too_few_distinct_samples() -> None:
    assert two_nn(near(noise(1, 15, 3)))[0].undefined.startswith("too few: 15 distinct samples")
    assert gride(near(noise(1, 30, 3)))[0].undefined == "too few: neighbour 32 of 30 samples"
    mostly_copies = noise(1, 12, 3)[:, torch.arange(200) % 12]
    assert two_nn(near(mostly_copies, 64))[0].value is None


def test_the_interval_holds_the_expectation() -> None:
    """95 % of 60, less 4 standard deviations; and it is not absurdly wide."""
    found = near(noise(60, 200, 20))
    for measure in (two_nn, gride):
        each = measure(found)
        mean = sum(e.value for e in each) / 60
        assert sum(e.low <= mean <= e.high for e in each) >= 50
        spread = torch.tensor([e.value for e in each]).std()
        assert sum(e.high - e.low for e in each) / 60 < 2 * 2 * 2.2 * float(spread)


def test_isotropic_noise_is_at_its_null() -> None:
    found = two_nn(near(noise(1, 500, 100)))[0]
    assert found.low < found.null < found.high
    flat = two_nn(near(noise(1, 500, 3) @ noise(3, 100, seed=1)))[0]
    assert flat.high < flat.null / 5


@pytest.mark.parametrize("estimator", [TwoNN(), Gride()], ids=["two_nn", "gride"])
def test_calibration_undoes_the_bias(estimator: TwoNN | Gride) -> None:
    """At 500 samples 40 dimensions read as 30 or 20; the inverse is right within 3 standard deviations."""
    found = near(noise(1, 500, 40, seed=3))
    raw = two_nn(found) if isinstance(estimator, TwoNN) else gride(found)
    assert raw[0].value < 35
    fixed = calibrated_dimension(raw, estimator)[0]
    assert fixed.value == pytest.approx(40, abs=9)
    assert fixed.low < 40 < fixed.high
    points = calibration_curve(500, estimator)
    assert points[0] == (0.0, 0.0)
    assert all(low < high for (_, low), (_, high) in pairwise(points))
    far = calibrated_dimension([Estimate(1e4, n=500)], estimator)[0]
    assert far.undefined.startswith("beyond the calibration curve")


def test_isotropic_high_dimension_reads_far_too_low() -> None:
    """4096 dimensions at N = 2500 read as 387; a smaller cloud behaves alike and is quick."""
    assert 120 < noise_dimension(1000, 1000, TwoNN()) < 250


@pytest.mark.parametrize("measure", [two_nn, gride])
def test_one_group_gives_no_interval(measure) -> None:  # type: ignore[no-untyped-def]
    found = near(noise(1, 60, 5))
    alone = measure(found, groups=torch.zeros(60))[0]
    assert alone.value == measure(found)[0].value
    assert (alone.low, alone.high) == (None, None)


def test_the_null_is_computed_where_the_samples_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """N^2 D products of a large reps are not for the CPU; the meta device stands for a GPU and has no numbers."""
    asked = []

    def null(n: int, width: int, estimator: TwoNN | Gride, device: torch.device) -> float:
        asked.append(device)
        return 1.0

    monkeypatch.setattr("lightning_mm.geometry.intrinsic_dimension.noise_dimension", null)
    two_nn(near(noise(1, 60, 5)))
    assert asked == [torch.device("cpu")]
