"""Distance correlation: the definition by loops of NumPy, its null, its interval, and data without distances."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mm.geometry.distance_correlation import distance_correlation
from lightning_mm.geometry.representations import Representations


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_definition(x: np.ndarray, y: np.ndarray, unit_rows: bool) -> float:
    """Szekely et al. 2007, definition 4: doubly centered distance matrices, their mean products."""

    def centered(z: np.ndarray) -> np.ndarray:
        z = z / np.linalg.norm(z, axis=1, keepdims=True) if unit_rows else z
        distances = np.array([[np.linalg.norm(one - other) for other in z] for one in z])
        return distances - distances.mean(0) - distances.mean(1)[:, None] + distances.mean()

    a, b = centered(x), centered(y)
    return float(np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean())))


@pytest.mark.parametrize("unit_rows", [True, False])
def test_as_defined(unit_rows: bool) -> None:
    x, y = noise(2, 40, 6) + 0.5, noise(2, 40, 3, seed=1)
    y[..., 0] += x[..., 0]
    found = distance_correlation(Representations.of(x), Representations.of(y), unit_rows)
    for layer, each in enumerate(found):
        expected = by_definition(x[layer].double().numpy(), y[layer].double().numpy(), unit_rows)
        assert each.value == pytest.approx(expected, abs=1e-6)  # the mean is taken off and put back in float32
        assert each.low is not None
        assert each.high is not None
        assert each.low < expected < each.high


def test_unrelated_data_lie_in_the_band_of_chance_and_far_from_zero() -> None:
    x, y = noise(20, 60, 8), noise(20, 60, 8, seed=1)
    found = distance_correlation(Representations.of(x), Representations.of(y))
    inside = [each.null_low < each.value < each.null_high for each in found]  # type: ignore[operator]
    assert sum(inside) >= 16  # 19 of 20 are expected
    assert all(
        each.null is not None and each.null > 0.3 for each in found
    )  # the bias of the form that is compared with


def test_a_bent_line_is_seen() -> None:
    x = torch.linspace(-1, 1, 50)[None, :, None]
    found = distance_correlation(Representations.of(x), Representations.of(x.square()), unit_rows=False)[0]
    assert found.null_high is not None
    assert found.value is not None
    assert found.value > found.null_high


def test_samples_that_share_a_picture_are_drawn_together() -> None:
    x = noise(1, 12, 4).repeat_interleave(5, 1) + 0.01 * noise(1, 60, 4, seed=1)
    y = noise(1, 12, 4, seed=2).repeat_interleave(5, 1) + 0.01 * noise(1, 60, 4, seed=3)
    groups = torch.arange(12).repeat_interleave(5)
    alone, together = (
        distance_correlation(Representations.of(x), Representations.of(y), groups=each)[0] for each in (None, groups)
    )
    assert together.null_low is not None
    assert together.value is not None
    assert together.null_low < together.value < together.null_high  # type: ignore[operator]
    assert alone.null_high is not None
    assert alone.value == together.value
    assert alone.value > alone.null_high, "samples are taken for independent: what they share looks like a finding"


def test_samples_in_one_place_have_no_correlation() -> None:
    found = distance_correlation(Representations.of(torch.ones(1, 8, 3)), Representations.of(noise(1, 8, 3)))[0]
    assert found.value is None
    same_direction = torch.arange(1.0, 9)[None, :, None] * torch.ones(3)
    found = distance_correlation(Representations.of(same_direction), Representations.of(noise(1, 8, 3)))[0]
    assert found.undefined == "no correlation: all distances are equal"
