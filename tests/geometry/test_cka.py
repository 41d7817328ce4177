"""CKA against the printed formulas, its invariances, its nulls, and the traps that other tools fell into."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from lightning_mm.core.estimate import Estimate, values
from lightning_mm.geometry.cka import cka, cka_biased, cka_matrix, cka_rbf
from lightning_mm.geometry.hsic import hsic, leave_out_hsic, u_center
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.resampling import jackknife_blocks, leave_out_masks


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def related(n: int, features: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two (1, N, D) representations with a common part of this share."""
    common, first, second = (noise(1, n, features, seed=10 * seed + part) for part in range(3))
    return first + share * common, second + share * common


def one(estimates: list[Estimate]) -> float:
    (estimate,) = estimates
    assert estimate.value is not None, estimate.undefined
    return estimate.value


def song(first: np.ndarray, second: np.ndarray) -> float:
    """HSIC_1, equation 5 of Song et al. 2012, as printed."""
    n = len(first)
    k, m, one_n = first - np.diag(np.diag(first)), second - np.diag(np.diag(second)), np.ones(n)
    whole = np.trace(k @ m) + (one_n @ k @ one_n) * (one_n @ m @ one_n) / ((n - 1) * (n - 2))
    return (whole - 2 / (n - 2) * one_n @ k @ m @ one_n) / (n * (n - 3))


def reference(first: np.ndarray, second: np.ndarray) -> float:
    return song(first, second) / math.sqrt(song(first, first) * song(second, second))


def biased_reference(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


@pytest.mark.parametrize(("n", "features", "other"), [(4, 3, 2), (20, 5, 5), (30, 100, 7), (101, 3, 200)])
def test_debiased_cka_is_the_printed_formula(n: int, features: int, other: int) -> None:
    """1e-9 relative in float64, 1e-5 in float32 (rounding of the Gram matrix)."""
    x, y = noise(1, n, features), noise(1, n, other, seed=1) + noise(1, n, features)[..., :1]
    expected = reference((x[0] @ x[0].T).numpy(), (y[0] @ y[0].T).numpy())
    assert one(cka(Representations.of(x), Representations.of(y))) == pytest.approx(expected, abs=1e-9)
    assert one(cka(Representations.of(x.float()), Representations.of(y.float()))) == pytest.approx(expected, abs=1e-5)
    assert float(cka_matrix(Representations.of(x), Representations.of(y))) == pytest.approx(expected, abs=1e-9)


def test_hsic_is_the_printed_formula_and_u_centring_is_its_inner_product() -> None:
    first, second = (x @ x.mT for x in (noise(2, 12, 4), noise(2, 12, 3, seed=1)))
    expected = [song(k, m) for k, m in zip(first.numpy(), second.numpy(), strict=True)]
    assert hsic(first, second).tolist() == pytest.approx(expected, rel=1e-9)
    centered = u_center(first)
    assert centered.sum(1).abs().max() < 1e-12
    assert centered.diagonal(dim1=1, dim2=2).abs().max() == 0


def test_biased_cka_is_the_printed_formula() -> None:
    x, y = related(40, 10, 1.0)
    found = one(cka_biased(Representations.of(x), Representations.of(y)))
    assert found == pytest.approx(biased_reference(x[0].numpy(), y[0].numpy()), rel=1e-9)


def test_rbf_cka_is_the_printed_formula() -> None:
    """60 samples: the median is that of all ordered pairs."""
    x, y = related(60, 10, 1.0)
    grams = []
    for features in (x, y):
        distances = pdist(features[0].numpy())
        sigma = 0.7 * np.sort(np.repeat(distances, 2))[len(distances) - 1]
        grams.append(squareform(np.exp(-(distances**2) / (2 * sigma**2))))
    assert one(cka_rbf(Representations.of(x), Representations.of(y), scale=0.7)) == pytest.approx(
        reference(*grams), rel=1e-6
    )


@pytest.mark.parametrize("debiased", [True, False])
def test_leaving_blocks_out_equals_computing_without_them(debiased: bool) -> None:
    x, y = related(50, 5, 1.0)
    grams = [g - g.mean(0) - g.mean(1)[:, None] + g.mean() for g in (z[0] @ z[0].T for z in (x, y))]
    if debiased:
        grams = [g.fill_diagonal_(0) for g in grams]
    found = leave_out_hsic(*grams, leave_out_masks(grams[0], None), debiased)
    for value, block in zip(found[1:], jackknife_blocks(50), strict=True):
        kept = np.setdiff1d(np.arange(50), block.numpy())
        first, second = (g.numpy()[np.ix_(kept, kept)] for g in grams)
        if debiased:
            expected = song(first, second)
        else:
            centering = np.eye(len(kept)) - 1 / len(kept)
            expected = np.trace(first @ centering @ second @ centering)
        assert float(value) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 100), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_rotation_scale_and_shift_change_nothing(seed: int, scale: float, shift: float) -> None:
    """1e-9: float64; a shift of 100 costs two digits."""
    x, y = related(30, 6, 1.0, seed)
    rotation = torch.linalg.qr(noise(6, 6, seed=seed))[0]
    moved = Representations.of(scale * (x @ rotation) + shift)
    for measure in (cka, cka_biased, cka_rbf):
        assert one(measure(moved, Representations.of(y))) == pytest.approx(
            one(measure(Representations.of(x), Representations.of(y))), abs=1e-9
        )
        assert one(measure(moved, Representations.of(x))) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("measure", [cka, cka_biased, cka_rbf])
def test_an_invertible_map_changes_the_value(measure) -> None:  # type: ignore[no-untyped-def]
    x = noise(1, 200, 10)
    assert one(measure(Representations.of(x), Representations.of(x * torch.logspace(-1, 1, 10)))) < 0.8


@pytest.mark.parametrize("measure", [cka, cka_biased, cka_rbf])
def test_the_order_of_two_banks_and_of_the_samples_does_not_matter(measure) -> None:  # type: ignore[no-untyped-def]
    x, y = related(40, 6, 1.0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    forward = measure(Representations.of(x), Representations.of(y))[0]
    assert one(measure(Representations.of(y), Representations.of(x))) == pytest.approx(forward.value, abs=1e-12)
    assert one(measure(Representations.of(x[:, order]), Representations.of(y[:, order]))) == pytest.approx(
        forward.value, abs=1e-12
    )


def test_more_features_than_samples_does_not_make_unrelated_data_alike() -> None:
    """Noise of 410 features and 250 samples has biased CKA 0.62 (measures: 0.621 at 2500 x 4096); debiased is 0 within
    3 standard deviations of chance, sqrt(2/(n(n-3)))."""
    x, y = noise(1, 250, 410), noise(1, 250, 410, seed=1)
    biased, debiased = (
        cka_biased(Representations.of(x), Representations.of(y))[0],
        cka(Representations.of(x), Representations.of(y))[0],
    )
    assert biased.value == pytest.approx(0.622, abs=0.005)
    assert biased.null == pytest.approx(410 / (249 + 410), abs=0.003)
    assert abs(debiased.value or 0) < 3 * math.sqrt(2 / (250 * 247))
    assert debiased.null == 0


@pytest.mark.parametrize(("n", "features", "power"), [(100, 4096, 0.0), (250, 30, 0.0), (500, 400, 1.0)])
def test_the_biased_null_is_the_closed_form(n: int, features: int, power: float) -> None:
    """[(1+(N-1)/PR_x)(1+(N-1)/PR_y)]^(-1/2): 0.976 for 100 x 4096. 6 %: sampled spectra."""
    spectrum = torch.arange(1, features + 1, dtype=torch.float64) ** -power
    ratio = float(spectrum.sum() ** 2 / spectrum.square().sum())
    x, y = (noise(1, n, features, seed=seed) * spectrum.sqrt() for seed in (0, 1))
    estimate = cka_biased(Representations.of(x), Representations.of(y))[0]
    assert estimate.null == pytest.approx(1 / (1 + (n - 1) / ratio), rel=0.06)
    assert estimate.null_low is not None
    assert estimate.null_high is not None
    assert estimate.null_low < (estimate.value or 0) < estimate.null_high


def test_a_negative_value_is_returned_as_it_is() -> None:
    found = values(cka(Representations.of(noise(40, 20, 30)), Representations.of(noise(40, 20, 30, seed=1))))
    assert any(value < 0 for value in found)
    assert abs(sum(found) / 40) < 3 * math.sqrt(2 / (20 * 17) / 40)


def test_one_feature_with_a_large_spread_decides_linear_cka() -> None:
    """A trap to know (Davari et al. 2022): unrelated layers that share one massive feature."""
    x, y = noise(1, 200, 50, dtype=torch.float32), noise(1, 200, 50, seed=1, dtype=torch.float32)
    assert abs(one(cka(Representations.of(x), Representations.of(y)))) < 0.05
    x[..., 0] = y[..., 0] = 100 * noise(200, seed=2, dtype=torch.float32)
    assert one(cka(Representations.of(x), Representations.of(y))) > 0.99


def test_a_feature_with_a_large_mean_changes_nothing_in_float32() -> None:
    """1e-4: at 1000, float32 coordinates carry 6e-5."""
    x, y = (z.float() for z in related(100, 20, 1.0))
    expected = one(cka(Representations.of(x), Representations.of(y)))
    x[..., 3] += 1000
    assert one(cka(Representations.of(x), Representations.of(y))) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_no_scale_is_too_small_or_too_large_for_float32(scale: float) -> None:
    x, y = (z.float() for z in related(50, 20, 1.0))
    expected = one(cka(Representations.of(x), Representations.of(y)))
    assert one(cka(Representations.of(x * scale), Representations.of(y))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("measure", [cka, cka_biased, cka_rbf])
def test_what_has_no_structure_is_undefined_beside_sound_layers(measure) -> None:  # type: ignore[no-untyped-def]
    x = noise(3, 20, 5)
    x[1] = 3.0
    x[2, 0, 0] = math.nan
    for estimates in (
        measure(Representations.of(x), Representations.of(noise(3, 20, 5))),
        measure(Representations.of(noise(3, 20, 5)), Representations.of(x)),
    ):
        assert estimates[0].value is not None
        assert "constant" in estimates[1].undefined
        assert "not finite" in estimates[2].undefined
    assert "too few" in measure(Representations.of(noise(1, 3, 5)), Representations.of(noise(1, 3, 5)))[0].undefined


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_equally_far_from_one_another_have_no_self_similarity(dtype: torch.dtype) -> None:
    simplex, other = Representations.of(torch.eye(30, dtype=dtype)[None]), Representations.of(noise(1, 30, 5).to(dtype))
    assert "equally far" in cka(simplex, other)[0].undefined
    assert "equally far" in cka_rbf(other, simplex)[0].undefined
    assert cka_matrix(simplex, other).isnan().all()


def test_no_bandwidth_where_most_samples_coincide() -> None:
    x = torch.zeros(1, 30, 4)
    x[0, :3] = torch.eye(3, 4)
    assert "coincide" in cka_rbf(Representations.of(x), Representations.of(noise(1, 30, 4)))[0].undefined


def test_the_matrix_is_cka_of_every_pair() -> None:
    """1e-5: float32 sums in another order. 700 samples: several pieces."""
    x, y = noise(3, 700, 8, dtype=torch.float32), noise(2, 700, 5, seed=1, dtype=torch.float32)
    x[1] += x[0]
    y[0] += x[0, :, :5]
    x[2] = 1000 + 1e-4 * x[2]  # rounding of float32 is all that is left of it
    matrix = cka_matrix(Representations.of(x), Representations.of(y))
    assert matrix.shape == (3, 2)
    for i, row in enumerate(matrix[:2].tolist()):
        for j, value in enumerate(row):
            assert value == pytest.approx(
                one(cka(Representations.of(x[i : i + 1]), Representations.of(y[j : j + 1]))), abs=1e-5
            )
    assert matrix[2].isnan().all()
    own = cka_matrix(Representations.of(x))
    assert own.diagonal()[:2].tolist() == [1.0, 1.0]
    assert torch.equal(own[:2, :2], own[:2, :2].T)
    assert own[2].isnan().all()
    assert own[:, 2].isnan().all()


def test_too_few_samples_give_an_empty_matrix() -> None:
    assert cka_matrix(Representations.of(noise(2, 3, 5))).isnan().all()


def test_the_interval_holds_the_value_of_the_population() -> None:
    """Common variance 1 of 2 in both: CKA of the covariances is 0.5^2 = 0.25. 85 % of 60 intervals at least: they are
    symmetric, and N is 120."""
    held = 0
    for seed in range(60):
        estimate = cka(*(Representations.of(z) for z in related(120, 8, 1.0, seed)))[0]
        assert estimate.low is not None
        assert estimate.high is not None
        held += estimate.low < 0.25 < estimate.high
    assert 51 <= held < 60


@pytest.mark.parametrize("measure", [cka, cka_rbf])
def test_captions_of_one_picture_widen_the_interval_and_raise_the_null(measure) -> None:  # type: ignore[no-untyped-def]
    """Four near copies of each of 40 pictures: intervals twice as wide; 1.5 for the error of a mean of 10 widths."""
    groups, widths = torch.arange(160) // 4, []
    for seed in range(10):
        all_reps = [
            Representations.of(z.repeat_interleave(4, 1) + 0.1 * noise(1, 160, 6, seed=part))
            for part, z in enumerate(related(40, 6, 1.0, seed))
        ]
        alone, together = measure(*all_reps)[0], measure(*all_reps, groups=groups)[0]
        assert together.value == alone.value
        assert together.null > alone.null_high
        widths.append((alone.high - alone.low, together.high - together.low))
    narrow, wide = (sum(width) for width in zip(*widths, strict=True))
    assert wide > 1.5 * narrow


def test_looking_leaves_the_world_alone() -> None:
    x = noise(1, 20, 4).requires_grad_()
    before, grad = torch.get_rng_state(), torch.is_grad_enabled()
    cka(Representations.of(x), Representations.of(x))
    cka_matrix(Representations.of(x))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled() == grad
    assert x.grad is None


def test_the_same_call_gives_the_same_numbers() -> None:
    x, y = related(60, 5, 0.5)
    groups = torch.arange(60) // 2
    for measure in (cka, cka_rbf, cka_biased):
        assert measure(Representations.of(x), Representations.of(y), groups=groups) == measure(
            Representations.of(x), Representations.of(y), groups=groups
        )


def test_kernels_of_close_clusters_are_those_of_float64() -> None:
    """The median distance is one within a cluster, which a float32 Gram matrix does not know."""
    x, y = (1e-3 * noise(1, 90, 32, seed=s) for s in (0, 1))
    x, y = x.float(), (x + 0.5 * y).float()
    for part in (x, y):
        part[:, :60] += 5
    found, exact = (
        cka_rbf(Representations.of(x), Representations.of(y))[0],
        cka_rbf(Representations.of(x.double()), Representations.of(y.double()))[0],
    )
    assert found.value == pytest.approx(exact.value, abs=1e-4)
