"""A connector scaled to the stream: equal norms on every family, once, at the beginning of a fit, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mm.core.errors import UserError
from lightning_mm.data.collator import Collator
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.execution import connector_init
from lightning_mm.execution.connector_init import scale_connector
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.processor import load_processor
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import ConnectorOnly, IntermediateOnly, LoRA, LoRAOnMiddle
from lightning_mm.tuning.apply import apply_plan
from lightning_mm.tuning.policy import TuningPlan
from tests.helpers import connector_ranks
from tests.helpers.data import Data, Family
from tests.helpers.training import BareModule, SaveAt, train

FAMILIES = {
    "llava": "multi_modal_projector.linear_2.weight",
    "llava_next": "multi_modal_projector.linear_2.weight",
    "llava_onevision": "multi_modal_projector.linear_2.weight",
    "vipllava": "multi_modal_projector.linear_2.weight",
    "aya_vision": "multi_modal_projector.linear_2.weight",
    "qwen2_vl": "merger.mlp.2.weight",
    "qwen2_5_vl": "merger.mlp.2.weight",
    "qwen3_vl": "merger.linear_fc2.weight",
    "idefics3": "modality_projection.proj.weight",
    "smolvlm": "modality_projection.proj.weight",
    "internvl": "multi_modal_projector.linear_2.weight",
    "gemma3": "mm_input_projection_weight",
}
"""The last linear map of each family's connector; Gemma 3's is a bare parameter."""
WITH_NORM_IN_FRONT = ("vipllava", "aya_vision", "qwen2_vl", "qwen3_vl", "internvl")


def planned(folder: Path, tuning: Any = ConnectorOnly()) -> tuple[MultimodalModel, TuningPlan]:  # noqa: B008  (frozen)
    mm = MultimodalModel.of(load_model(Backbone(path=str(folder))), load_processor(str(folder)))
    plan = tuning.plan(mm.layout)
    apply_plan(mm, plan)
    return mm, plan


def norms(mm: MultimodalModel, batch: Any) -> tuple[float, float]:
    """Mean norm of picture tokens and of words, from transformers' own hidden states."""
    tokenizer = mm.required_processor.processor.tokenizer
    words = tokenizer(connector_init._SENTENCE, return_tensors="pt")
    given = {name: words[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        behind = mm.model(**given, output_hidden_states=True).hidden_states[1][0, 1:]
        entering = mm.model(**batch.inputs, output_hidden_states=True).hidden_states[0]
    ids = torch.tensor(mm.required_processor.image_token_ids)
    tokens = entering[torch.isin(batch.inputs["input_ids"], ids)]
    marks = [p for n, p in mm.model.named_parameters() if n.endswith("image_newline")]
    made = torch.stack([~torch.isclose(tokens, mark).all(-1) for mark in marks]).all(0) if marks else slice(None)
    return float(tokens[made].norm(dim=-1).mean()), float(behind.norm(dim=-1).mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_picture_tokens_enter_at_the_norm_of_the_stream(name: str, family: Family, data: Data) -> None:
    """1e-4: float32 sums. Only weight and bias of the last linear map change, by one factor."""
    mm, plan = planned(family(name))
    batch = Collator(mm.required_processor)([s for s in read_conversations(data["train"]).samples if s.images][:2])
    with torch.no_grad():
        next(mm.embedding.parameters()).mul_(3)  # random connectors may happen to be as loud as random words
    before = {key: value.detach().clone() for key, value in mm.model.named_parameters()}
    quiet, stream = norms(mm, batch)
    assert quiet != pytest.approx(stream, rel=0.05), "there is something to do"
    scale = scale_connector(mm, plan, batch)
    assert scale.parameters[0].endswith(FAMILIES[name])
    assert scale.words == pytest.approx(stream, rel=1e-4)
    assert norms(mm, batch) == pytest.approx((stream, stream), rel=1e-4)
    changed = {key for key, value in mm.model.named_parameters() if not torch.equal(value, before[key])}
    if norm := changed - set(scale.parameters):  # the layer norm in front, see below
        assert len({key.rpartition(".")[0] for key in norm}) == 1
        assert name in WITH_NORM_IN_FRONT
    else:
        assert scale.pictures == pytest.approx(quiet, rel=1e-4)
    for key in scale.parameters:
        assert torch.equal(mm.model.get_parameter(key), before[key] * scale.factor), key


def test_without_rows_a_synthetic_picture_is_measured(family: Family, data: Data) -> None:
    """Another picture, hence another norm, of the same order."""
    mm, plan = planned(family("llava"))
    batch = Collator(mm.required_processor)([s for s in read_conversations(data["train"]).samples if s.images][:2])
    scale_connector(mm, plan)
    pictures, words = norms(mm, batch)
    assert words / 2 < pictures < words * 2


class _Normed(nn.Module):
    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.LayerNorm(size)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.norm(self.inner(features))
        return out


def test_what_it_cannot_do_is_refused_and_changes_nothing(family: Family) -> None:
    mm, _ = planned(family("llava"))
    model: Any = mm.model
    model.model.multi_modal_projector = _Normed(model.model.multi_modal_projector, 32)
    normed = MultimodalModel.of(model, mm.processor)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    with pytest.raises(UserError, match=r"(?s)cannot be had for llava.*a norm stands behind it"):
        scale_connector(normed, ConnectorOnly().plan(normed.layout))
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())
    with pytest.raises(UserError, match=r"(?s)cannot be had for mllama.*No linear map"):
        scale_connector(*planned(family("mllama")))
    for tuning in (IntermediateOnly(layers="1-2"), LoRAOnMiddle(layers="1-2", lora=LoRA(r=2), connector="lora")):
        with pytest.raises(UserError, match="needs a connector that trains"):
            scale_connector(*planned(family("llava"), tuning))
    with pytest.raises(UserError, match=r"connector_init: 'loud' is no choice"):
        MMModule(str(family("llava")), ConnectorOnly(), connector_init="loud")  # type: ignore[arg-type]


def _second_linear(module: MMModule) -> Tensor:
    weight: Tensor = module.model.get_parameter("model.multi_modal_projector.linear_2.weight")
    return weight.detach().clone()


def test_a_fit_is_scaled_once(family: Family, data: Data, tmp_path: Path) -> None:
    """At the beginning; neither when it is resumed, nor when a checkpoint is loaded."""
    plain = planned(family("llava"))[0].model.get_parameter("model.multi_modal_projector.linear_2.weight")
    started: list[Tensor] = []
    checkpoint = tmp_path / "half.ckpt"

    def fit(**options: Any) -> MMModule:
        module, _ = train(
            family("llava"),
            data,
            tmp_path,
            tuning=ConnectorOnly(),
            connector_init="stream_norm",
            on_start=lambda module: started.append(_second_linear(module)),
            max_steps=4,
            **options,
        )
        return module

    whole = fit()
    ratio = started[0] / plain
    assert torch.allclose(ratio, ratio.mean(), rtol=1e-4)
    assert not torch.isclose(ratio.mean(), torch.tensor(1.0), rtol=0.05)
    with pytest.raises(SystemExit):
        fit(callbacks=[SaveAt(2, checkpoint)])
    resumed = fit(ckpt_path=checkpoint)
    assert torch.equal(_second_linear(resumed), _second_linear(whole))
    loaded = BareModule.load_from_checkpoint(checkpoint, connector_init="stream_norm")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    kept = next(value for key, value in saved.items() if key.endswith("linear_2.weight"))
    assert torch.equal(_second_linear(loaded), kept)


def test_ranks_agree(family: Family, data: Data, tmp_path: Path) -> None:
    """Two ranks that measure something else (by another sentence) scale by what rank 0 has measured."""
    told = connector_ranks.launch(family("llava"), data["train"], tmp_path)
    assert told[0] == told[1]
    alone = [connector_ranks.factor_of(family("llava"), data["train"], tmp_path, rank) for rank in range(2)]
    assert alone[0] == told[0]
    assert alone[1] != told[0]


@pytest.mark.parametrize(("name", "linear"), [("vipllava", "linear_1"), ("internvl", "linear_1")])
def test_a_layer_norm_in_front_gives_features_of_mean_0_and_deviation_1(
    name: str, linear: str, family: Family, data: Data
) -> None:
    """1e-4: float32 sums over some hundred tokens; nothing but the layer norm and the last linear map changes."""
    mm, plan = planned(family(name))
    batch = Collator(mm.required_processor)([s for s in read_conversations(data["train"]).samples if s.images][:6])
    before = {key: value.detach().clone() for key, value in mm.model.named_parameters()}
    scale = scale_connector(mm, plan, batch)
    seen: list[Tensor] = []
    first = mm.model.get_submodule(f"model.multi_modal_projector.{linear}")
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        mm.model(**batch.inputs)
    features = torch.cat(seen)
    torch.testing.assert_close(features.mean(0), torch.zeros(features.shape[1]), atol=1e-4, rtol=0)
    varied = features.std(0)
    assert (varied < 1 + 1e-4).all()
    assert varied.median() == pytest.approx(1, abs=1e-4)
    changed = {key for key, value in mm.model.named_parameters() if not torch.equal(value, before[key])}
    assert {key for key in changed - set(scale.parameters) if "norm" not in key} == set()
