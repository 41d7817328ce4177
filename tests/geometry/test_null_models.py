"""The null of a match of two matrices is the mean over all pairings, and its band is where they fall."""

import math
from itertools import permutations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.hsic import u_center
from lightning_mm.geometry.null_models import MantelTerms, adjust_for_chance, pearson_quantiles, permutation_band

N = 6


def gram(seed: int, features: int = 2) -> Tensor:
    x = torch.randn(N, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.arange(1, N + 1)[:, None]  # samples of uneven norm
    x = x - x.mean(0)
    return x @ x.T


def all_pairings(first: Tensor, second: Tensor) -> np.ndarray:
    """The match under each of the 720 pairings."""
    orders = torch.tensor(list(permutations(range(N))))
    return (torch.stack([(first * second[o][:, o]).sum() for o in orders]) / (first.norm() * second.norm())).numpy()


def spread(band: dict[str, float], a: MantelTerms, b: MantelTerms) -> float:
    """The standard deviation that a band was made with: the distance of its ends over that of the quantiles."""
    shape = [float((p.pairs @ p.pairs * p.pairs).sum() / p.pairs.norm() ** 3) for p in (a, b)]
    low, high = pearson_quantiles(8**0.5 * shape[0] * shape[1])
    return (band["null_high"] - band["null_low"]) / (high - low)


def test_debiased_products_have_mean_0_and_variance_2_over_n_n_minus_3_whatever_the_data() -> None:
    first, second = u_center(gram(0)), u_center(gram(1))
    a, b = (MantelTerms(x, norm=float(x.norm())) for x in (first, second))
    drawn, band = all_pairings(first, second), permutation_band(a, b)
    assert drawn.mean() == pytest.approx(0, abs=1e-12)
    assert drawn.var() == pytest.approx(2 / (N * (N - 3)), rel=1e-9)
    assert spread(band, a, b) == pytest.approx(drawn.std(), rel=1e-9)
    assert band["null"] == 0


def test_biased_products_have_their_exact_mean_and_variance() -> None:
    first, second = gram(0), gram(1)
    a, b = MantelTerms.of_gram(first), MantelTerms.of_gram(second)
    constant = float(first.trace() * second.trace()) / ((N - 1) * a.norm * b.norm)
    drawn, band = all_pairings(first, second), permutation_band(a, b, constant=constant)
    assert band["null"] == pytest.approx(drawn.mean(), rel=1e-9)
    assert spread(band, a, b) == pytest.approx(drawn.std(), rel=1e-9)


def test_distances_have_the_variance_of_mantel() -> None:
    """Correlation of off-diagonal entries with mean zero, as RSA has them."""
    matrices = []
    for seed in (0, 1):
        x = torch.cdist(g := gram(seed), g)
        x -= x.sum() / (N * (N - 1))
        matrices.append(x.fill_diagonal_(0))
    a, b = (MantelTerms.of_distances(x) for x in matrices)
    drawn, band = all_pairings(*matrices), permutation_band(a, b)
    assert drawn.mean() == pytest.approx(0, abs=1e-12)
    assert spread(band, a, b) == pytest.approx(drawn.std(), rel=1e-9)


@pytest.mark.parametrize(("features", "skewed"), [(1, True), (40, False)])
def test_the_band_holds_95_percent_of_pairings(features: int, skewed: bool) -> None:
    """One direction gives a chi-square, many a normal. 2.5 % above within 3 sd of the count of 2000 pairings; below,
    a chi-square has a wall, not a tail, and the third moment places it to a few percent."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(60, features, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = u_center(x @ x.T), u_center(y @ y.T)
    band = permutation_band(*(MantelTerms(m, norm=float(m.norm())) for m in (first, second)))
    orders = [torch.randperm(60, generator=generator) for _ in range(2000)]
    drawn = torch.stack([(first * second[o][:, o]).sum() for o in orders]) / (first.norm() * second.norm())
    assert 0.014 < (drawn > band["null_high"]).double().mean() < 0.036
    assert 0 < (drawn < band["null_low"]).double().mean() < (0.1 if skewed else 0.036)
    assert (band["null_high"] > -1.5 * band["null_low"]) == skewed


def test_the_shape_of_the_band_is_read_from_a_part_of_many_samples() -> None:
    """One direction: in units of the standard deviation the band is that of the full matrix, within 2 %."""
    x = torch.randn(1100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in (1100, 400):
        pairs = u_center(x[:n] @ x[:n].T)
        part = MantelTerms(pairs, norm=float(pairs.norm()))
        high = permutation_band(part, part)["null_high"] / math.sqrt(2 / (n * (n - 3)))
        assert high == pytest.approx(pearson_quantiles(8**0.5)[1], rel=0.02)


def test_pictures_that_several_samples_share_raise_the_null() -> None:
    """Four captions per picture, unrelated pictures: the copies match one another in any pairing of the pictures."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(80) // 4
    x, y = (torch.randn(20, 5, generator=generator)[groups] for _ in range(2))
    a, b = (MantelTerms(m := u_center(z @ z.T), norm=float(m.norm())) for z in (x, y))
    alone, together = permutation_band(a, b), permutation_band(a, b, groups)
    assert together["null"] > 0.1 > alone["null_high"]
    assert permutation_band(a, b, torch.arange(80)) == alone


@pytest.mark.parametrize("skewness", [-1.0, 0.0, 0.5, 1.5, 8**0.5])
def test_quantiles_are_those_of_pearson_iii(skewness: float) -> None:
    """0.07: Wilson and Hilferty's cube root is rough at the largest skewness only."""
    exact = scipy.stats.pearson3.ppf([0.025, 0.975], skewness)
    assert pearson_quantiles(skewness) == pytest.approx(tuple(exact), abs=0.07)


def test_calibrated() -> None:
    estimate = Estimate(0.6, n=10, low=0.2, high=1.0, null=0.2, null_low=0.0, null_high=0.4, k=3)
    scaled = adjust_for_chance(estimate)
    found = (scaled.value, scaled.low, scaled.high, scaled.null, scaled.null_low, scaled.null_high)
    assert found == pytest.approx((0.5, 0, 1, 0, -0.25, 0.25))
    assert scaled.k == 3
    assert adjust_for_chance(Estimate.undefined_because("constant", 5)).undefined == "constant"
    assert adjust_for_chance(Estimate(1.0, n=5, null=1.0)).undefined
    assert adjust_for_chance(Estimate(1.0, n=5)).undefined
