"""Hybrids: none is the starting model, all is the tuned one, and afterwards everything is as it was, bit by bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from lightning_mm.causal.effects.layer_transplant import (
    Hybrid,
    TransplantConfig,
    combine_hybrids,
    hybrid_from_adapters,
    hybrid_from_models,
    hybrid_from_start,
    score_conversations,
    transplant_curve,
    transplant_rows,
    transplant_windows,
)
from lightning_mm.causal.questions.question import last_logits
from lightning_mm.core.errors import UserError
from lightning_mm.data.collator import Collator
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.handle import MultimodalModel
from tests.helpers.causal_models import Subject, subject

FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "gemma3"]


@torch.no_grad()
def tuned_of(one: Subject) -> Any:
    """The same model, its decoder blocks, norm and head moved."""
    tuned = copy.deepcopy(one.model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tuned.named_parameters():
        place = one.layout.locations[name]
        if place.layer is not None or place.region in ("norm", "head"):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return tuned


def check(one: Subject, hybrid: Hybrid, base: torch.Tensor, tuned: torch.Tensor, inputs: dict[str, Any]) -> None:
    def logits() -> torch.Tensor:
        return last_logits(one.mm, inputs)

    before, held = logits(), [p.data_ptr() for p in one.model.parameters()]
    with hybrid(()):
        assert torch.equal(logits(), base)
    with hybrid(range(one.layout.num_layers)):
        assert torch.equal(logits(), tuned)
    with hybrid((1,)):
        between = logits()
    assert not torch.equal(between, base)
    assert not torch.equal(between, tuned)
    with pytest.raises(ZeroDivisionError), hybrid((1,)):
        raise ZeroDivisionError
    assert torch.equal(logits(), before)
    assert [p.data_ptr() for p in one.model.parameters()] == held


@pytest.mark.parametrize("name", FAMILIES)
def test_two_models(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    inputs, tuned = one.encode().inputs, tuned_of(one)
    ends = [last_logits(MultimodalModel(model, one.layout), inputs) for model in (one.model, tuned)]
    check(one, hybrid_from_models(one.mm, tuned), *ends, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_and_what_it_was(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    inputs = one.encode().inputs
    start = {n: p.clone() for n, p in one.model.named_parameters() if one.layout.locations[n].layer is not None}
    base = last_logits(one.mm, inputs)
    with torch.no_grad():
        for name_ in start:
            one.model.get_parameter(name_).mul_(1.2)
    tuned = last_logits(one.mm, inputs)
    check(one, hybrid_from_start(one.mm, start), base, tuned, inputs)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_and_other_weights(dora: bool, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    inputs = one.encode().inputs
    base = last_logits(one.mm, inputs)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_dora=dora)
    one.model.get_decoder().requires_grad_(False)
    inject_adapter_in_model(config, one.model.get_decoder())
    one.model.eval()
    with torch.no_grad():
        for name, parameter in one.model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.3)
    tuned = last_logits(one.mm, inputs)
    check(one, hybrid_from_adapters(one.mm), base, tuned, inputs)
    head = {f"{one.layout.head}.weight": one.model.get_submodule(one.layout.head).weight.clone()}
    with torch.no_grad():
        one.model.get_submodule(one.layout.head).weight.mul_(2)
    with combine_hybrids(hybrid_from_adapters(one.mm), hybrid_from_start(one.mm, head))(()):
        assert torch.equal(last_logits(one.mm, inputs), base)


def test_curves_count_whole_answers(family: Callable[[str], Path], data: dict[str, Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    loader = MMDataModule(train=str(data["train"]), processor=str(family("llava")))
    samples = loader.samples("train")
    batch = Collator(loader.processing)(samples[:6])
    found = score_conversations(one.mm, [batch], torch.device("cpu"))
    logits = one.model(**batch.inputs).logits.flatten(0, 1)[batch.supervised].argmax(-1)
    row = batch.supervised // batch.inputs["input_ids"].shape[1]
    expected = [bool((logits == batch.targets)[row == index].all()) for index in range(6)]
    assert found.right.tolist() == [float(each) for each in expected]
    assert set(found.modalities) == {"picture"}
    with torch.no_grad():  # it says the first token of all to everything
        one.model.get_submodule(one.layout.head).weight.zero_()
    chosen = transplant_windows("sliding", 4, step=2)
    curve = transplant_curve(one.mm, hybrid_from_models(one.mm, one.model), [batch], torch.device("cpu"), chosen)
    ((site, rows),) = transplant_rows("sliding", curve, found)
    assert site == "sliding/picture"
    assert set(rows) == {0, 2}
    assert all((each.value, each.null, each.n) == (0.0, float(found.right.mean()), 6) for each in rows.values())


def test_windows_are_about_fifteen_or_those_that_are_asked_for() -> None:
    assert len(TransplantConfig().windows("sliding", 32)) == 16
    assert TransplantConfig().windows("sliding", 32)[4] == (2, 3, 4, 5, 6)
    # Palacios et al.: one layer at a time, every second one.
    single = TransplantConfig(width=1, step=2)
    assert single.windows("sliding", 32) == {layer: (layer,) for layer in range(0, 32, 2)}
    assert single.windows("cumulative", 6) == {1: (0, 1), 3: (0, 1, 2, 3), 5: (0, 1, 2, 3, 4, 5)}
    with pytest.raises(UserError, match="width is 0"):
        TransplantConfig(width=0)
