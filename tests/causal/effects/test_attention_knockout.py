"""Knocked-out edges are those that an explicit mask hides, on every family, however the run is computed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import AttentionInterface

from lightning_mm.causal.effects import knockout_curves as curves
from lightning_mm.causal.effects.attention_knockout import (
    AttentionEdge,
    Knockout,
    attention_edge,
    knock_out,
    knockout_logits,
)
from lightning_mm.causal.effects.knockout_curves import MEASURES, KnockoutConfig
from lightning_mm.causal.interventions.activation_cache import cache_activations
from lightning_mm.causal.interventions.interventions import layer_window
from lightning_mm.causal.interventions.partial_forward import PartialForward
from lightning_mm.causal.questions.question import EncodedQuestion, last_logits
from lightning_mm.causal.questions.scoring import Answer
from lightning_mm.core.errors import UserError
from lightning_mm.models.attention.interception import repeated
from tests.helpers.causal_models import FAMILIES, Subject, subject

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KINDS: tuple[Any, ...] = ("pre", "post")
LAYERS = (2, 3)


def knocked(
    one: Subject, encoded: EncodedQuestion, edges: Sequence[AttentionEdge], layers: Sequence[int], kind: Any
) -> Tensor:
    with knock_out(one.mm, edges, layers, kind):
        return last_logits(one.mm, encoded.inputs)[0]


def masked_by_hand(one: Subject, encoded: EncodedQuestion, way: AttentionEdge, layers: Sequence[int]) -> Tensor:
    """Logits of transformers' own eager attention, given a 4-D mask in which the edge is hidden."""
    one.model.set_attn_implementation("eager")
    taken, handles = [], []

    def hide(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].clone()
        for i in way.targets.tolist():
            for j in way.sources.tolist():
                if i != j:
                    mask[0, :, i, j] = torch.finfo(mask.dtype).min
        taken.append(mask.shape)
        return args, kwargs | {"attention_mask": mask}

    for layer in layers:
        name = one.layout.blocks[layer].attention
        handles.append(one.model.get_submodule(name or "").register_forward_pre_hook(hide, with_kwargs=True))
    logits = one.model(**encoded.inputs).logits[0, -1]
    for handle in handles:
        handle.remove()
    one.model.set_attn_implementation("sdpa")
    assert taken == [(1, 1, encoded.length, encoded.length)] * len(layers)
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_before_the_softmax_it_is_an_explicit_mask(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    for way in (attention_edge(encoded, "image->question"), attention_edge(encoded, "question->last")):
        expected = masked_by_hand(one, encoded, way, LAYERS)
        torch.testing.assert_close(knocked(one, encoded, [way], LAYERS, "pre"), expected, **CLOSE)
        clean = last_logits(one.mm, encoded.inputs)[0]
        assert (expected - clean).abs().max() > 1e-4, "an edge that changes nothing shows nothing"


@pytest.mark.parametrize("name", FAMILIES)
def test_behind_the_softmax_what_is_cut_is_missing(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    run, way = cache_activations(one.mm, encoded.inputs), attention_edge(encoded, "image->question")
    for block in one.layout.blocks:
        call, left = run.attention_calls[block.index], []
        is_own = call.key.shape[2] == encoded.length
        score = call.query @ repeated(call.key, call.query).mT * call.options["scaling"]
        weight = (score + (0 if call.mask is None else call.mask)).softmax(-1)
        weight[:, :, way.targets[:, None], way.sources if is_own else slice(None)] = 0
        mixed = (weight @ repeated(call.value, call.query)).transpose(1, 2).flatten(2)
        expected = one.model.get_submodule(block.o_proj or "")(mixed)
        module = one.model.get_submodule(block.attention or "")
        handle = module.register_forward_hook(lambda _, __, output, left=left: left.append(output[0]))
        if is_own and not Knockout([way], [block.index], "post").cuts(call):
            handle.remove()
            continue
        knocked(one, encoded, [way], [block.index], "post")
        handle.remove()
        torch.testing.assert_close(left[0], expected, **CLOSE)
        others = [i for i in range(encoded.length) if i not in set(way.targets.tolist())]
        torch.testing.assert_close(left[0][:, others], run.values["attention", block.index][:, others], **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_however_it_is_computed_it_is_the_same(
    name: str, kind: Any, family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    partial_forward = PartialForward(one.mm, cache_activations(one.mm, encoded.inputs))
    layers = (0, 1) if name == "gemma3" else LAYERS  # its last token does not see as far as the picture
    for each in ("image->question", "question->last", "image->image", "constraint->last"):
        way = attention_edge(encoded, each)
        if not Knockout([way], layers, kind).cuts(partial_forward.base.attention_calls[layers[0]]):
            assert (name, each) == ("mllama", "image->image"), "only there the picture is one token"
            continue
        whole = knocked(one, encoded, [way], layers, kind)
        torch.testing.assert_close(knockout_logits(partial_forward, [way], layers, kind), whole, **CLOSE)
        one.model.set_attn_implementation("eager")
        torch.testing.assert_close(knocked(one, encoded, [way], layers, kind), whole, **CLOSE)
        one.model.set_attn_implementation("sdpa")
        assert not torch.equal(whole, partial_forward.base.logits[0])


@pytest.mark.parametrize("kind", KINDS)
def test_no_edge_and_no_layer_is_no_change(kind: Any, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "qwen2_5_vl", tmp_path)
    encoded = one.encode()
    run = cache_activations(one.mm, encoded.inputs)
    partial_forward, nobody = PartialForward(one.mm, run), torch.empty(0, dtype=torch.long)
    for way, layers in (
        (attention_edge(encoded, "image->last"), ()),
        (AttentionEdge("none", encoded.text, nobody), LAYERS),
        (AttentionEdge("none", nobody, encoded.image), LAYERS),
    ):
        assert torch.equal(knocked(one, encoded, [way], layers, kind), run.logits[0])
        assert torch.equal(knockout_logits(partial_forward, [way], layers, kind), run.logits[0])


def test_both_kinds_differ_and_only_one_makes_up_for_the_loss(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    encoded = one.encode()
    call = cache_activations(one.mm, encoded.inputs).attention_calls[1]
    rows = attention_edge(encoded, "image->last")
    ones = call.changed(value=torch.ones_like(call.value))
    kept = {kind: Knockout([rows], [1], kind)(ones)[0][0, -1] for kind in KINDS}
    lost = call.explicit()[1][0, :, -1][:, encoded.image].sum(1)
    torch.testing.assert_close(kept["pre"], torch.ones_like(kept["pre"]))
    torch.testing.assert_close(kept["post"], (1 - lost)[:, None].expand_as(kept["post"]))


def test_a_token_never_loses_itself(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    encoded = one.encode()
    every = torch.arange(encoded.length)
    call = cache_activations(one.mm, encoded.inputs).attention_calls[1]
    out, _ = Knockout([AttentionEdge("all", every, every)], [1], "pre")(call)
    torch.testing.assert_close(out, repeated(call.value, call.query).transpose(1, 2))


def test_hiding_tokens_from_all_that_follow_is_deleting_them(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    encoded = one.encode()
    gone = encoded.constraint
    kept = torch.tensor([i for i in range(encoded.length) if i not in set(gone.tolist())])
    inputs = {k: v[:, kept] if v.shape[1:] == (encoded.length,) else v for k, v in encoded.inputs.items()}
    deleted = one.model(**inputs, position_ids=kept[None]).logits[0, -1]
    way = AttentionEdge("gone", kept[kept > gone[-1]], gone)
    every = range(one.layout.num_layers)
    torch.testing.assert_close(knocked(one, encoded, [way], every, "pre"), deleted, **CLOSE)


def test_all_of_a_picture_seen_by_cross_attention_can_only_be_cut_behind(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, "mllama", tmp_path)
    encoded = one.encode()
    run, way = cache_activations(one.mm, encoded.inputs), attention_edge(encoded, "image->last")
    with pytest.raises(UserError, match="attend to nothing"):
        knocked(one, encoded, [way], [1], "pre")
    out, _ = Knockout([way], [1], "post")(run.attention_calls[1])
    torch.testing.assert_close(out[0, -1], torch.zeros_like(out[0, -1]), atol=1e-6, rtol=0)


def test_what_cannot_be_cut_is_an_error(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    encoded = one.encode()
    for name in ("last->last", "image->nothing", "image"):
        with pytest.raises(UserError, match="no edge"):
            attention_edge(encoded, name)
    with pytest.raises(UserError, match="changed nothing"):
        knocked(
            one, encoded, [AttentionEdge("last->image", encoded.image, torch.tensor([encoded.length - 1]))], [1], "pre"
        )
    call = cache_activations(one.mm, encoded.inputs).attention_calls[1]
    with pytest.raises(UserError, match="under flash_attention_2"):
        Knockout([attention_edge(encoded, "image->last")], [1], "pre")(call.changed(kernel="flash_attention_2"))


@pytest.mark.parametrize("name", ["llava", "gemma3", "mllama"])
def test_nothing_is_left_behind(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()

    def state() -> Any:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in one.model.modules())
        kernels = [m.config._attn_implementation for m in one.model.modules() if hasattr(m, "config")]
        return hooks, kernels, one.model.config.to_dict(), sorted(AttentionInterface().keys())

    logits, way = one.model(**encoded.inputs).logits, attention_edge(encoded, "question->last")
    before = state()  # transformers puts hooks of its own in during the first run
    knocked(one, encoded, [way], LAYERS, "pre")
    knocked(one, encoded, [way], LAYERS, "post")
    with pytest.raises(ZeroDivisionError), knock_out(one.mm, [way], LAYERS, "pre"):
        raise ZeroDivisionError
    with pytest.raises(UserError), knock_out(one.mm, [way], LAYERS, "pre"):
        pass
    assert state() == before
    assert torch.equal(one.model(**encoded.inputs).logits, logits)


def test_adapted_models_are_as_merged_ones(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    encoded = one.encode()
    lora = LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, one.model).eval()
    ways = [attention_edge(encoded, "image->question"), attention_edge(encoded, "question->last")]
    adapted = {kind: knocked(one, encoded, ways, LAYERS, kind) for kind in KINDS}
    for module in list(one.model.modules()):
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()
    for kind in KINDS:
        torch.testing.assert_close(knocked(one, encoded, ways, LAYERS, kind), adapted[kind], **CLOSE)


def answered(one: Subject, encoded: EncodedQuestion, right: bool = True) -> Answer:
    chances = last_logits(one.mm, encoded.inputs)[0].softmax(-1)
    best = float(chances.max())
    return Answer(encoded, int(chances.argmax()), best, best, right, 1)


@pytest.mark.parametrize("exact", [True, False])
def test_curves_are_means_over_the_right_answers(
    exact: bool, family: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject(family, "llava", tmp_path)
    answers = [answered(one, one.encode(seed=seed), seed != 4) for seed in range(5)]
    if not exact:
        monkeypatch.setattr(curves, "_partial_forward", lambda *_: None)
    config = KnockoutConfig(("image->question",), KINDS, width=3, convention="rome")
    found = {(m, site): row for m, site, row in curves.knockout_curves(one.mm, answers, config)}
    assert set(found) == {(m, f"image->question/{kind}") for m in MEASURES for kind in KINDS}
    for kind in KINDS:
        layer, values = 1, []
        for answer in answers[:4]:
            before = last_logits(one.mm, answer.encoded.inputs)[0].double()
            way, layers = (
                attention_edge(answer.encoded, "image->question"),
                layer_window(layer, 3, one.layout.num_layers, "rome"),
            )
            after = knocked(one, answer.encoded, [way], layers, kind).double()
            p, q = before.softmax(-1), after.softmax(-1)
            t = answer.target
            kl = torch.nn.functional.kl_div(q.log(), p, reduction="sum")
            values.append([q[t] / p[t] - 1, after.argmax() == t, kl, after[t] - before[t]])
        for measure, value in zip(MEASURES, torch.tensor(values, dtype=torch.float64).mean(0), strict=True):
            row = found[measure, f"image->question/{kind}"]
            assert len(row) == one.layout.num_layers
            assert row[layer].value == pytest.approx(float(value), abs=1e-6)
            assert (row[layer].n, row[layer].null) == (4, float(measure == "knockout_accuracy"))
            assert row[layer].notes == ("1 of 5 questions left out: answered wrong",)


def test_a_right_answer_that_the_model_does_not_give_has_no_accuracy_to_lose(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, "llava", tmp_path)
    says, other = answered(one, one.encode(seed=0)), answered(one, one.encode(seed=1))
    answers = [says, replace(other, target=other.target + 1)]
    rows = curves.knockout_curves(one.mm, answers, KnockoutConfig(("image->question",)))
    nulls = {measure: {estimate.null for estimate in row} for measure, _, row in rows}
    assert nulls == {measure: {0.5 if measure == "knockout_accuracy" else 0.0} for measure in MEASURES}


def test_layers_without_an_edge_are_undefined(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "mllama", tmp_path)
    answers = [answered(one, one.encode(seed=seed)) for seed in range(3)]
    config = KnockoutConfig(("image->last", "image->image"), KINDS)
    found = {(m, site): row for m, site, row in curves.knockout_curves(one.mm, answers, config)}
    assert found["knockout", "image->last/pre"][1].undefined, "cross-attention to nothing but the picture"
    assert found["knockout", "image->last/post"][1].value is not None
    alone = found["knockout", "image->image/post"]
    assert [bool(row.undefined) for row in alone] == [True, False, True, True], "one token, which sees the picture"
    wrong = [answered(one, one.encode(), right=False)]
    none = list(curves.knockout_curves(one.mm, wrong, config))
    assert all(estimate.undefined == "none is right" for _, _, row in none for estimate in row)
    with pytest.raises(UserError, match="nothing to knock out"):
        KnockoutConfig(width=0)
