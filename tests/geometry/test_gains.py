"""Gains over a reference on the same samples: the difference of two measures, with an interval of its own."""

import pytest
import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.information_imbalance import imbalance_gain, information_imbalance
from lightning_mm.geometry.knn_overlap import overlap, overlap_gain
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.representations import Representations


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(strength: float, n: int = 200) -> tuple[Tensor, Tensor]:
    """Two readings that share a signal; the second of their layers has a little less noise than the first."""
    signal, one, other = (noise(1, n, 6, seed=seed) for seed in (0, 1, 2))
    layers = torch.tensor([1.0, strength])[:, None, None]
    return signal + layers * one, signal + layers * other


def near(x: Tensor) -> Neighbors:
    return Neighbors.of(Representations.of(x))


def width(e: Estimate) -> float:
    assert e.low is not None
    assert e.high is not None
    return e.high - e.low


def unpaired(one: Estimate, other: Estimate) -> float:
    """The width that two independent measurements would give their difference."""
    return (width(one) ** 2 + width(other) ** 2) ** 0.5


@pytest.mark.parametrize("groups", [None, torch.arange(200) // 2])
def test_a_gain_of_overlap_is_the_difference_and_surer_than_it(groups: Tensor | None) -> None:
    a, b = correlated(0.9)
    first, second = overlap(near(a), near(b), 10, groups)
    reference = near(a[:1]), near(b[:1])
    same, gain = overlap_gain(near(a), near(b), reference, 10, groups)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert gain.value == pytest.approx((second.value or 0) - (first.value or 0), abs=1e-12)
    assert gain.null == 0
    assert (gain.n, gain.k) == (200, 10)
    assert width(gain) < 0.8 * unpaired(first, second)


def test_a_gain_of_foretelling_is_the_difference_and_surer_than_it() -> None:
    a, b = (Representations.of(x) for x in correlated(0.95))
    first, second = information_imbalance(a, b)
    same, gain = imbalance_gain(a, b)
    assert same.value == 0
    assert gain.value == pytest.approx((first.value or 0) - (second.value or 0), abs=1e-12)
    assert gain.null == 0
    assert width(gain) < unpaired(first, second)


def test_chance_gains_nothing() -> None:
    """40 unrelated layers against an unrelated first one: 95 % intervals that hold 0, 3 standard deviations allowed."""
    a, b = noise(41, 150, 8, seed=3), noise(41, 150, 8, seed=4)
    gains = overlap_gain(near(a), near(b), (near(a[:1]), near(b[:1])), 10)
    told = imbalance_gain(Representations.of(a), Representations.of(b))
    for found in (gains[1:], told[1:]):
        assert sum(e.low <= 0 <= e.high for e in found) >= 34  # type: ignore[operator]


def test_without_a_rival_there_is_no_gain() -> None:
    """Embeddings of the last prompt token are the same for every picture: nothing to be better than."""
    a, b = correlated(0.9)
    flat = torch.ones_like(a[:1])
    for found in (
        overlap_gain(near(a), near(b), (near(flat), near(b[:1])), 10),
        imbalance_gain(Representations.of(torch.cat([flat, a])), Representations.of(torch.cat([b[:1], b]))),
    ):
        assert all(e.value is None and "coincide" in e.undefined for e in found)
    unknown = a.clone()
    unknown[1, 3] = torch.nan
    sound, broken = overlap_gain(near(unknown), near(b), (near(a[:1]), near(b[:1])), 10)
    assert sound.value == 0
    assert "not finite" in broken.undefined
    sound, broken = imbalance_gain(Representations.of(unknown), Representations.of(b))
    assert sound.value == 0
    assert "not finite" in broken.undefined
