"""Weights trained in bfloat16: no small update is lost, ranks and resumed runs round alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.models.loading import Backbone
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import IntermediateOnly
from lightning_mm.tuning.optimizer import OptimizerSettings, build_optimizer
from lightning_mm.tuning.stochastic_adamw import StochasticAdamW, stochastic_round_
from tests.helpers.training import SaveAt, train


class InBfloat16(Callback):
    """What model.backbone.dtype bfloat16 gives, which ``train`` has no option for."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.backbone = Backbone(path=pl_module.backbone.path, dtype="bfloat16")


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100))
def test_a_number_becomes_one_of_its_neighbours_and_keeps_its_mean(value: float) -> None:
    wide = torch.full((4096,), value)
    held = torch.empty(4096, dtype=torch.bfloat16)
    stochastic_round_(held, wide.clone(), noise())
    down = (wide[:1].view(torch.int32) & -(1 << 16)).view(torch.float32)
    up = ((wide[:1].view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert set(held.float().tolist()) <= {down.item(), up.item()}
    gap = float((up - down).abs())
    # The mean of 4096 draws of a Bernoulli variable: 5 standard errors, at most half a gap each.
    assert abs(float(held.double().mean()) - float(wide[0].double())) <= 5 * 0.5 * gap / 64


def test_what_bfloat16_can_say_is_left_alone() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf")])
    held = torch.empty(6, dtype=torch.bfloat16)
    stochastic_round_(held, values.clone(), noise())
    assert torch.equal(held.float(), values)
    stochastic_round_(held[:1], torch.tensor([float("nan")]), noise())
    assert held[0].isnan()


def descended(optimizer: type[torch.optim.Optimizer], dtype: torch.dtype, steps: int, **options: Any) -> Tensor:
    """4096 weights that start at 1 and are pulled down by 1e-4 a step, a twentieth of what bfloat16 can tell there."""
    weight = nn.Parameter(torch.ones(4096, dtype=dtype))
    made = optimizer([weight], lr=1e-4, **options)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        made.step()
    return weight.detach().double()


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_small_updates_are_not_lost(state_dtype: str) -> None:
    exact = descended(AdamW, torch.float32, 200, weight_decay=0.0)
    lost = descended(AdamW, torch.bfloat16, 200, weight_decay=0.0)
    kept = descended(StochasticAdamW, torch.bfloat16, 200, state_dtype=state_dtype)
    assert torch.equal(lost, torch.ones_like(lost)), "rounded to the nearest, no weight ever moves"
    assert exact.mean() == pytest.approx(0.98, abs=1e-4)
    error = float(kept.std()) / 64
    # 5 standard errors; moments in bfloat16 scatter as well, in which a step is not linear.
    assert abs(float(kept.mean() - exact.mean())) < 5 * error + (2e-4 if state_dtype == "bfloat16" else 0.0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_in_float32_it_is_adamw(decay: float) -> None:
    torch.manual_seed(0)
    runs: list[list[Tensor]] = []
    start = [torch.randn(7, 5), torch.randn(3)]
    gradients = [[torch.randn_like(value) for value in start] for _ in range(20)]
    for optimizer in (AdamW, StochasticAdamW):
        params = [nn.Parameter(value.clone()) for value in start]
        made = optimizer(params, lr=1e-2, weight_decay=decay, betas=(0.8, 0.95))
        for given_ in gradients:
            for param, gradient in zip(params, given_, strict=True):
                param.grad = gradient.clone()
            made.step()
        runs.append([param.detach() for param in params])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_moments_in_bfloat16_still_grow() -> None:
    """Rounded to the nearest, 0.001 of a square added to 0.5 of it would vanish."""
    weight = nn.Parameter(torch.zeros(4096))
    made = StochasticAdamW([weight], lr=1e-6, state_dtype="bfloat16")
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        made.step()
    second = made.state[weight]["exp_avg_sq"]
    assert second.dtype == torch.bfloat16
    assert float(second.double().mean()) == pytest.approx(1 - 0.999**1000, rel=5e-3)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_resumed_run_rounds_as_the_killed_one_would_have(state_dtype: Any, tmp_path: Path) -> None:
    def steps(made: StochasticAdamW, weights: list[nn.Parameter], first: int, last: int) -> None:
        for index in range(first, last):
            drawn = torch.Generator().manual_seed(index)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=drawn).to(weight.dtype)
            made.step()

    def fresh() -> tuple[list[nn.Parameter], StochasticAdamW]:
        weights = [nn.Parameter(torch.ones(50, dtype=t)) for t in (torch.bfloat16, torch.float32)]
        return weights, StochasticAdamW(weights, lr=1e-3, state_dtype=state_dtype)

    whole, made = fresh()
    steps(made, whole, 0, 10)
    killed, made = fresh()
    steps(made, killed, 0, 4)
    torch.save({"optimizer": made.state_dict(), "weights": [w.detach() for w in killed]}, tmp_path / "at4.pt")
    saved = torch.load(tmp_path / "at4.pt", weights_only=True)
    resumed, made = fresh()
    torch.rand(9)  # whatever the new process drew before
    for weight, value in zip(resumed, saved["weights"], strict=True):
        weight.data.copy_(value)
    made.load_state_dict(saved["optimizer"])
    assert {s["exp_avg"].dtype for s in made.state.values()} == {getattr(torch, state_dtype)}
    steps(made, resumed, 4, 10)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one, other)


def test_noise_differs_between_tensors_and_steps() -> None:
    values = torch.full((2**12,), 1.001)
    drawn = []
    optimizer = StochasticAdamW([nn.Parameter(torch.zeros(1))])
    for step, bucket in ((1, 0), (1, 1), (2, 0), (1, 0)):
        held = torch.empty(2**12, dtype=torch.bfloat16)
        stochastic_round_(held, values.clone(), optimizer._noise(torch.device("cpu"), step, bucket))
        drawn.append(held)
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_states_in_bfloat16_need_random_rounding() -> None:
    with pytest.raises(UserError, match="state_dtype: bfloat16 does not go with adamw"):
        OptimizerSettings(state_dtype="bfloat16")


def test_losing_small_updates_is_said() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    decision_log().clear()
    build_optimizer([{"params": [weight], "name": "layers"}], OptimizerSettings())
    assert any("adamw_sr keeps them" in str(each) for each in decision_log())


def test_a_run_in_bfloat16_resumes_bit_for_bit(family: Any, data: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tuning": IntermediateOnly(layers="1-2"),
        "optimizer": OptimizerSettings(lr=1e-3, name="adamw_sr"),
        "max_steps": 5,
    }
    checkpoint = tmp_path / "killed.ckpt"
    whole, _ = train(family("llava"), data, tmp_path, callbacks=[InBfloat16()], **options)
    with pytest.raises(SystemExit):
        train(family("llava"), data, tmp_path, callbacks=[InBfloat16(), SaveAt(2, checkpoint)], **options)
    torch.rand(3)
    resumed, _ = train(family("llava"), data, tmp_path, callbacks=[InBfloat16()], ckpt_path=checkpoint, **options)
    assert isinstance(whole, MMModule)
    for name, parameter in whole.trainable.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, resumed.trainable[name]), name
