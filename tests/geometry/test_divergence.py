"""Frechet distance and maximum mean discrepancy: closed forms, SciPy, chance."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from lightning_mm.core.estimate import Estimate, values
from lightning_mm.geometry.divergence import frechet, mmd
from lightning_mm.geometry.representations import Representations


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    root = sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root))


def test_frechet_as_scipy() -> None:
    x, y = noise(1, 90, 10) @ noise(10, 10, seed=2), noise(1, 90, 10, seed=1) + 0.4
    expected = by_scipy(x[0].double().numpy(), y[0].double().numpy())
    assert frechet(Representations.of(x), Representations.of(y))[0].value == pytest.approx(
        expected, rel=1e-4
    )  # float32 input


def test_frechet_in_the_leading_components() -> None:
    """Of a spectrum that decays the subspace iteration finds the same ones as a full decomposition."""
    scale = torch.arange(1, 61.0) ** -0.5
    x, y = noise(1, 300, 60) * scale, noise(1, 300, 60, seed=1) * scale + 0.1
    rows = torch.cat([x[0], y[0]]).double()
    leading = torch.linalg.svd(rows - rows.mean(0)).Vh[:8]
    expected = by_scipy(*((part[0].double() @ leading.T).numpy() for part in (x, y)))
    found = frechet(Representations.of(x), Representations.of(y), components=8)[0]
    assert found.value == pytest.approx(expected, rel=1e-3)
    assert found.k == 8


def test_frechet_of_isotropic_clouds() -> None:
    """||dmu||^2 + d (s1 - s2)^2 beyond the null, which has the bias of few samples; 4 standard errors of 20 clouds."""
    x, y = noise(20, 400, 8), noise(20, 400, 8, seed=1)
    same, moved = (
        frechet(Representations.of(x), Representations.of(y)),
        frechet(Representations.of(x), Representations.of(1.5 * y + 1)),
    )
    assert sum(e.null_low <= e.value <= e.null_high for e in same) >= 16
    beyond = torch.tensor(values(moved)) - torch.tensor(values(same))
    assert float(beyond.mean()) == pytest.approx(8 + 8 * 0.25, abs=4 * float(beyond.std()) / 20**0.5)
    assert all(e.low > e.null_high for e in moved)


def test_frechet_with_fewer_samples_than_components() -> None:
    found = frechet(Representations.of(noise(1, 30, 100)), Representations.of(noise(1, 30, 100, seed=1) + 3))[0]
    assert found.k == 59
    assert math.isfinite(found.value)
    assert found.low > found.null_high


def test_mmd_by_hand() -> None:
    """The average over ordered pairs i != j, with the median over all entries of the three distance matrices."""
    x, y = noise(1, 20, 3).double(), noise(1, 20, 3, seed=1).double() + 1
    within, across = [torch.cdist(z, z)[0].square() for z in (x, y)], torch.cdist(x, y)[0].square()
    scale = torch.cat([m.flatten() for m in (*within, across)]).median()
    k = [torch.exp(-m / (2 * scale)) for m in (*within, across)]
    total = sum(k[0][i, j] + k[1][i, j] - k[2][i, j] - k[2][j, i] for i in range(20) for j in range(20) if i != j)
    assert mmd(Representations.of(x), Representations.of(y))[0].value == pytest.approx(
        float(total) / (20 * 19), rel=1e-9
    )


def test_mmd_closed_form() -> None:
    """2 (s^2/(s^2+2))^(d/2) (1 - exp(-delta^2/(2(s^2+2)))) for unit Gaussians delta apart, with the s that was used.

    The median squared distance is nearly the same for all 20 clouds; 4 standard errors of them.
    """
    x, y = noise(20, 400, 5), noise(20, 400, 5, seed=1)
    y[..., 0] += 1
    found = torch.tensor(values(mmd(Representations.of(x), Representations.of(y))))
    clouds = torch.cat([x, y], 1)
    scale = float(torch.cdist(clouds, clouds).square().median())
    expected = 2 * (scale / (scale + 2)) ** 2.5 * (1 - math.exp(-1 / (2 * (scale + 2))))
    assert float(found.mean()) == pytest.approx(expected, abs=4 * float(found.std()) / 20**0.5 + 2e-4)


def test_mmd_of_one_law_is_within_the_band() -> None:
    found = mmd(Representations.of(noise(60, 60, 10)), Representations.of(noise(60, 60, 10, seed=1)))
    assert sum(e.null_low <= e.value <= e.null_high for e in found) >= 50
    measured = torch.tensor(values(found))
    assert float(measured.mean()) == pytest.approx(0, abs=4 * float(measured.std()) / 60**0.5)
    wider = mmd(Representations.of(noise(1, 100, 10)), Representations.of(1.6 * noise(1, 100, 10, seed=1)))[0]
    assert wider.low > wider.null_high, "another width with the same mean is another law"


def test_intervals_hold_the_expectation() -> None:
    """38 of 40 on average, less 4 standard deviations."""
    a, b = Representations.of(noise(40, 80, 6)), Representations.of(1.3 * noise(40, 80, 6, seed=1) + 0.7)
    for measure in (frechet, mmd):
        found = measure(a, b)
        mean = sum(values(found)) / 40
        assert sum(e.low <= mean <= e.high for e in found) >= 32


@pytest.mark.parametrize("measure", [frechet, mmd])
def test_the_band_of_chance_holds_as_much_as_it_should(measure: Callable[..., list[Estimate]]) -> None:
    """285 of 300 on average; 4 binomial standard deviations are 15."""
    found = measure(Representations.of(noise(300, 40, 5)), Representations.of(noise(300, 40, 5, seed=1)))
    assert sum(e.null_low <= e.value <= e.null_high for e in found) >= 270


def test_samples_of_a_group_raise_what_mmd_has_by_chance() -> None:
    groups = torch.arange(80) // 4
    x, y = (noise(40, 20, 6, seed=s)[:, groups] + 0.3 * noise(40, 80, 6, seed=s + 2) for s in (0, 1))
    found = mmd(Representations.of(x), Representations.of(y), groups)
    values_, nulls = torch.tensor(values(found)), torch.tensor([e.null for e in found])
    assert float(nulls.mean()) == pytest.approx(float(values_.mean()), abs=4 * float(values_.std()) / 40**0.5)
    assert float(nulls.min()) > 0


def test_frechet_of_a_cloud_with_itself_is_nothing() -> None:
    """Rounding is of either sign, and no distance is negative."""
    for seed in range(5):
        b = Representations.of(noise(1, 60, 20, seed=seed) + 3)
        found = frechet(b, b)[0]
        assert 0 <= found.low <= found.value <= found.high < 1e-5


@pytest.mark.parametrize("groups", [torch.tensor([0] * 19 + [1]), torch.zeros(20), torch.arange(20) // 19])
def test_frechet_where_a_deletion_leaves_nothing(groups: Tensor) -> None:
    a, b = Representations.of(noise(1, 20, 5)), Representations.of(noise(1, 20, 5, seed=1) + 1)
    found = frechet(a, b, groups=groups)[0]
    assert found.value == frechet(a, b)[0].value
    assert (found.low, found.high, found.null) == (None, None, None)
    assert found.notes[0].startswith("chance is not drawn: whole groups swap")


def test_frechet_where_one_deletion_leaves_equal_samples() -> None:
    """Three groups, of which one holds all that varies: no interval, and no crash."""
    x, y = torch.ones(1, 30, 4), torch.ones(1, 30, 4)
    x[0, 20:], y[0, 20:] = noise(10, 4), noise(10, 4, seed=1)
    found = frechet(Representations.of(x), Representations.of(y), groups=torch.arange(30) // 10)[0]
    assert found.value > 0
    assert (found.low, found.high) == (None, None)


def test_mmd_of_close_clusters_is_that_of_float64() -> None:
    """The median distance is one within a cluster, which a float32 Gram matrix does not know."""
    x, y = (1e-3 * noise(1, 90, 32, seed=s) for s in (0, 1))
    for part in (x, y):
        part[:, :60] += 5
    y[..., 0] += 1e-3
    found, exact = (
        mmd(Representations.of(x), Representations.of(y))[0],
        mmd(Representations.of(x.double()), Representations.of(y.double()))[0],
    )
    assert found.value == pytest.approx(exact.value, rel=1e-3)
