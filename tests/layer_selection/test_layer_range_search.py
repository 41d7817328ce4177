"""The window that scores point to: planted ranges come back, noise has no say, compute has its price."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.layer_selection.layer_range_search import (
    Criterion,
    best_layer_range,
    combine_criteria,
    median_smooth,
    reliability,
    search_layer_range,
    standardize,
)
from lightning_mm.planning.flops import relative_decoder_cost


def planted(first: int, last: int, num_layers: int, noise: float, seed: int = 0, resamples: int = 20) -> Criterion:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.zeros(num_layers, dtype=torch.float64)
    truth[first : last + 1] = 1
    scores = truth + noise * torch.randn(num_layers, generator=generator, dtype=torch.float64)
    drawn = scores + noise * torch.randn(resamples, num_layers, generator=generator, dtype=torch.float64)
    return Criterion("planted", scores, drawn, "meaning")


def flat(num_layers: int, noise: float, seed: int = 1, resamples: int = 20) -> Criterion:
    generator = torch.Generator().manual_seed(seed)
    drawn = noise * torch.randn(resamples, num_layers, generator=generator, dtype=torch.float64)
    return Criterion("noise", drawn[0], drawn, "shape")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_layers=st.integers(8, 40))
def test_a_planted_range_comes_back(data: st.DataObject, num_layers: int) -> None:
    """Ranges of two blocks or more: a single block is an outlier to a median of three."""
    first = data.draw(st.integers(1, num_layers - 3))
    last = data.draw(st.integers(first + 1, min(num_layers - 2, first + num_layers // 2)))
    criterion = planted(first, last, num_layers, noise=0.02)
    score, drawn = combine_criteria([criterion], {})
    found = search_layer_range(score, drawn, price=0.25, budget=None, margin=0)
    assert found is not None
    assert (found.first, found.last) == (first, last)
    assert found.first_range[0] <= first <= found.first_range[1]
    assert found.last_range[0] <= last <= found.last_range[1]


def test_noise_has_no_say() -> None:
    signal, noise = planted(10, 15, 30, noise=0.1), flat(30, noise=5.0)
    assert reliability(signal) > 0.9
    assert reliability(noise) < 0.3
    score, drawn = combine_criteria([signal, noise], {})
    found = search_layer_range(score, drawn, price=0.25, budget=None, margin=1)
    assert found is not None
    assert (found.first, found.last) == (10, 15)


def test_an_uncertain_end_has_a_wide_range() -> None:
    sharp = search_layer_range(
        *combine_criteria([planted(10, 15, 30, noise=0.02)], {}), price=0.25, budget=None, margin=0
    )
    blurred = search_layer_range(
        *combine_criteria([planted(10, 15, 30, noise=0.3)], {}), price=0.25, budget=None, margin=0
    )
    assert sharp is not None
    assert blurred is not None
    assert sharp.first_range == (10, 10)
    assert blurred.first_range[1] - blurred.first_range[0] > 2


def test_compute_has_a_price() -> None:
    """Two equal bumps: the later one is cheaper, since gradients need not reach as far down."""
    score = torch.full((20,), -1.0)
    score[4:6] = score[14:16] = 1.0
    assert best_layer_range(score, price=0.25) == (14, 15)
    assert relative_decoder_cost(14, 15, 20) < relative_decoder_cost(4, 5, 20)


def test_a_budget_is_kept_and_the_ends_can_be_left_out() -> None:
    score = torch.tensor([5.0, -1.0, 1.0, 2.0, 1.0, -1.0, -1.0, 5.0])
    assert best_layer_range(score, price=0.1, budget=3, margin=1) == (2, 4)
    assert best_layer_range(score, price=0.0, margin=0) == (0, 7)
    assert best_layer_range(-torch.ones(6), price=0.1) is None
    assert best_layer_range(torch.ones(4), price=0.1, margin=2) is None


def test_undefined_blocks_have_no_opinion() -> None:
    scores = torch.tensor([float("nan"), 1.0, 2.0, 3.0])
    assert standardize(scores)[0] == 0
    assert torch.isfinite(standardize(torch.full((4,), float("nan")))).all()
    assert (standardize(torch.full((4,), 7.0)) == 0).all()


def test_smoothing_keeps_constants_and_edges() -> None:
    assert torch.equal(median_smooth(torch.ones(5)), torch.ones(5))
    assert median_smooth(torch.tensor([0.0, 0.0, 3.0, 0.0])).tolist() == [0, 0, 0, 0]
    assert median_smooth(torch.tensor([0.0, 0.0, 3.0, 2.0, 0.0])).tolist() == [0, 0, 2, 2, 0]


@pytest.mark.parametrize(
    ("first", "last", "num_layers", "connector", "units"),
    [
        (0, 31, 32, True, 192),
        (6, 16, 32, True, 150),
        (6, 16, 32, False, 138),
        (8, 25, 36, True, 180),
        (8, 25, 36, False, 164),
    ],
)
def test_cost_is_that_of_the_count(first: int, last: int, num_layers: int, connector: bool, units: int) -> None:
    """LLaVA-7B and OneVision-4B by hand: 2 forward, 2 input gradients, 2 weight gradients per block."""
    assert relative_decoder_cost(first, last, num_layers, connector) == pytest.approx(units / (6 * num_layers))
