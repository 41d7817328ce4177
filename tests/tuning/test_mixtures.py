"""Policies on mixtures of experts: what is named trains, adapters on experts are what they are said to be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.models.block_parts import BlockPart
from lightning_mm.models.export.export import Provenance, export_adapter, export_full
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone
from lightning_mm.models.lora import UNMATCHED_RANKS, adapted_weights
from lightning_mm.models.processor import load_processor
from lightning_mm.tuning import Full, IntermediateOnly, LoRA, LoRAOnMiddle, TuningPolicy
from lightning_mm.tuning.apply import apply_policy, prepare_model
from lightning_mm.tuning.census import take_census
from lightning_mm.tuning.found_plan import plan_as_found
from tests.helpers.data import Data, Family
from tests.helpers.mixtures import EXPERTS, build, mixture_folder
from tests.helpers.training import Losses, SaveAt, train

IDS = torch.arange(10, 30)[None] % 60
LORA = LoRA(r=2, alpha=4.0, rank_per_layer={"1": 3})


@pytest.fixture(scope="module")
def mixture(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture_folder(family("qwen3_vl"), tmp_path_factory.mktemp("mixture") / "qwen3_vl_moe")


def parts_of(model: Any, names: Any) -> set[BlockPart | None]:
    layout = MultimodalModel.of(build(model)).layout
    return {layout.location_of(name).part for name in names if layout.location_of(name).layer is not None}


@pytest.mark.parametrize("policy", [Full(), IntermediateOnly(layers="all"), LoRAOnMiddle(layers="all")])
def test_routers_train_only_if_named_and_it_is_said(policy: TuningPolicy) -> None:
    model = build("llama4")  # its router is a linear module
    decision_log().clear()
    apply_policy(model, policy)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert parts_of("llama4", trained) >= {"attention", "mlp", "experts", "shared_experts"}
    assert "router" not in parts_of("llama4", trained)
    assert any("1 tensors of routers stay frozen" in str(each) for each in decision_log())


def test_parts_of_mixtures_can_be_named() -> None:
    for part in ("experts", "shared_experts", "router"):
        model = build("llama4")
        decision_log().clear()
        apply_policy(model, IntermediateOnly(layers="1", parts=[part]))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trained
        assert parts_of("llama4", trained) == {part}
        assert any("routers" in str(each) for each in decision_log()) == (part != "router")
    with pytest.raises(UserError, match="attention, experts, norm, router, shared_experts"):
        apply_policy(build("llama4"), IntermediateOnly(layers="1", parts=["mlp"]))


def test_the_share_that_adapters_reach_is_counted_and_said() -> None:
    """The share in closed form, from the shapes of the modelling file."""
    model = build("qwen3_vl_moe")
    decision_log().clear()
    plan = apply_policy(model, LoRAOnMiddle(layers="1", parts=["attention"]))
    attention = 2 * 32 * 32 + 2 * 32 * 16
    others = EXPERTS * (32 * 32 + 16 * 32) + EXPERTS * 32 + 2 * 32 + 2 * 8
    expected = attention / (attention + others)
    assert take_census(MultimodalModel(model, MultimodalModel.of(build("qwen3_vl_moe")).layout), plan).reach == expected
    said = [str(each) for each in decision_log() if each.name == "model.tuning.lora"]
    assert f"adapters reach {expected:.1%} of the weights of layers 1 (none in experts, router)" in said[0]


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "llama4", "glm4v_moe"])
def test_an_adapted_model_is_the_model_with_products_added_to_its_weights(name: str) -> None:
    """1e-5: PEFT adds the product of the factors to the weights, too, in float32.

    PEFT takes names of GLM's dense MLP and shared experts for those of experts.
    """
    model, plain = build(name), build(name)
    plan = apply_policy(model, LoRAOnMiddle(layers="all", lora=LORA))
    assert plan.adapted_stacks
    shake(model)
    ours = adapted_weights(model)
    assert ours.keys() == plan.adapted_weights
    with torch.no_grad():
        for weight, layer in ours.items():
            plain.get_parameter(weight).add_(change(weight, layer))
        expected, start = plain(input_ids=IDS).logits, build(name)(input_ids=IDS).logits
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - start).abs().max() > 0.1
    found = plan_as_found(MultimodalModel(model, MultimodalModel.of(build(name)).layout))
    assert (found.adapted, found.adapted_stacks, found.full) == (plan.adapted, plan.adapted_stacks, plan.full)


def shake(model: torch.nn.Module) -> None:
    """Random adapters: theirs start at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if ".lora_" in n):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def change(weight: str, layer: Any) -> Tensor:
    """What LoRA adds to a weight, expert by expert: alpha / r of A's rows of the expert, and of every E-th column of B.

    Shapes: (r E, in) A, (out, r E) B.
    """
    a, b = (getattr(layer, f"lora_{side}")["default"].weight for side in "AB")
    scale = LORA.alpha / LORA.r
    if "experts." not in weight or "shared" in weight:
        return scale * b @ a  # type: ignore[no-any-return]
    rank = 3 if ".layers.1." in weight else 2
    assert len(a) == rank * EXPERTS
    return torch.stack([scale * b[:, e::EXPERTS] @ a[e * rank : (e + 1) * rank] for e in range(EXPERTS)])


@pytest.mark.parametrize("option", [{"dropout": 0.1}, {"dora": True}])
def test_what_experts_cannot_have_is_refused(option: dict[str, Any]) -> None:
    lora = LoRA(r=2, **option)
    with pytest.raises(UserError, match="on experts"):
        apply_policy(build("qwen3_vl_moe"), LoRAOnMiddle(layers="all", lora=lora))
    with pytest.raises(UserError, match="plain LoRA on plain weights"):
        apply_policy(build("glm4v_moe"), LoRAOnMiddle(layers="0", parts=["mlp"], lora=lora))
    apply_policy(build("qwen3_vl_moe"), LoRAOnMiddle(layers="all", parts=["attention"], lora=lora))


@pytest.mark.parametrize("policy", [LoRAOnMiddle(layers="1-2", lora=LoRA(r=2)), IntermediateOnly(parts=["experts"])])
def test_killed_and_resumed_equals_uninterrupted(
    policy: TuningPolicy, mixture: Path, data: Data, tmp_path: Path
) -> None:
    """And what is planned moves, nothing else does."""
    before: dict[str, Tensor] = {}
    whole, rest, checkpoint = Losses(), Losses(), tmp_path / "killed.ckpt"
    remember: Any = lambda module: before.update({n: p.detach().clone() for n, p in module.named_parameters()})  # noqa: E731
    expected, _ = train(mixture, data, tmp_path, tuning=policy, callbacks=[whole], max_steps=4, on_start=remember)
    with pytest.raises(SystemExit):
        train(mixture, data, tmp_path, tuning=policy, callbacks=[SaveAt(2, checkpoint)], max_steps=4)
    resumed, _ = train(mixture, data, tmp_path, tuning=policy, callbacks=[rest], ckpt_path=checkpoint, max_steps=4)
    for name, parameter in expected.trainable.items():
        assert torch.equal(parameter, resumed.trainable[name]), name
    assert rest.by_step[4] == whole.by_step[4]
    moved = {name for name, p in expected.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(expected.trainable)


@pytest.mark.filterwarnings(
    f"ignore:{UNMATCHED_RANKS}",  # PEFT loads the adapter here, and asks an older name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe"])
def test_exports_load_without_this_package(name: str, family: Family, tmp_path: Path) -> None:
    """1e-5: merged weights are rounded once more. GLM's adapter meets the names that PEFT takes for experts'."""
    build(name).save_pretrained(tmp_path / "base")
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    processor = load_processor(str(family("qwen3_vl"))).processor
    apply_policy(model, LoRAOnMiddle(layers="all", lora=LORA))
    shake(model)
    model.eval()
    origin = Provenance(str(tmp_path / "base"))
    export_full(model, processor, tmp_path / "full", origin)
    export_adapter(model, tmp_path / "adapter", origin)
    base: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected, start = model(input_ids=IDS).logits, base(input_ids=IDS).logits
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "full")(input_ids=IDS).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(input_ids=IDS).logits
    assert (expected - start).abs().max() > 0.1
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantization_leaves_routers_and_experts_and_says_so(kind: Any, tmp_path: Path) -> None:
    """Llama 4's router is a linear module that puts out scores and logits: quantized, it would be another one."""
    build("llama4").save_pretrained(tmp_path / "llama4")
    decision_log().clear()
    mm, _ = prepare_model(Backbone(str(tmp_path / "llama4"), quantization=kind), LoRAOnMiddle(layers="all"))
    assert mm.model(input_ids=IDS).logits.isfinite().all()
    experts = sum(
        mm.model.get_parameter(f"{name.rpartition('.')[0]}.base_layer.base_layer.gate_up_proj").numel()
        for name in mm.layout.stacks
        if name.endswith("down_proj")
    )
    assert experts == EXPERTS * 32 * 32
    assert all(mm.model.get_submodule(name.rpartition(".")[0]).weight.is_floating_point() for name in mm.layout.routers)
    up = mm.model.get_submodule(f"{mm.layout.layers[1]}.feed_forward.shared_expert.up_proj")
    assert not up.base_layer.weight.is_floating_point()
    assert any("experts are not quantized" in str(each) for each in decision_log())
