"""Information imbalance: what is known of it, ties, chance."""

import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor

from lightning_mm.core.estimate import values
from lightning_mm.geometry.information_imbalance import conditional_ranks, information_imbalance
from lightning_mm.geometry.representations import Representations


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def both(first: Tensor, second: Tensor, k: int = 1) -> tuple[float, float]:
    a, b = Representations.of(first), Representations.of(second)
    return information_imbalance(a, b, k)[0].value, information_imbalance(b, a, k)[0].value


@pytest.mark.parametrize("k", [1, 5])
def test_identical_banks_have_the_least_there_is(k: int) -> None:
    x = noise(1, 300, 4)
    assert both(x, -2 * x + 1, k) == pytest.approx([(k + 1) / 300] * 2, rel=1e-12)


def test_functions_of_one_another() -> None:
    """DADApy at N = 1000 on another draw: a difference of 3 sd of 0.02, less where the value is near 0."""
    x, plane = noise(1, 1000, 1), noise(1, 1000, 2, seed=1)
    assert both(x, x.exp()) == pytest.approx((0.002, 0.002), abs=0.001)
    assert both(x, x.square()) == pytest.approx((0.004, 0.664), abs=0.06)
    assert both(plane, plane[..., :1]) == pytest.approx((0.049, 0.554), abs=0.06)


def test_unrelated_banks_are_at_one() -> None:
    found = information_imbalance(Representations.of(noise(50, 200, 6)), Representations.of(noise(50, 200, 6, seed=1)))
    measured = torch.tensor(values(found))
    assert float(measured.mean()) == pytest.approx(1, abs=4 * float(measured.std()) / 50**0.5)
    assert (found[0].null_high - 1) / 1.96 == pytest.approx(1 / (3 * 200) ** 0.5, rel=0.01)
    assert sum(e.low <= 1 <= e.high for e in found) >= 43, "95 % of 50, less 3 standard deviations"
    assert float(measured.std()) < 1.5 * (found[0].null_high - 1) / 1.96, "samples share neighbours, as _SHARED says"


def test_ranks_are_those_of_scipy_with_ties() -> None:
    """A small lattice has many equal distances; self is not ranked."""
    x = torch.randint(0, 3, (1, 40, 2), generator=torch.Generator().manual_seed(0)).double()
    squared = Representations.of(x).squared_distances(0)
    chosen = torch.stack([torch.arange(1, 41) % 40, torch.arange(3, 43) % 40], 1)
    found = conditional_ranks(chosen, squared)
    for i in range(40):
        others = torch.cat([torch.arange(i), torch.arange(i + 1, 40)])
        ranks = dict(zip(others.tolist(), rankdata(squared[i, others]), strict=True))
        assert found[i].tolist() == [ranks[int(j)] for j in chosen[i]]


def test_groups_widen_the_interval_and_nothing_else() -> None:
    x = noise(1, 60, 5).repeat_interleave(4, 1) + 0.3 * noise(1, 240, 5, seed=1)
    y = x + 0.3 * noise(1, 240, 5, seed=2)
    plain, grouped = (
        information_imbalance(Representations.of(x), Representations.of(y), groups=g)[0]
        for g in (None, torch.arange(240) // 4)
    )
    assert plain.value == grouped.value
    assert grouped.high - grouped.low != plain.high - plain.low


def test_close_samples_are_ranked_by_what_tells_them_apart() -> None:
    """Two clusters 5000 times farther apart than wide: a float32 Gram matrix alone read identical all_reps as 0.4."""
    z = (1e-3 * noise(1, 200, 64)).float()
    z[:, :100] += 5
    assert both(z, z) == pytest.approx((0.01, 0.01), rel=1e-9)
    other = z + 5e-4 * noise(1, 200, 64, seed=1).float()
    assert both(z, other) == pytest.approx(both(z.double(), other.double()), abs=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_near_copies_of_unrelated_pictures_are_at_their_chance(k: int) -> None:
    """60 pictures three times over: the nearest is the copy in both all_reps, and so it is for any other picture."""
    groups = torch.arange(180) // 3
    found = [
        information_imbalance(*(Representations.of(copies(seed + part)) for part in (0, 1)), k=k, groups=groups)[0]
        for seed in range(0, 40, 2)
    ]
    assert sum(e.null_low <= e.value <= e.null_high for e in found) >= 15, "95 % of 20, less 4 standard deviations"
    assert max(e.null for e in found) < 0.5
    assert information_imbalance(Representations.of(copies(0)), Representations.of(copies(1)))[0].null == 1


def copies(seed: int) -> Tensor:
    return noise(1, 60, 8, seed=seed).repeat_interleave(3, 1) + 0.01 * noise(1, 180, 8, seed=1000 + seed)


def test_related_pictures_are_beyond_chance_despite_their_copies() -> None:
    groups, x = torch.arange(180) // 3, noise(1, 60, 3)
    a, b = ((x + 0.1 * noise(1, 60, 3, seed=s)).repeat_interleave(3, 1) for s in (1, 2))
    a, b = a + 0.01 * noise(1, 180, 3, seed=3), b + 0.01 * noise(1, 180, 3, seed=4)
    found = information_imbalance(Representations.of(a), Representations.of(b), k=6, groups=groups)[0]
    assert found.high < found.null_low
