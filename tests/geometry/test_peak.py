"""The interval of a peak over layers: simulated profiles with a known peak, and every measure's resamples."""

import math

import pytest
import torch

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.cka import cka
from lightning_mm.geometry.intrinsic_dimension import Gride as GrideEstimator
from lightning_mm.geometry.intrinsic_dimension import calibrated_dimension, gride
from lightning_mm.geometry.knn_overlap import overlap
from lightning_mm.geometry.modality_gap import modality_gap
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.peak import ResampledEstimate, left_out_means, peak_range, with_left_out
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.resampling import jackknife_error
from lightning_mm.geometry.separability import separability

LAYERS, BLOCKS = 31, 12


def profile(mean_L: torch.Tensor, error: float, generator: torch.Generator) -> list[Estimate]:
    """A mean of 12 blocks whose errors are 0.9 alike from layer to layer."""
    at = torch.arange(len(mean_L)).double()
    root = torch.linalg.cholesky(0.9 ** (at[:, None] - at).abs())
    block_BL = torch.randn(BLOCKS, len(mean_L), generator=generator).double() @ root.T * error * BLOCKS**0.5 + mean_L
    without_BL = (block_BL.sum(0) - block_BL) / (BLOCKS - 1)
    values = block_BL.mean(0).tolist()
    return [with_left_out(Estimate.of(v, 120), left) for v, left in zip(values, without_BL.T, strict=True)]


@pytest.mark.parametrize(("width", "error"), [(8.0, 0.1), (8.0, 0.5), (3.0, 0.5), (60.0, 0.5)])
def test_the_interval_holds_the_true_peak(width: float, error: float) -> None:
    """A hill over 31 layers, steep or nearly flat: 95 % of 200 at least, less 4 binomial standard deviations."""
    mean, generator = -(((torch.arange(LAYERS) - 13) / width) ** 2).double(), torch.Generator().manual_seed(0)
    spans = [peak_range(profile(mean, error, generator)) for _ in range(200)]
    assert sum(span is not None and span[1] <= 13 <= span[2] for span in spans) >= 178


def test_a_sure_peak_is_one_layer_and_an_unsure_one_is_not() -> None:
    at, generator = torch.arange(LAYERS).double(), torch.Generator().manual_seed(1)
    assert peak_range(profile(-(at - 5).abs(), 0.01, generator)) == (5, 5, 5)
    assert peak_range(profile((at - 5).abs(), 0.01, generator), "min") == (5, 5, 5)
    flat = [peak_range(profile(0 * at, 1.0, generator)) for _ in range(40)]
    assert sum(span[2] - span[1] for span in flat if span) / 40 > 15, "nothing is known of a peak that is not there"


def test_layers_are_counted_as_given_and_missing_resamples_are_no_certainty() -> None:
    one = ResampledEstimate(1.0, n=9, left_out=(1.0, 1.1, 0.9))
    two = ResampledEstimate(5.0, n=9, left_out=(5.0, 5.1, 4.9))
    undefined = Estimate.undefined_because("constant", 9)
    assert peak_range([undefined, one, two]) == (2, 2, 2)
    assert peak_range([one, Estimate.of(5.0, 9)]) is None
    assert peak_range([undefined, two]) is None
    assert peak_range([one, one]) is None, "all alike"
    assert peak_range([one, with_left_out(Estimate.of(2.0, 9), torch.tensor([math.nan, 2.0, 2.0]))]) is None
    assert with_left_out(undefined, torch.ones(3)) is undefined


def test_the_resamples_are_those_of_the_interval() -> None:
    """Their jackknife error times t(11) is the half width, where no bound cuts it."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 96, 12, generator=generator)
    a, b = Representations.of(x), Representations.of(x + torch.randn(2, 96, 12, generator=generator) + 0.3)
    near_a, near_b = Neighbors.of(a), Neighbors.of(b)
    dimension = gride(near_a, 4, 8)
    for found in (overlap(near_a, near_b, 5), cka(a, b), dimension):
        for one in found:
            assert isinstance(one, ResampledEstimate)
            half = 2.201 * float(jackknife_error(torch.tensor(one.left_out, dtype=torch.float64)))
            assert one.low is not None
            assert one.value is not None
            assert half == pytest.approx(one.value - one.low, rel=2e-3)
    for found in (modality_gap(a, b), separability(a, b)):
        for one in found:  # the interval is of single samples, the resamples are of 12 blocks: a third apart at most
            assert isinstance(one, ResampledEstimate)
            half = 1.99 * float(jackknife_error(torch.tensor(one.left_out, dtype=torch.float64)))
            assert half == pytest.approx((one.high - one.low) / 2, rel=0.6)  # type: ignore[operator]
    calibrated = calibrated_dimension(dimension, GrideEstimator(4, 8))
    for one in calibrated:
        assert isinstance(one, ResampledEstimate)
        assert min(one.left_out) < one.value < max(one.left_out)  # type: ignore[operator]


def test_means_without_each_block_are_means() -> None:
    terms, groups = torch.arange(30.0), torch.arange(30) // 10
    assert sorted(left_out_means(terms, groups).tolist()) == [9.5, 14.5, 19.5]
    assert sorted(left_out_means(terms, groups, factor=2.0).tolist()) == [4.5, 14.5, 24.5]
