"""Norms on processors compute what the models' own do: outputs and gradients, for whatever is an RMS norm."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lightning_mm.core.decisions import decision_log
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.models import rms_norm_cpu
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.rms_norm_cpu import use_cpu_norms
from tests.helpers.data import batch_of
from tests.helpers.training import scale_of

RMS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaRMSNorm(24, eps=1e-3),
    "gemma": lambda: Gemma3RMSNorm(24),
    "t5": lambda: T5LayerNorm(24),  # it bears another name
    "torch": lambda: nn.RMSNorm(24, eps=1e-5),
}


class Clipped(LlamaRMSNorm):
    """An RMS norm by name and parts, but not by what it computes."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed: Tensor = super().forward(hidden_states)
        return normed.clamp(max=1.0)


def drawn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0), dtype=dtype) * 3


def gradients(module: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
    output = module(hidden)
    wanted = [hidden, *(p for p in module.parameters() if p.requires_grad)]
    return output, *torch.autograd.grad(output, wanted, drawn(*output.shape, dtype=output.dtype))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_its_backward_is_its_forwards(offset: float) -> None:
    """Against finite differences, in float64."""
    hidden = drawn(2, 3, 5, dtype=torch.float64).requires_grad_()
    weight = drawn(5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(rms_norm_cpu._RMSNorm.apply, (hidden, weight, 1e-3, offset))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", RMS)
def test_it_is_the_models_own(kind: str, trained: bool) -> None:
    """float32: four passes instead of a dozen round differently, by a few ulp of sums of 24."""
    module = RMS[kind]().requires_grad_(trained)
    nn.init.normal_(next(module.parameters()))
    hidden = drawn(2, 7, 24).requires_grad_()
    expected = gradients(module, hidden)
    assert use_cpu_norms(module, ExitStack()) == 1
    found = gradients(module, hidden)
    assert "_RMSNorm" in str(found[0].grad_fn)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RMSNorm(8), Clipped(8), nn.Linear(8, 8), nn.GroupNorm(2, 8)],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_left_alone(module: nn.Module) -> None:
    """Those that compute something else, and torch's RMS norm whose eps hangs on the type."""
    assert use_cpu_norms(module, ExitStack()) == 0
    assert "forward" not in module.__dict__


class Flagged(LlamaRMSNorm):
    """Two formulas under one name."""

    def __init__(self, size: int, centred: bool) -> None:
        super().__init__(size)
        self.centred = centred

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed: Tensor = super().forward(hidden_states - hidden_states.mean(-1, keepdim=True) * self.centred)
        return normed


@pytest.mark.parametrize("first", [True, False])
def test_a_flag_may_change_what_a_class_computes(first: bool) -> None:
    module = nn.Sequential(Flagged(8, first), Flagged(8, not first), Flagged(8, first))
    assert use_cpu_norms(module, ExitStack()) == (1 if first else 2)
    assert [("forward" in each.__dict__) != each.centred for each in module] == [True] * 3


def test_without_gradients_or_in_other_types_it_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = LlamaRMSNorm(8)
    decision_log().clear()
    use_cpu_norms(module, ExitStack())
    monkeypatch.setattr(rms_norm_cpu, "_RMSNorm", None)
    hidden = drawn(3, 8).requires_grad_()
    module(hidden.detach())
    module(hidden.bfloat16())
    module(hidden.double())
    with torch.no_grad():
        module(hidden)
    assert not list(decision_log())
    with pytest.raises(AttributeError):
        module(hidden)
    assert [each.name for each in decision_log()] == ["norms"]


def test_asked_for_twice_it_is_done_once_and_a_copy_has_its_own_weight() -> None:
    module = nn.Sequential(LlamaRMSNorm(8), LlamaRMSNorm(8))
    assert use_cpu_norms(module, ExitStack()) == 2
    assert use_cpu_norms(module, ExitStack()) == 0
    other = copy.deepcopy(module)
    nn.init.constant_(other[0].weight, 2.0)
    hidden = drawn(3, 8).requires_grad_()
    torch.testing.assert_close(other(hidden), LlamaRMSNorm(8)(LlamaRMSNorm(8)(hidden) * 2))
    torch.testing.assert_close(module(hidden), LlamaRMSNorm(8)(LlamaRMSNorm(8)(hidden)))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm", "internvl"])
def test_a_whole_model_trains_as_before(name: str, family: Callable[[str], Path], data: dict[str, Path]) -> None:
    """Every norm of the decoder is known; the loss and all gradients are the model's own, to float32's rounding."""
    model: Any = load_model(Backbone(path=str(family(name))))
    batch = batch_of(family(name), data, 2)
    found: list[dict[str, Tensor]] = []
    for asked in (False, True):
        if asked:
            named = [n for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")]
            assert use_cpu_norms(model, ExitStack()) == len(named) > 0
        model.zero_grad()
        loss = supervised_nll(model, model.get_output_embeddings(), batch).nll
        loss.backward()
        of = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **of})
    assert found[0].keys() == found[1].keys()
    for key, expected in found[0].items():
        # float32's rounding, of sums in another order: some CPUs reach 1.7e-5 of a tensor's largest gradient
        atol = 3e-5 * float(scale_of(key, found[0]).abs().max())
        torch.testing.assert_close(found[1][key], expected, rtol=1e-3, atol=atol, msg=key)
