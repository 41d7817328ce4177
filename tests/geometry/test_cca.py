"""SVCCA and PWCCA against scipy and the printed formulas; few samples never look like a perfect match."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from torch import Tensor

from lightning_mm.core.estimate import Estimate, values
from lightning_mm.geometry.cca import pwcca, svcca
from lightning_mm.geometry.null_models import adjust_for_chance
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.resampling import jackknife_blocks, jackknife_error, t_quantile


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, features: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    common, first, second = (noise(1, n, features, seed=10 * seed + part) for part in range(3))
    return first + share * common, second + share * common


def one(estimates: list[Estimate]) -> float:
    (estimate,) = estimates
    assert estimate.value is not None, estimate.undefined
    return estimate.value


def leading(x: np.ndarray, variance: float) -> np.ndarray:
    """The samples along the directions that hold this share of the variance."""
    left, scale, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    count = int(np.sum(np.cumsum(scale**2) / np.sum(scale**2) < variance)) + 1
    return left[:, :count]


@pytest.mark.parametrize("variance", [0.7, 0.95])
def test_svcca_is_the_mean_cosine_of_the_angles_between_the_leading_subspaces(variance: float) -> None:
    """1e-8: scipy takes sines of small angles."""
    x, y = related(300, 8, 1.0)
    x, y = x * torch.linspace(3, 0.5, 8), y * torch.linspace(2, 0.2, 8)
    (estimate,) = svcca(Representations.of(x), Representations.of(y), variance)
    bases = [leading(z[0].numpy(), variance) for z in (x, y)]
    assert estimate.value == pytest.approx(np.cos(subspace_angles(*bases)).mean(), abs=1e-8)
    assert estimate.k == min(basis.shape[1] for basis in bases)
    assert estimate.notes == ()


def test_pwcca_is_the_printed_formula() -> None:
    """1e-8."""
    x, y = related(200, 6, 1.0)
    x = x * torch.linspace(2, 0.5, 6)
    centered = (x[0] - x[0].mean(0)).numpy()
    q_x, q_y = (np.linalg.qr(z - z.mean(0))[0] for z in (x[0].numpy(), y[0].numpy()))
    left, rho, _ = np.linalg.svd(q_x.T @ q_y)
    weights = np.abs((q_x @ left).T @ centered).sum(1)
    assert one(pwcca(Representations.of(x), Representations.of(y))) == pytest.approx(
        (weights / weights.sum() * rho).sum(), abs=1e-8
    )


def test_pwcca_weighs_by_its_first_argument() -> None:
    """What they share is nearly all of one side and little of the other."""
    shared, x, y = noise(1, 300, 1), noise(1, 300, 5, seed=1), noise(1, 300, 5, seed=2)
    loud, quiet = (
        Representations.of(torch.cat([30 * shared, x], 2)),
        Representations.of(torch.cat([0.3 * shared, y], 2)),
    )
    assert one(pwcca(loud, quiet)) > 0.7 > 0.3 > one(pwcca(quiet, loud))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 100), st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_rotation_scale_and_shift_change_nothing(seed: int, scale: float, shift: float) -> None:
    """1e-9: float64."""
    x, y = (Representations.of(z) for z in related(80, 5, 1.0, seed))
    moved = Representations.of(scale * (x.features @ torch.linalg.qr(noise(5, 5, seed=seed))[0]) + shift)
    assert one(svcca(moved, y)) == pytest.approx(one(svcca(x, y)), abs=1e-9)
    for measure in (svcca, pwcca):
        assert one(measure(y, moved)) == pytest.approx(one(measure(y, x)), abs=1e-9)
        assert one(measure(x, moved)) == pytest.approx(1, abs=1e-9)
    assert one(pwcca(Representations.of(scale * x.features + shift), y)) == pytest.approx(one(pwcca(x, y)), abs=1e-9)


def test_all_directions_are_blind_to_invertible_maps() -> None:
    x, y = related(200, 5, 1.0)
    mixed = x @ (noise(5, 5, seed=3) + 3 * torch.eye(5))
    everything = [one(svcca(Representations.of(z), Representations.of(y), variance=1.0)) for z in (x, mixed)]
    assert everything[0] == pytest.approx(everything[1], abs=1e-9)


def test_float32_agrees_with_float64_where_one_feature_is_a_hundred_times_the_others() -> None:
    """1e-3: their squares are 1e-4 of its square, which float32 knows to 1e-7."""
    x, y = related(200, 10, 1.0)
    x[..., 0] *= 100
    for measure in (svcca, pwcca):
        found, exact = (
            one(measure(Representations.of(x.float()), Representations.of(y.float()))),
            one(measure(Representations.of(x), Representations.of(y))),
        )
        assert found == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("measure", [svcca, pwcca])
@pytest.mark.parametrize(("n", "features"), [(30, 50), (100, 400), (60, 60)])
def test_few_samples_never_look_like_a_match(measure, n: int, features: int) -> None:  # type: ignore[no-untyped-def]
    """With N <= directions every canonical correlation is 1; so no more than N/10 are used, and that is told."""
    unrelated = measure(Representations.of(noise(1, n, features)), Representations.of(noise(1, n, features, seed=1)))[0]
    assert unrelated.k == n // 10
    assert unrelated.value < 0.6
    assert f"{n // 10} of {'' if measure is svcca else min(n - 1, features)}" in unrelated.notes[0]
    assert "10 samples for each" in unrelated.notes[0]


def test_fewer_than_ten_samples_are_too_few() -> None:
    assert svcca(Representations.of(noise(1, 9, 3)), Representations.of(noise(1, 9, 3)))[0].undefined.startswith(
        "too few: 9"
    )
    assert one(svcca(Representations.of(noise(1, 10, 3)), Representations.of(noise(1, 10, 3)))) == pytest.approx(1)


@pytest.mark.parametrize("measure", [svcca, pwcca])
def test_the_null_is_what_unrelated_data_score(measure) -> None:  # type: ignore[no-untyped-def]
    """40 layers of noise: their mean within 2 % of the mean null; at most 6 outside a 95 % band."""
    found = measure(Representations.of(noise(40, 200, 12)), Representations.of(noise(40, 200, 20, seed=1)))
    nulls = [estimate.null for estimate in found]
    assert sum(values(found)) / sum(nulls) == pytest.approx(1, abs=0.02)
    assert sum(not e.null_low < e.value < e.null_high for e in found) <= 6
    # Mean rho^2 over all pairings is max(p, q)/(N-1): the mean of rho is a little below its root.
    assert 0.85 * math.sqrt(20 / 199) < nulls[0] < math.sqrt(20 / 199)
    assert adjust_for_chance(found[0]).null == 0


def test_mean_squared_correlation_of_unrelated_data_is_max_p_q_over_n_minus_1() -> None:
    """One direction each: rho itself is |r|, and its mean square 1/(N-1). 15 %: 600 layers."""
    found = svcca(Representations.of(noise(600, 20, 1)), Representations.of(noise(600, 20, 1, seed=1)))
    assert np.mean(np.square(values(found))) == pytest.approx(1 / 19, rel=0.15)


@pytest.mark.parametrize("measure", [svcca, pwcca])
def test_the_interval_is_as_wide_as_the_value_varies(measure) -> None:  # type: ignore[no-untyped-def]
    """Over 60 data sets: the mean width against 2 t(11) sd; 0.7 to 1.5 for the error of either."""
    found = [measure(*(Representations.of(z) for z in related(150, 4, 1.0, seed)))[0] for seed in range(60)]
    width = np.mean([e.high - e.low for e in found]) / (2 * 2.2)
    assert 0.7 < width / np.std(values(found)) < 1.5


def test_captions_of_one_picture_widen_the_interval_and_raise_the_null() -> None:
    x, y = (Representations.of(z.repeat_interleave(4, 1)) for z in related(50, 4, 1.0))
    groups = torch.arange(200) // 4
    alone, together = svcca(x, y)[0], svcca(x, y, groups=groups)[0]
    assert together.high - together.low > 1.3 * (alone.high - alone.low)
    assert together.null > 1.5 * alone.null


def test_a_direction_that_one_block_alone_spans_leaves_no_interval() -> None:
    x = noise(1, 40, 2)
    x[..., 1] = 0
    x[0, 7, 1] = 1.0
    (estimate,) = svcca(Representations.of(x), Representations.of(x), variance=1.0)
    assert estimate.value == pytest.approx(1)
    assert (estimate.low, estimate.high) == (None, None)


@pytest.mark.parametrize("measure", [svcca, pwcca])
def test_degenerate_layers_are_undefined_beside_sound_ones(measure) -> None:  # type: ignore[no-untyped-def]
    x = noise(3, 40, 5)
    x[1] = 3.0
    x[2, 0, 0] = math.nan
    reasons = [e.undefined for e in measure(Representations.of(x), Representations.of(noise(3, 40, 5, seed=1)))]
    assert [reason.split(":")[0] for reason in reasons] == ["", "constant", "not finite"]


def test_directions_below_rounding_are_not_directions() -> None:
    """Rank 2 in 20 features."""
    x, y = noise(1, 200, 2) @ noise(2, 20, seed=1), noise(1, 200, 20, seed=2)
    assert pwcca(Representations.of(x), Representations.of(y))[0].k == 2
    assert pwcca(Representations.of(x.float()), Representations.of(y.float()))[0].k == 2


def test_the_jackknife_of_pwcca_weighs_by_the_samples_that_stay() -> None:
    """Leaving a block out is the same as never having had it: loadings, correlations and all."""
    x, y = related(60, 4, 1.0)
    x = x * torch.tensor([3.0, 1.0, 0.5, 0.2])
    x[:, :6] *= 4
    (found,) = pwcca(Representations.of(x), Representations.of(y))
    left_out = []
    for block in jackknife_blocks(60):
        kept = torch.ones(60, dtype=torch.bool).index_fill(0, block, False)
        left_out.append(one(pwcca(Representations.of(x[:, kept]), Representations.of(y[:, kept]))))
    error = jackknife_error(torch.tensor(left_out, dtype=torch.float64))
    assert found.value - found.low == pytest.approx(t_quantile(11) * float(error), rel=1e-6)
