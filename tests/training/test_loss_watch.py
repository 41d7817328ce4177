"""A loss that jumps, or stays at that of guessing, is said once; losses as real runs have them are not."""

import math
import random

import pytest

from lightning_mm.core.decisions import DecisionLog
from lightning_mm.training.loss_watch import LossWatch


def said(losses: list[float], vocabulary: int | None = 32000) -> list[str]:
    """What is said of losses, from step 1 on."""
    with DecisionLog().opened() as log:
        watch = LossWatch(vocabulary)
        for step, loss in enumerate(losses, 1):
            watch.add(step, loss)
    return [each.value for each in log]


def noisy(count: int, seed: int = 0, spread: float = 0.5) -> list[float]:
    """Losses that fall from 6 to 1 nats, each e to the power of a normal deviate off, as of small batches."""
    draw = random.Random(seed)
    return [(1 + 5 * math.exp(-step / 50)) * math.exp(draw.gauss(0, spread)) for step in range(count)]


def test_a_jump_is_said_with_its_step_and_once() -> None:
    losses = noisy(300, spread=0.1)
    losses[200:205] = [9.0, 9.5, 9.0, 8.0, 9.0]
    assert said(losses) == ["9 at step 201 is a jump"]


def test_what_is_twice_almost_nothing_is_no_jump() -> None:
    assert said([1e-3] * 50 + [2e-2] * 50) == []


def test_no_rule_speaks_before_it_can() -> None:
    assert said([0.1] * 19 + [9.0]) == []
    assert said([0.1] * 20 + [9.0]) == ["9 at step 21 is a jump"]
    assert said([11.0] * 49) == []


def test_noise_is_hardly_ever_said() -> None:
    """20 runs of 1,000 steps, with batches so small that losses are a factor of 1.6 off: about one line in all is due.

    The largest of a hundred is 2.5 deviations up, and twice that 3.9: one step in 20,000.
    """
    assert sum(len(said(noisy(1000, seed))) for seed in range(20)) <= 4


@pytest.mark.parametrize(("loss", "is_said"), [(10.37, True), (12.0, True), (9.9, True), (9.8, False), (7.0, False)])
def test_guessing_is_the_logarithm_of_the_vocabulary(loss: float, is_said: bool) -> None:
    """log(32000) is 10.373, 95 % of it 9.855."""
    assert said([loss] * 60) == (["no better than guessing after step 50"] if is_said else [])
    assert said([loss] * 60, None) == []


def test_what_is_not_finite_is_left_to_others() -> None:
    assert said([1.0] * 30 + [math.nan, math.inf] + [1.0] * 30) == []
