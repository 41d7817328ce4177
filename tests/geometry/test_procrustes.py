"""Procrustes against scipy, its metric properties, and what chance alone reaches."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_mm.core.estimate import Estimate, values
from lightning_mm.geometry.procrustes import expected_nuclear_norm, procrustes, procrustes_angle
from lightning_mm.geometry.representations import Representations


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, features: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    common, first, second = (noise(1, n, features, seed=10 * seed + part) for part in range(3))
    return first + share * common, second + share * common


def one(estimates: list[Estimate]) -> float:
    (estimate,) = estimates
    assert estimate.value is not None, estimate.undefined
    return estimate.value


@pytest.mark.parametrize(("n", "features"), [(60, 8), (20, 50), (30, 30)])
def test_the_value_is_that_of_scipy(n: int, features: int) -> None:
    """1e-10 in float64, 1e-5 in float32. scipy's disparity is 1 - similarity^2; its scale is the nuclear norm."""
    x, y = related(n, features, 1.0)
    found = one(procrustes(Representations.of(x), Representations.of(y)))
    centered = [(z[0] - z[0].mean(0)).numpy() for z in (x, y)]
    assert found == pytest.approx(math.sqrt(1 - scipy.spatial.procrustes(*centered)[2]), abs=1e-10)
    _, scale = scipy.linalg.orthogonal_procrustes(*(z / np.linalg.norm(z) for z in centered))
    assert found == pytest.approx(scale, abs=1e-10)
    assert one(procrustes(Representations.of(x.float()), Representations.of(y.float()))) == pytest.approx(
        found, abs=1e-5
    )


def test_fewer_features_count_as_padded_with_zeros() -> None:
    x, y = noise(1, 40, 5), noise(1, 40, 9, seed=1)
    padded = torch.cat([x, torch.zeros(1, 40, 4)], 2)
    assert one(procrustes(Representations.of(x), Representations.of(y))) == pytest.approx(
        one(procrustes(Representations.of(padded), Representations.of(y)))
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 100), st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_rotation_scale_and_shift_change_nothing(seed: int, scale: float, shift: float) -> None:
    x, y = (Representations.of(z) for z in related(30, 5, 1.0, seed))
    moved = Representations.of(scale * (x.features @ torch.linalg.qr(noise(5, 5, seed=seed))[0]) + shift)
    assert one(procrustes(moved, y)) == pytest.approx(one(procrustes(x, y)), abs=1e-9)
    assert one(procrustes(moved, x)) == pytest.approx(1, abs=1e-9)
    assert one(procrustes_angle(moved, x)) == pytest.approx(0, abs=1e-4)  # arccos next to 1


def test_an_invertible_map_changes_the_value() -> None:
    x = noise(1, 200, 10)
    assert one(procrustes(Representations.of(x), Representations.of(x * torch.logspace(-1, 1, 10)))) < 0.9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 3), st.integers(2, 12))
def test_the_angle_obeys_the_triangle_inequality(seed: int, share: float, n: int) -> None:
    x, y = (Representations.of(z) for z in related(n + 1, 4, share, seed))
    z = Representations.of(x.features + share * noise(1, n + 1, 4, seed=seed))
    x_y, y_z, x_z = (one(procrustes_angle(*pair)) for pair in ((x, y), (y, z), (x, z)))
    assert x_y <= y_z + x_z + 1e-6
    assert x_y == pytest.approx(one(procrustes_angle(y, x)), abs=1e-6)


def test_an_angle_keeps_its_ends_in_order() -> None:
    x, y = (Representations.of(z) for z in related(60, 5, 1.0))
    similarity, angle = procrustes(x, y)[0], procrustes_angle(x, y)[0]
    assert math.cos(angle.value) == pytest.approx(similarity.value)
    assert angle.low < angle.value < angle.high
    assert angle.null_low < angle.null < angle.null_high
    assert math.cos(angle.high) == pytest.approx(similarity.low)
    assert procrustes_angle(Representations.of(torch.ones(1, 9, 2)), Representations.of(torch.ones(1, 9, 2)))[
        0
    ].undefined


@pytest.mark.parametrize(("n", "features", "other"), [(200, 10, 10), (120, 80, 119), (50, 400, 400), (200, 30, 5)])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_null_is_the_mean_over_pairings(n: int, features: int, other: int, power: float) -> None:
    """4 % against 20 pairings, for fewer and more features than samples; the band holds all of them."""
    x, y = (noise(1, n, d, seed=d) * torch.arange(1, d + 1) ** (-power / 2) for d in (features, other + 1))
    estimate = procrustes(Representations.of(x), Representations.of(y))[0]
    generator = torch.Generator().manual_seed(0)
    drawn = [
        one(procrustes(Representations.of(x), Representations.of(y[:, torch.randperm(n, generator=generator)])))
        for _ in range(20)
    ]
    assert estimate.null == pytest.approx(np.mean(drawn), rel=0.04)
    assert estimate.null_low < min(drawn)
    assert max(drawn) < estimate.null_high


@pytest.mark.parametrize("n", [3, 40])
def test_chance_matches_a_rotation_of_everything_and_a_quarter_circle(n: int) -> None:
    """1e-3: the quadrature. A few of many directions: 8/(3 pi) p^1.5 / sqrt(N)."""
    assert expected_nuclear_norm(torch.ones(n), torch.ones(n), n) == pytest.approx(n, rel=1e-3)
    few = expected_nuclear_norm(torch.ones(n), torch.ones(n), 100_000)
    assert few == pytest.approx(8 / (3 * math.pi) * n**1.5 / math.sqrt(100_000), rel=2e-3)


def test_the_interval_is_as_wide_as_the_value_varies() -> None:
    """Over 80 data sets: the mean width against 2 t(199) sd; 0.75 to 1.35 for the error of either."""
    found = [procrustes(*(Representations.of(z) for z in related(200, 4, 1.0, seed)))[0] for seed in range(80)]
    width = np.mean([e.high - e.low for e in found]) / (2 * 1.97)
    assert 0.75 < width / np.std(values(found)) < 1.35


def test_captions_of_one_picture_double_the_interval_and_raise_the_null() -> None:
    """Four copies of each: the width of N/4 samples, t(49) for t(199)."""
    x, y = related(50, 6, 1.0)
    copies = [Representations.of(z.repeat_interleave(4, 1)) for z in (x, y)]
    once, alone = procrustes(Representations.of(x), Representations.of(y))[0], procrustes(*copies)[0]
    together = procrustes(*copies, groups=torch.arange(200) // 4)[0]
    assert together.high - together.low == pytest.approx(once.high - once.low, rel=1e-6)
    assert together.high - together.low > 1.9 * (alone.high - alone.low)
    assert together.null == pytest.approx(once.null, rel=0.15)
    assert alone.null < 0.6 * once.null


def test_degenerate_layers_are_undefined_beside_sound_ones() -> None:
    x = noise(3, 40, 5)
    x[1] = 3.0
    x[2, 0, 0] = math.nan
    reasons = [e.undefined for e in procrustes(Representations.of(x), Representations.of(noise(3, 40, 5, seed=1)))]
    assert [reason.split(":")[0] for reason in reasons] == ["", "constant", "not finite"]
    assert procrustes(Representations.of(noise(1, 2, 5)), Representations.of(noise(1, 2, 5)))[0].undefined.startswith(
        "too few"
    )
