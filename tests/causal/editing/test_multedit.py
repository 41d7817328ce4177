"""MultEdit: the closed form against what it stands for, models that know something edited, nothing left behind."""

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_mm.causal.editing.finetune_control import fine_tuned
from lightning_mm.causal.editing.multedit import (
    Association,
    EditConfig,
    ValueOptimizer,
    edit_from_associations,
    multedit,
)
from lightning_mm.causal.editing.weight_edit import apply_edits, closed_form_update, down_projection
from lightning_mm.causal.questions.scoring import ForcedAnswer, answer_logits, force_answer, score_answer
from lightning_mm.core.errors import UserError
from lightning_mm.execution.activation_checkpointing import checkpoint_blocks
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.lora import LoRA, add_lora
from lightning_mm.testing.tiny import build_tiny
from tests.helpers.data import FAMILIES
from tests.helpers.taught_models import EDITED, KNOWN, Taught

Known = Callable[[str], Taught]
LONG = EditConfig(steps=60)
MOVES = {"gemma3": ("f", "i")}
"""Constraint and new answer, where others are out of reach within the clamp."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def says(one: Taught, word: str, answer: str | None = None) -> bool:
    return score_answer(one.mm, one.forced(word, answer or KNOWN[word])).is_greedy


def rewriting(one: Taught, word: str, answer: str) -> ValueOptimizer:
    return ValueOptimizer(one.mm, one.forced(word, answer))


def output_at_constraint(made: ValueOptimizer) -> Tensor:
    return made._sites[EDITED][made.positions["last"]][1]


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def hooks(model: torch.nn.Module) -> list[int]:
    """Some are transformers' own."""
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_one_edit_is_p2s_large_inverse() -> None:
    """As 2406.04236 codes it: W' = [(k k^T + lambda I)^-1 (k v^T + lambda W^T)]^T with a d_ff x d_ff matrix."""
    weight_DF, key_F, value_D, ridge = drawn(16, 48), drawn(48), drawn(16), 0.01
    large_FF = torch.outer(key_F, key_F) + ridge * torch.eye(48, dtype=torch.float64)
    expected = (large_FF.inverse() @ (torch.outer(key_F, value_D) + ridge * weight_DF.T)).T
    left, right = closed_form_update(key_F[:, None], (value_D - weight_DF @ key_F)[:, None], ridge)
    torch.testing.assert_close(weight_DF + left @ right, expected, atol=1e-10, rtol=0)
    missed = (weight_DF + left @ right) @ key_F - value_D
    share = float(missed.norm() / (weight_DF @ key_F - value_D).norm())
    assert share == pytest.approx(ridge / (ridge + float(key_F.square().sum())), rel=1e-10)


def test_several_edits_solve_the_normal_equations() -> None:
    weight_DF, keys_FN, values_DN, ridge = drawn(12, 40), drawn(40, 5), drawn(12, 5), 0.3
    left, right = closed_form_update(keys_FN, values_DN - weight_DF @ keys_FN, ridge)
    new_DF = weight_DF + left @ right
    gradient = (new_DF @ keys_FN - values_DN) @ keys_FN.T + ridge * (new_DF - weight_DF)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answer_changes_and_nothing_else(name: str, known: Known) -> None:
    one = known(name)
    word, answer = MOVES.get(name, ("d", "e"))
    before, random = tensors(one.model), torch.get_rng_state()
    assert says(one, word)
    assert not says(one, word, answer)
    hooked = hooks(one.model)
    made = rewriting(one, word, answer)
    assert made.partial_forward is not None, "exact and fast here"
    edit = multedit([made], EDITED, LONG)
    with apply_edits(one.model, [edit]):
        assert says(one, word, answer)
        assert [other for other in KNOWN if other != word and not says(one, other)] == []
        within = one.model.state_dict()
        moved = {key for key, tensor in before.items() if not torch.equal(within[key], tensor)}
    assert moved == {f"{edit.module}.weight"}
    assert edit.misses[0] == pytest.approx(0.01 / (0.01 + float(edit.keys.square().sum())), rel=1e-2)  # type: ignore[union-attr]
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and not p.requires_grad for p in one.model.parameters())
    assert hooks(one.model) == hooked


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_values_are_those_of_the_whole_model(name: str, known: Known) -> None:
    """From the constraint and the layer on, against every token and layer."""
    one = known(name)
    fast, plain = rewriting(one, "d", "e"), rewriting(one, "d", "e")
    plain.partial_forward = None
    found, expected = (each.association(EDITED, EditConfig(steps=5, until=0.0)) for each in (fast, plain))
    torch.testing.assert_close(found.losses, expected.losses, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.delta, expected.delta, atol=1e-3, rtol=1e-3)
    assert found.losses[-1] < found.losses[0] - 0.01


def test_what_trains_still_does(known: Known) -> None:
    """Flags, gradients and checkpointing of a model in training are as they were."""
    one = known("llava")
    expected = rewriting(one, "d", "e").association(EDITED, EditConfig(steps=3))
    model = copy.deepcopy(one.model)
    names = [name for name, place in one.layout.locations.items() if place.layer == 2]
    for name in names:
        model.get_parameter(name).requires_grad_(True).grad = torch.ones_like(model.get_parameter(name))
    checkpoint_blocks(model, one.layout.layers, ExitStack())
    wrapped = [model.get_submodule(name).forward for name in one.layout.layers]
    live = ValueOptimizer(MultimodalModel(model, one.layout), one.forced("d", "e"))
    with torch.no_grad():
        found = live.association(EDITED, EditConfig(steps=3))
    torch.testing.assert_close(found.delta, expected.delta)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names
    assert all((model.get_parameter(n).grad == 1).all() for n in names)
    assert [model.get_submodule(name).forward for name in one.layout.layers] == wrapped


def test_several_edits_at_once(known: Known) -> None:
    one = known("llava")
    edit = multedit([rewriting(one, "d", "e"), rewriting(one, "f", "i")], EDITED, LONG)
    with apply_edits(one.model, [edit]):
        assert says(one, "d", "e")
        assert says(one, "f", "i")
        assert says(one, "b")
        assert says(one, "c")
    assert says(one, "d")


def test_undone_bit_by_bit_whatever_happens(known: Known) -> None:
    one = known("llava")
    before = tensors(one.model)
    first, second = (multedit([rewriting(one, word, "e")], EDITED, EditConfig(steps=2)) for word in "df")
    with pytest.raises(ZeroDivisionError), apply_edits(one.model, [first, second]):
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())
    broken = replace(second, module="lm_head.nowhere")
    with pytest.raises(AttributeError), apply_edits(one.model, [first, broken]):
        pass
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())
    first.apply(one.model)
    second.apply(one.model)
    with pytest.raises(AssertionError, match="later edit"):
        first.undo()
    second.undo()
    first.undo()
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())


def test_adapters_stay_and_are_counted(known: Known) -> None:
    """The value is what the module puts out with its adapter; the weight below it is edited."""
    one = known("llava")
    model = copy.deepcopy(one.model)
    name = str(one.layout.blocks[EDITED].down_proj)
    add_lora(model, [name], LoRA(r=4), {})
    model.eval()
    with torch.no_grad():
        model.get_submodule(name).lora_B["default"].weight.normal_(0, 0.05)
    before = tensors(model)
    made = ValueOptimizer(MultimodalModel(model, one.layout), one.forced("d", "e"))
    found = made.association(EDITED, LONG)
    edit = edit_from_associations(MultimodalModel(model, one.layout), [found], 1e-6)
    with apply_edits(model, [edit]):
        after = output_at_constraint(ValueOptimizer(MultimodalModel(model, one.layout), one.forced("d", "e")))
        torch.testing.assert_close(after, found.output + found.delta, atol=1e-4, rtol=1e-4)
        moved = {key for key, tensor in before.items() if not torch.equal(model.state_dict()[key], tensor)}
        assert score_answer(MultimodalModel(model, one.layout), one.forced("d", "e")).is_greedy
    assert moved == {f"{name}.base_layer.weight"}
    plain = output_at_constraint(rewriting(one, "d", "e"))
    assert not torch.allclose(plain, found.output), "the adapter does say something"


@pytest.mark.parametrize("clamp", [0.25, "p2"])
def test_the_clamp_holds(clamp: float | str, known: Known) -> None:
    one, config = known("llava"), EditConfig(clamp=clamp)  # type: ignore[arg-type]
    found = rewriting(one, "d", "e").association(EDITED, config)
    share = float(found.delta.norm() / found.output.norm())
    assert share == pytest.approx(config.limit, rel=1e-3), "it wants further, and may not"
    with apply_edits(one.model, [edit_from_associations(one.mm, [found], 0.01)]):
        assert says(one, "d"), "too short a step to change the answer"


def test_p2_as_released_edits_hardly_anything(known: Known) -> None:
    one, config = known("llava"), EditConfig.p2()
    assert (config.steps, config.lr, config.decay, config.ridge, config.limit) == (10, 0.1, 0.001, 0.01, 1e-4)
    found = rewriting(one, "d", "e").association(EDITED, config)
    assert len(found.losses) == 11
    assert abs(found.losses[-1] - found.losses[0]) < 0.1


def test_all_tokens_of_an_answer_or_the_first(known: Known) -> None:
    one = known("llava")
    target = one.forced("d", "e then")
    assert len(target.ids) > 2
    logits = answer_logits(one.mm, target)
    plain = one.model(**target.encoded.inputs).logits[0, target.prompt - 1 :].float()
    torch.testing.assert_close(logits, plain)
    nll = -logits.log_softmax(-1)[:-1].gather(1, target.ids[:, None])[:, 0]
    made = ValueOptimizer(one.mm, target)
    for goal, expected in (("answer", nll.sum()), ("first", nll[0])):
        found = made.association(EDITED, EditConfig(steps=1, target=goal))  # type: ignore[arg-type]
        assert found.losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_the_answer_stands_as_the_template_writes_it(known: Known) -> None:
    one = known("llava")
    target = one.forced("d", "red stone.")
    text = one.encoder.processor.tokenizer.decode(target.encoded.inputs["input_ids"][0])
    assert text.endswith("ASSISTANT: red stone.")
    assert one.encoder.processor.tokenizer.decode(target.ids) == " red stone."
    alone = force_answer(one.encoder, one.question("d"), "")
    assert isinstance(alone, ForcedAnswer)
    assert len(alone.ids) == 0
    assert len(alone.positions) == 1


def test_short_types_tell_what_rounding_loses(known: Known) -> None:
    one = known("llava")
    found = rewriting(one, "d", "e").association(EDITED, LONG)
    model = copy.deepcopy(one.model).to(torch.bfloat16)
    edit = edit_from_associations(MultimodalModel(model, one.layout), [found], 0.01)
    exact = edit_from_associations(one.mm, [found], 0.01)
    before = model.get_parameter(f"{edit.module}.weight").clone()
    with apply_edits(model, [edit]), apply_edits(one.model, [exact]):
        stored = model.get_parameter(f"{edit.module}.weight")
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, (before.float() + edit.change()).bfloat16())
    assert exact.rounding < 1e-5 < 1e-3 < edit.rounding < 0.1
    assert edit.misses[0] > exact.misses[0]


def test_fine_tuning_is_a_control(known: Known) -> None:
    one = known("llava")
    targets, before = [one.forced("d", "e")], tensors(one.model)
    free = fine_tuned(one.mm, targets, EDITED, EditConfig(steps=40), lr=0.01)
    with apply_edits(one.model, [free]):
        assert says(one, "d", "e")
    norm = float(free.change().norm()) / 4
    held = fine_tuned(one.mm, targets, EDITED, EditConfig(steps=10), norm, lr=0.01)
    assert float(held.change().norm()) == pytest.approx(norm, rel=1e-4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())
    assert all(p.grad is None for p in one.model.parameters())


def test_what_cannot_be_edited_is_told(known: Known, tmp_path: Path) -> None:
    one = known("llava")
    with pytest.raises(UserError, match="Layer 3 cannot be edited") as caught:
        rewriting(one, "d", "e").association(one.layout.num_layers - 1, LONG)
    assert "does not reach the answer" in caught.value.why
    with pytest.raises(UserError, match="Question d cannot be edited"):
        ValueOptimizer(one.mm, forced_without_constraint(one))
    with pytest.raises(UserError, match="out of range"):
        EditConfig(ridge=0.0)
    with pytest.raises(UserError, match="Layer 1 cannot be edited") as caught:
        down_projection(one.model, None, 1)
    assert "mixture of experts" in caught.value.why
    model = copy.deepcopy(one.model)
    name = str(one.layout.blocks[EDITED].down_proj)
    add_lora(model, [name], LoRA(r=4, dora=True), {})
    with pytest.raises(UserError, match="Layer 1 cannot be edited"):
        down_projection(model, name, 1)
    wide = load_model(Backbone(path=str(build_tiny("llava", tmp_path / "wide", hidden=64)), quantization="nf4"))
    with pytest.raises(UserError, match="Layer 1 cannot be edited") as caught:
        down_projection(wide, name, 1)
    assert "quantised" in caught.value.why


def forced_without_constraint(one: Taught) -> ForcedAnswer:
    made = force_answer(one.encoder, replace(one.question("d"), spans=()), "e")
    assert isinstance(made, ForcedAnswer)
    return made


def test_an_association_says_how_it_came_about(known: Known) -> None:
    found = rewriting(known("llava"), "d", "e").association(EDITED, LONG)
    assert isinstance(found, Association)
    assert found.losses[-1] < LONG.until <= found.losses[-2], "it stops as soon as it may"
    assert math.isfinite(sum(found.losses))
