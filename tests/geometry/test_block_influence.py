"""What blocks and training change: angles and cosines of samples with themselves, exact where nothing moves."""

import math

import pytest
import torch
from torch import Tensor

from lightning_mm.geometry.block_influence import angular_distance, block_influence, row_cosine


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    x = noise(3, 40, 16)
    unit = torch.nn.functional.normalize(x.double(), dim=2)
    cosine = (unit[:-1] * unit[1:]).sum(2)
    influence, angle = block_influence(x), angular_distance(x)
    assert influence[0].undefined == angle[0].undefined == "embeddings: no block has made them"
    for block in range(2):
        assert influence[1 + block].value == pytest.approx(float(1 - cosine[block].mean()), rel=1e-12)
        assert angle[1 + block].value == pytest.approx(float(cosine[block].arccos().mean() / math.pi), rel=1e-12)
        assert influence[1 + block].low < influence[1 + block].value < influence[1 + block].high


def test_a_block_that_does_nothing_has_exactly_none() -> None:
    x = 3 * noise(1, 200, 64).repeat(2, 1, 1)
    assert block_influence(x)[1].value == 0
    assert angular_distance(x)[1].value == 0
    assert angular_distance(torch.cat([x[:1], -x[:1]]))[1].value == 1
    assert row_cosine(x, x)[0].value == 1


def test_small_turns_keep_their_digits() -> None:
    """Half the squared angle, which 1 - cos loses in float32 below 1e-7 and in float64 below 1e-16."""
    before = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(1, 20, 1)
    for angle in (1e-3, 1e-6, 1e-9):
        turned = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64).repeat(1, 20, 1)
        steps = torch.cat([before, turned])
        assert block_influence(steps)[1].value == pytest.approx(angle**2 / 2, rel=1e-6)
        assert angular_distance(steps)[1].value == pytest.approx(angle / math.pi, rel=1e-6)


def test_a_sample_without_direction_is_told() -> None:
    """A zero row is no block that turns by 90 degrees."""
    x = noise(4, 30, 8)
    x[1, 3] = 0
    for measure in (block_influence, angular_distance):
        reasons = [one.undefined for one in measure(x)[1:]]
        assert reasons == ["no direction: 1 of 30 samples are zero or not finite"] * 2 + [""]


def test_groups_widen_the_interval() -> None:
    x = noise(2, 30, 8).repeat_interleave(4, 1)
    alone, together = block_influence(x)[1], block_influence(x, torch.arange(120) // 4)[1]
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    assert (block_influence(x, torch.zeros(120))[1].low, block_influence(x, torch.zeros(120))[1].high) == (None, None)
