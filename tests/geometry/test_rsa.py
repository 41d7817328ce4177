"""RSA against scipy, and an error and null that know that pairs are not independent."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from lightning_mm.core.estimate import Estimate, values
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.resampling import jackknife_blocks, t_quantile
from lightning_mm.geometry.rsa import average_ranks, rsa


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, features: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    common, first, second = (noise(1, n, features, seed=10 * seed + part) for part in range(3))
    return first + share * common, second + share * common


def one(estimates: list[Estimate]) -> float:
    (estimate,) = estimates
    assert estimate.value is not None, estimate.undefined
    return estimate.value


@pytest.mark.parametrize(("n", "features"), [(5, 3), (40, 8), (60, 200)])
def test_the_value_is_that_of_scipy(n: int, features: int) -> None:
    """1e-9 in float64; 1e-4 where float32 rounds distances."""
    x, y = related(n, features, 1.0)
    expected = scipy.stats.spearmanr(pdist(x[0].numpy()), pdist(y[0].numpy()))[0]
    assert one(rsa(Representations.of(x), Representations.of(y))) == pytest.approx(expected, abs=1e-9)
    assert one(rsa(Representations.of(x.float()), Representations.of(y.float()))) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_share_their_mean_rank_in_any_precision(dtype: torch.dtype) -> None:
    """Small integers: most distances are tied, and rounding must not order them. 1e-4: where a value lies on the
    border of two steps, its ties may be split."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 3, (1, 40, 4), generator=generator) for _ in range(2))
    expected = scipy.stats.spearmanr(*(pdist(z[0].numpy(), "sqeuclidean") for z in (x, x + y)))[0]
    (estimate,) = rsa(Representations.of(x.to(dtype)), Representations.of((x + y).to(dtype)))
    assert estimate.value == pytest.approx(expected, abs=1e-4)
    assert "ties" in estimate.notes[0]


@given(arrays(np.float64, st.integers(1, 30), elements=st.integers(-3, 3).map(float)))
def test_ranks_are_those_of_scipy(array: np.ndarray) -> None:
    assert average_ranks(torch.from_numpy(array))[0].tolist() == scipy.stats.rankdata(array).tolist()


def test_only_the_order_of_the_distances_counts() -> None:
    """The features of a Gaussian kernel: its distances grow with the old ones, bent. 1e-5."""
    x = noise(1, 50, 4)
    kernel = torch.exp(-(torch.cdist(x[0], x[0]) ** 2) / 8)
    scale, vectors = torch.linalg.eigh(kernel)
    bent = (vectors * scale.clamp_min(0).sqrt())[None]
    assert one(rsa(Representations.of(x), Representations.of(bent))) == pytest.approx(1, abs=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 100), st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_rotation_scale_and_shift_change_nothing(seed: int, scale: float, shift: float) -> None:
    """1e-5: a distance on the border of two steps may change sides."""
    x, y = (Representations.of(z) for z in related(30, 5, 1.0, seed))
    moved = Representations.of(scale * (x.features @ torch.linalg.qr(noise(5, 5, seed=seed))[0]) + shift)
    assert one(rsa(moved, y)) == pytest.approx(one(rsa(x, y)), abs=1e-5)
    assert one(rsa(moved, x)) == pytest.approx(1, abs=1e-5)


def test_the_null_knows_that_pairs_are_not_independent() -> None:
    """400 pairings of 40 samples: sd within 15 %, twice what independent pairs would have; 95 % in the band."""
    x, y = noise(1, 40, 3), noise(1, 40, 3, seed=1)
    estimate = rsa(Representations.of(x), Representations.of(y))[0]
    generator = torch.Generator().manual_seed(0)
    drawn = [
        one(rsa(Representations.of(x), Representations.of(y[:, torch.randperm(40, generator=generator)])))
        for _ in range(400)
    ]
    width = (estimate.null_high - estimate.null_low) / (2 * 1.96)
    assert width == pytest.approx(np.std(drawn), rel=0.15)
    assert width > 2 / math.sqrt(40 * 39 / 2)
    assert 0.02 < np.mean([not estimate.null_low < value < estimate.null_high for value in drawn]) < 0.09
    assert estimate.null == 0


def test_the_interval_is_a_jackknife_of_the_correlation_of_ranks() -> None:
    """1e-6 against numpy on the pairs of the samples that stay."""
    x, y = related(30, 4, 1.0)
    ranks = [squareform(scipy.stats.rankdata(pdist(z[0].numpy()))) for z in (x, y)]
    left_out = []
    for block in jackknife_blocks(30):
        kept = np.setdiff1d(np.arange(30), block.numpy())
        pairs = np.ix_(kept, kept)
        left_out.append(np.corrcoef(*(squareform(rank[pairs]) for rank in ranks))[0, 1])
    error = math.sqrt(len(left_out) - 1) * np.std(left_out)
    estimate = rsa(Representations.of(x), Representations.of(y))[0]
    assert estimate.high - estimate.value == pytest.approx(t_quantile(len(left_out) - 1) * error, abs=1e-6)


def test_the_interval_is_as_wide_as_the_value_varies() -> None:
    """Over 60 data sets: the mean width against 2 t(11) sd; 0.7 to 1.5 for the error of either."""
    found = [rsa(*(Representations.of(z) for z in related(100, 4, 1.0, seed)))[0] for seed in range(60)]
    width = np.mean([e.high - e.low for e in found]) / (2 * 2.2)
    assert 0.7 < width / np.std(values(found)) < 1.5


def test_a_part_of_many_samples_is_told_and_always_the_same() -> None:
    x, y = (Representations.of(z) for z in related(120, 5, 2.0))
    (part,) = rsa(x, y, most=60)
    assert part.n == 60
    assert part.notes == ("60 of 120 samples",)
    assert part == rsa(x, y, most=60)[0]
    assert part.value == pytest.approx(one(rsa(x, y)), abs=0.1)
    assert rsa(x, y, most=120)[0].notes == ()


def test_captions_of_one_picture_raise_the_null() -> None:
    x, y = (Representations.of(z.repeat_interleave(4, 1)) for z in (noise(1, 25, 5), noise(1, 25, 5, seed=1)))
    alone, together = rsa(x, y)[0], rsa(x, y, groups=torch.arange(100) // 4)[0]
    assert together.null > 0.02 + alone.null
    assert together.null_high - together.null_low > 1.5 * (alone.null_high - alone.null_low)


def test_degenerate_layers_are_undefined_beside_sound_ones() -> None:
    x = noise(4, 30, 30)
    x[1] = 3.0
    x[2, 0, 0] = math.nan
    x[3] = torch.eye(30)
    for dtype in (torch.float64, torch.float32):
        reasons = [
            e.undefined
            for e in rsa(Representations.of(x.to(dtype)), Representations.of(noise(4, 30, 5, seed=1).to(dtype)))
        ]
        assert [reason.split(":")[0] for reason in reasons] == ["", "constant", "not finite", "no order"]
    assert rsa(Representations.of(noise(1, 3, 5)), Representations.of(noise(1, 3, 5)))[0].undefined.startswith(
        "too few"
    )


def test_correlation_distance_is_that_of_scipy() -> None:
    """Neither the length of a sample nor a shift of all its features counts; 1e-5: float32 ranks in a matrix."""
    x, y = noise(1, 60, 12) + 3, noise(1, 60, 12) + 0.5 * noise(1, 60, 12, seed=1)
    expected = scipy.stats.spearmanr(*(pdist(z[0].numpy(), "correlation") for z in (x, y))).statistic
    found = rsa(Representations.of(x), Representations.of(y), distance="correlation")[0]
    assert found.value == pytest.approx(expected, abs=1e-5)
    lengths, shifts = torch.linspace(0.1, 9, 60)[:, None], torch.linspace(-5, 5, 60)[:, None]
    assert rsa(Representations.of(x * lengths + shifts), Representations.of(y), distance="correlation")[
        0
    ].value == pytest.approx(found.value, abs=1e-3)
    x[0, 5] = 2.0
    reason = rsa(Representations.of(x), Representations.of(y), distance="correlation")[0].undefined
    assert reason == "no correlation: 1 samples have equal features"


def test_the_order_within_close_clusters_is_not_rounding() -> None:
    """Two clusters a thousand times farther apart than wide: within one, float32 and float64 agree on every rank."""
    near, other = 1e-3 * noise(1, 80, 16), 1e-3 * noise(1, 80, 16, seed=1)
    near[:, :40] += 5
    other[:, :40] += 5
    exact = rsa(Representations.of(near.float().double()), Representations.of(other.float().double()))[0]
    found = rsa(Representations.of(near.float()), Representations.of(other.float()))[0]
    assert found.value == pytest.approx(exact.value, abs=1e-3)
    assert not any(note.startswith("ties") for note in found.notes)
