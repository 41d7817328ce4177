"""Contributions add up to what attention puts out, on every family; shares are theirs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lightning_mm.causal.effects import attention_flow
from lightning_mm.causal.effects.attention_flow import (
    FLOW_EDGES,
    contribution_norms,
    contributions,
    flow_curves,
    flow_shares,
    output_projection,
)
from lightning_mm.causal.effects.attention_knockout import attention_edge
from lightning_mm.causal.effects.failure_predictor import contribution_features
from lightning_mm.causal.interventions.activation_cache import cache_activations
from lightning_mm.core.errors import UserError
from lightning_mm.models.layout import ModelLayout
from tests.helpers.causal_models import FAMILIES, Subject, subject

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def through_the_projection(one: Subject, inputs: dict[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Per layer what enters and what leaves o_proj in a run that nothing looks into: (L, H * E) and (L, D)."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []
    for block in one.layout.blocks:
        assert block.o_proj is not None

        def hook(_: nn.Module, args: Any, output: Tensor, index: int = block.index) -> None:
            found[index] = args[0][0], output[0]

        handles.append(one.model.get_submodule(block.o_proj).register_forward_hook(hook))
    one.model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_contributions_add_up(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    run = cache_activations(one.mm, encoded.inputs)
    outside, queries = through_the_projection(one, encoded.inputs), torch.tensor([3, 8, encoded.length - 1])
    for block in one.layout.blocks:
        entered, left = (each[queries] for each in outside[block.index])
        by_head = contributions(one.mm, run, block.index, queries, by_head=True)
        together = contributions(one.mm, run, block.index, queries)
        torch.testing.assert_close(by_head.sum(0), together, **CLOSE)
        torch.testing.assert_close(together.sum(1), left, **CLOSE)
        assert block.o_proj is not None
        weight = one.model.get_submodule(block.o_proj).weight
        size = entered.shape[1] // len(by_head)
        for head in range(len(by_head)):
            part = slice(head * size, (head + 1) * size)
            torch.testing.assert_close(by_head[head].sum(1), entered[:, part] @ weight[:, part].T, **CLOSE)
        norms = contribution_norms(one.mm, run, block.index, queries)
        torch.testing.assert_close(norms.tokens, together.norm(dim=-1), **CLOSE)
        torch.testing.assert_close(norms.heads, by_head.norm(dim=-1), **CLOSE)
        assert not norms.tokens[~norms.visible].any(), "what is not seen gives nothing"


def test_many_keys_are_taken_some_at_a_time(
    family: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject(family, "qwen3_vl", tmp_path)
    encoded = one.encode()
    run, queries = cache_activations(one.mm, encoded.inputs), torch.tensor([20, 30])
    whole = contributions(one.mm, run, 1, queries)
    monkeypatch.setattr(attention_flow, "_KEYS_PER_CHUNK", 7)
    torch.testing.assert_close(contributions(one.mm, run, 1, queries), whole)
    torch.testing.assert_close(contribution_norms(one.mm, run, 1, queries).tokens, whole.norm(dim=-1), **CLOSE)


@pytest.mark.parametrize("kind", ["bias", "lora", "nf4"])
def test_the_projection_may_be_any_linear_module(kind: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    if kind == "lora":
        inject_adapter_in_model(LoraConfig(target_modules=["o_proj"], init_lora_weights=False), one.model).eval()
    for block in one.layout.blocks:
        assert block.attention is not None
        plain = one.model.get_submodule(f"{block.attention}.o_proj")
        if kind == "bias":
            plain.bias = nn.Parameter(torch.randn(plain.out_features), requires_grad=False)
        if kind == "nf4":
            made = Linear4bit(plain.in_features, plain.out_features, False, torch.float32, quant_type="nf4")
            made.load_state_dict({"weight": plain.weight})
            one.model.get_submodule(block.attention).o_proj = made.to("cpu")
    if kind != "lora":
        one = replace(one, layout=ModelLayout.of(one.model))
    encoded = one.encode()
    run, outside = cache_activations(one.mm, encoded.inputs), through_the_projection(one, encoded.inputs)
    queries = torch.tensor([encoded.length - 1])
    for layer, (_, left) in outside.items():
        module = one.model.get_submodule(one.layout.blocks[layer].o_proj or "")
        bias = output_projection(module, 32, left)[1]
        assert bool(bias.any()) == (kind == "bias")
        total = contributions(one.mm, run, layer, queries).sum(1) + bias
        torch.testing.assert_close(total, left[queries], **CLOSE)


def test_key_heads_in_a_wrong_order_are_noticed(
    family: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject(family, "llava", tmp_path)
    encoded = one.encode()
    run = cache_activations(one.mm, encoded.inputs)
    assert run.attention_calls[0].key.shape[1] < run.attention_calls[0].query.shape[1], "heads share keys"
    monkeypatch.setattr(attention_flow, "repeat_kv", lambda heads, like: heads.repeat(1, 2, 1, 1))
    with pytest.raises(UserError, match="cannot be split"):
        contributions(one.mm, run, 0, torch.tensor([5]))


def test_attention_that_does_more_is_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    name = one.layout.blocks[1].o_proj
    assert name is not None
    handle = one.model.get_submodule(name).register_forward_pre_hook(lambda _, args: (args[0].sigmoid(),))
    run = cache_activations(one.mm, one.encode().inputs)
    handle.remove()
    contributions(one.mm, run, 0, torch.tensor([5]))
    with pytest.raises(UserError, match="cannot be split"):
        contributions(one.mm, run, 1, torch.tensor([5]))


@pytest.mark.parametrize("name", ["llava", "gemma3", "mllama"])
def test_late_tokens_and_early_ones_are_the_picture(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    run = cache_activations(one.mm, encoded.inputs)
    edges = ("image->constraint", "image_early->constraint", "image_late->constraint")
    shares_EN, _ = flow_shares(one.mm, run, encoded, edges)
    for whole, early, late in shares_EN.T:
        if name == "mllama" and early.isnan():
            continue  # of cross-attention it is not known which of its keys are late
        assert float(early + late) == pytest.approx(float(whole), abs=1e-9)
    assert len(attention_edge(encoded, edges[2]).sources) == max(1, round(len(encoded.image) / 16))
    with pytest.raises(UserError, match="no edge 'image_last->last'"):
        attention_edge(encoded, "image_last->last")


@pytest.mark.parametrize("name", ["llava", "gemma3", "mllama"])
def test_shares_are_those_of_contributions(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    run = cache_activations(one.mm, encoded.inputs)
    share, chance = flow_shares(one.mm, run, encoded)
    for number, each in enumerate(FLOW_EDGES):
        way = attention_edge(encoded, each)
        for layer in range(one.layout.num_layers):
            sizes = contributions(one.mm, run, layer, way.targets).norm(dim=-1)
            from_sources = sizes[:, way.sources] if sizes.shape[1] == encoded.length else sizes * way.is_image
            expected = (from_sources.sum(1) / sizes.sum(1)).mean()
            assert share[number, layer] == pytest.approx(float(expected), abs=1e-5)
    if name == "llava":  # the last token sees everyone
        assert chance[FLOW_EDGES.index("image->last"), 0] == pytest.approx(len(encoded.image) / encoded.length)
    if name == "mllama":
        assert share[FLOW_EDGES.index("image->last"), 1] == chance[FLOW_EDGES.index("image->last"), 1] == 1
        assert share[FLOW_EDGES.index("question->last"), 1] == 0


def test_flow_is_the_mean_over_questions_with_an_interval_by_picture(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, "llava", tmp_path)
    encoded = [one.encode(seed=seed, group=f"picture {seed // 2}") for seed in range(6)]
    curves = dict(flow_curves(one.mm, encoded))
    assert tuple(curves) == FLOW_EDGES
    runs = [cache_activations(one.mm, each.inputs) for each in encoded]
    every = torch.stack([flow_shares(one.mm, r, a)[0] for r, a in zip(runs, encoded, strict=True)])
    for number, estimates in enumerate(curves.values()):
        assert len(estimates) == one.layout.num_layers
        for layer, estimate in enumerate(estimates):
            assert estimate.value == pytest.approx(float(every[:, number, layer].mean()))
            assert estimate.low is not None
            assert estimate.low < estimate.value < (estimate.high or 0)
            assert (estimate.n, estimate.null is not None) == (6, True)


def test_a_question_without_a_constraint_has_no_flow_through_it(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    encoded = one.encode()
    bare = type(encoded)(encoded.question, encoded.inputs, encoded.tokens, encoded.image, (), encoded.text)
    curves = dict(flow_curves(one.mm, [bare]))
    assert all(e.undefined for e in (*curves["image->constraint"], *curves["constraint->last"]))
    assert all(e.value is not None for e in curves["image->last"])
    with pytest.raises(UserError, match="no constraint"):
        contribution_features(one.mm, cache_activations(one.mm, bare.inputs), bare)


def test_features_are_the_largest_constraint_token_of_each_head(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "qwen2_5_vl", tmp_path)
    encoded = one.encode()
    run = cache_activations(one.mm, encoded.inputs)
    last = torch.tensor([encoded.length - 1])
    expected = [
        contributions(one.mm, run, layer, last, by_head=True)[:, 0, encoded.constraint].norm(dim=-1).amax(1)
        for layer in range(one.layout.num_layers)
    ]
    torch.testing.assert_close(contribution_features(one.mm, run, encoded), torch.cat(expected))
