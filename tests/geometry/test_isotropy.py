"""Cones and spheres: anisotropy, median cosine and uniformity."""

import math

import pytest
import torch
from torch import Tensor

from lightning_mm.core.estimate import values
from lightning_mm.geometry.isotropy import anisotropy, median_cosine, sphere_uniformity, uniformity
from lightning_mm.geometry.representations import Representations


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off_diagonal(x: Tensor) -> Tensor:
    """Cosines of all pairs i < j in float64."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    return (unit @ unit.T)[torch.triu_indices(len(x), len(x), 1).unbind()]


@pytest.mark.parametrize("offset", [0.0, 2.0, 300.0])
def test_all_pairs_by_hand(offset: float) -> None:
    """Features as they are, mean included; the reps's mean is added back, which costs a rounding of the offset."""
    x = noise(2, 61, 9) + offset
    reps = Representations.of(x)
    for layer in range(2):
        cosines = off_diagonal(x[layer])
        assert anisotropy(reps)[layer].value == pytest.approx(float(cosines.mean()), abs=1e-6)
        assert median_cosine(reps)[layer].value == pytest.approx(float(cosines.quantile(0.5)), abs=1e-6)
        near = torch.exp(-2 * (2 - 2 * cosines)).mean().log()
        assert uniformity(reps)[layer].value == pytest.approx(float(near), abs=1e-5)


def test_isotropic_directions_are_within_the_band() -> None:
    for measure in (anisotropy, median_cosine):
        found = measure(Representations.of(noise(100, 60, 40)))
        inside = sum(e.null_low <= e.value <= e.null_high for e in found)
        assert inside >= 87, "95 of 100, less 4 standard deviations"
        spread = float(torch.tensor(values(found)).std())
        assert (found[0].null_high - found[0].null) / 1.96 == pytest.approx(spread, rel=0.3)


def test_intervals_hold_the_expectation() -> None:
    """A cone with a spread of lengths; 95 of 100, less 4 standard deviations, and no more than half too wide."""
    reps = Representations.of(noise(100, 80, 20) * noise(100, 80, 1, seed=1).exp() + 0.5)
    for measure in (anisotropy, median_cosine, uniformity):
        found = measure(reps)
        mean = sum(values(found)) / 100
        assert sum(e.low <= mean <= e.high for e in found) >= 87
        assert sum(e.high - e.low for e in found) / 100 / 4 < 1.5 * float(torch.tensor(values(found)).std())


def test_uniform_sphere() -> None:
    """Closed form against clouds: within 4 standard errors of 20 of them; the limit of many dimensions is -2t."""
    for d in (2, 3, 16, 128):
        found = uniformity(Representations.of(noise(20, 200, d)))
        measured = torch.tensor(values(found))
        assert found[0].null == sphere_uniformity(d)
        assert float(measured.mean()) == pytest.approx(found[0].null, abs=4 * float(measured.std()) / 20**0.5 + 1e-4)
    assert sphere_uniformity(1) == pytest.approx(math.log((1 + math.exp(-8)) / 2), abs=1e-12)  # two points
    assert sphere_uniformity(10**6) == pytest.approx(-4, abs=1e-4)


def test_zero_vectors_have_no_direction() -> None:
    x = noise(1, 30, 5)
    x[0, 4] = 0
    for measure in (anisotropy, median_cosine, uniformity):
        assert measure(Representations.of(x))[0].undefined == "no direction: 1 of 30 samples are zero"


def test_a_sharp_uniformity_does_not_underflow() -> None:
    """exp(-120) is nothing to float32; five orthogonal rows are all 2 apart, squared."""
    for t in (2.0, 60.0, 500.0):
        found = uniformity(Representations.of(torch.eye(5)[None]), t)[0]
        assert found.value == pytest.approx(-2 * t, rel=1e-6)
        assert math.isfinite(found.null)
    assert sphere_uniformity(3, 200.0) == pytest.approx(math.log((1 - math.exp(-800)) / 800), rel=1e-9)
