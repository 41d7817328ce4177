"""Interventions do what they say, on every family, and leave nothing behind."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lightning_mm.causal.interventions.activation_cache import cache_activations
from lightning_mm.causal.interventions.interventions import (
    Intervention,
    add_vector,
    apply_interventions,
    layer_window,
    mean_ablate,
    patch_from,
    resample_ablate,
    set_value,
    skip_blocks,
    zero_ablate,
)
from lightning_mm.causal.questions.question import last_logits
from lightning_mm.core.errors import UserError
from lightning_mm.execution.activation_checkpointing import checkpoint_blocks
from lightning_mm.models.attention.cpu_kernels import use_cpu_attention
from tests.helpers.causal_models import FAMILIES, Subject, subject


def run(one: Subject, inputs: dict[str, Tensor], *changes: Intervention) -> Tensor:
    with apply_interventions(one.mm, changes):
        return last_logits(one.mm, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_skipping_is_zeroing_both_parts(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    inputs = one.encode().inputs
    both = run(one, inputs, zero_ablate("attention", [1]), zero_ablate("mlp", [1]))
    skipped = run(one, inputs, skip_blocks([1]))
    # x + 0 is x, in any precision.
    assert torch.equal(skipped, both)
    assert not torch.equal(skipped, last_logits(one.mm, inputs))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
def test_a_run_patched_with_itself_is_the_same(
    name: str, site: Any, family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    clean = cache_activations(one.mm, encoded.inputs)
    back = patch_from(site, range(one.layout.num_layers), encoded.text, clean.values)
    assert torch.equal(run(one, encoded.inputs, back), clean.logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_last_layer_of_another_run_is_that_run(
    name: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, name, tmp_path)
    encoded, other = one.encode(), one.encode(seed=1)
    source = cache_activations(one.mm, other.inputs)
    last = one.layout.num_layers - 1
    assert torch.equal(run(one, encoded.inputs, patch_from("residual", [last], None, source.values)), source.logits)
    assert not torch.equal(last_logits(one.mm, encoded.inputs), source.logits)


def test_values_are_those_that_were_asked_for(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    encoded, other = one.encode(), one.encode(seed=1)
    clean, source = (cache_activations(one.mm, each.inputs).values["mlp", 1] for each in (encoded, other))
    at, vector = encoded.image[:3], torch.randn(clean.shape[2])
    expected = {
        set_value("mlp", [1], at, vector): vector.expand(1, 3, -1),
        add_vector("mlp", [1], at, vector): clean[:, at] + vector,
        zero_ablate("mlp", [1], at): torch.zeros_like(clean[:, at]),
        mean_ablate("mlp", [1], at): clean[:, at].mean(1, keepdim=True).expand(1, 3, -1),
        patch_from("mlp", [1], at, {("mlp", 1): source}): source[:, at],
        patch_from("mlp", [1], at, {("mlp", 1): source}, at=at + 2): source[:, at + 2],
        resample_ablate("mlp", [1], at, {("mlp", 1): source}, torch.Generator()): source[:, at],
    }
    for change, value in expected.items():
        values = cache_activations(one.mm, encoded.inputs, [change]).values["mlp", 1]
        torch.testing.assert_close(values[:, at], value, msg=lambda m, c=change: f"{c.name}: {m}")  # type: ignore[misc]
        rest = [i for i in range(encoded.length) if i not in set(at.tolist())]
        assert torch.equal(values[:, rest], clean[:, rest]), f"{change.name} changes other tokens"


def test_rows_have_positions_of_their_own(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    inputs = one.encode().inputs
    two = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    rows = torch.tensor([[4], [9]])
    together = run(one, two, zero_ablate("mlp", [1], rows))
    alone = torch.cat([run(one, inputs, zero_ablate("mlp", [1], row)) for row in rows])
    torch.testing.assert_close(together, alone)  # other shapes sum in another order


def test_several_work_in_the_order_given(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    inputs, vector = one.encode().inputs, torch.randn(32)
    zeroed = cache_activations(one.mm, inputs, [add_vector("mlp", [1], None, vector), zero_ablate("mlp", [1])])
    moved = cache_activations(one.mm, inputs, [zero_ablate("mlp", [1]), add_vector("mlp", [1], None, vector)])
    assert not zeroed.values["mlp", 1].any()
    assert torch.equal(moved.values["mlp", 1], vector.expand_as(moved.values["mlp", 1]))


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_nothing_is_left_behind(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    inputs = one.encode().inputs
    before, weights = last_logits(one.mm, inputs), [p.clone() for p in one.model.parameters()]
    hooks = _hooks(one.model)
    run(
        one, inputs, skip_blocks([0]), zero_ablate("mlp", [1, 2]), add_vector("attention", [3], None, torch.tensor(1.0))
    )
    with pytest.raises(ZeroDivisionError), apply_interventions(one.mm, [zero_ablate("mlp", [1])]):
        raise ZeroDivisionError
    assert _hooks(one.model) == hooks
    assert torch.equal(last_logits(one.mm, inputs), before)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), weights, strict=True))


def test_what_takes_no_effect_is_an_error(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    with pytest.raises(UserError, match="did not take effect"), apply_interventions(one.mm, [skip_blocks([1])]):
        pass


def test_adapted_models_are_changed_alike(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    inputs = one.encode().inputs
    plain = run(one, inputs, zero_ablate("mlp", [1]), skip_blocks([2]))
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "down_proj"]), one.model)  # B starts at zero
    one.model.eval()
    assert all(block.down_proj is not None for block in one.layout.blocks)
    assert torch.equal(run(one, inputs, zero_ablate("mlp", [1]), skip_blocks([2])), plain)


def test_checkpointed_blocks_are_changed_alike(family: Callable[[str], Path], tmp_path: Path) -> None:
    gradients = []
    for checkpointed in (False, True):
        one = subject(family, "llava", tmp_path)
        use_cpu_attention(one.model, ExitStack())
        inputs = one.encode().inputs
        weight = one.model.get_submodule(one.layout.layers[0]).mlp.up_proj.weight.requires_grad_(True)
        if checkpointed:
            checkpoint_blocks(one.model, one.layout.layers, ExitStack())
            one.model.train()
        with apply_interventions(one.mm, [zero_ablate("mlp", [1]), skip_blocks([2])]):
            one.model(**inputs).logits[0, -1].sum().backward()
        gradients.append(weight.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)


class Flat(nn.Module):
    """Puts the rows out in one, and something besides, as Llama 4's experts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.inner(x).reshape(-1, x.shape[-1]), None


class Viewing(nn.Module):
    """Takes it back in its rows, as Llama 4's blocks."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.flat = Flat(mlp)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(x)[0].view(x.shape)


def test_rows_put_out_in_one_are_changed_in_their_places(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    inputs, vector = one.encode().inputs, torch.randn(32)
    two = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    rows = torch.tensor([[4, 5], [9, 2]])
    changes = [
        add_vector("mlp", [1], rows, vector),
        mean_ablate("mlp", [2], torch.tensor([3, 6])),
        zero_ablate("mlp", [3]),
    ]
    plain, made = run(one, two, *changes), cache_activations(one.mm, two, changes).values
    blocks = []
    for block in one.layout.blocks:
        assert block.mlp is not None
        parent, _, last = block.mlp.rpartition(".")
        setattr(one.model.get_submodule(parent), last, Viewing(one.model.get_submodule(block.mlp)))
        blocks.append(replace(block, mlp=f"{block.mlp}.flat"))
    one.layout.__dict__["blocks"] = tuple(blocks)
    assert torch.equal(run(one, two, *changes), plain)
    for key, value in cache_activations(one.mm, two, changes).values.items():
        assert torch.equal(value, made[key])


def test_parts_given_rows_in_one_are_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    inputs = one.encode().inputs
    mlp = one.model.get_submodule(str(one.layout.blocks[1].mlp))
    mlp.register_forward_pre_hook(lambda _, given: (given[0][0],))
    with pytest.raises(UserError, match="cannot be intervened on"):
        run(one, inputs, zero_ablate("mlp", [1], torch.tensor([2])))


@given(st.integers(0, 31), st.integers(1, 9))
def test_windows_are_those_of_the_papers(center: int, width: int) -> None:
    p2, rome = layer_window(center, width, 32), layer_window(center, width, 32, "rome")
    assert center in p2
    assert center in rome
    whole = 9 <= center < 22
    if whole:
        assert (len(p2), len(rome)) == (1 if width == 1 else 2 * width + 1, width)
    assert list(rome) == [i for i in range(center - width // 2, center - (-width // 2)) if 0 <= i < 32]


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
