"""The floor against torch's own counter: every policy on every family, a step that was really computed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoConfig, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.execution.prepare import Compute
from lightning_mm.execution.vision_truncation import truncate_tower
from lightning_mm.models.attention import cpu_kernels
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.models.loading import Backbone
from lightning_mm.planning.cost_estimate import executed_flops
from lightning_mm.planning.flops import StepCost, step_flops
from lightning_mm.planning.meta_modes import meta_weights, skeleton_of
from lightning_mm.planning.meta_trace import trace_step
from lightning_mm.planning.step_shape import StepShape
from lightning_mm.testing.tiny import FAMILIES
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import Full, IntermediateOnly, LoRA, LoRAOnMiddle, TuningPolicy
from lightning_mm.tuning.apply import apply_plan
from lightning_mm.tuning.unused_parameters import unused_parameters
from tests.helpers.data import Data, Family, batch_of
from tests.helpers.training import POLICIES

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def prepared(folder: Path, policy: TuningPolicy, batch: Batch, packing: bool = False, eager: bool = True) -> MMModule:
    """A module as ``fit`` prepares it: tensors that are never read stay frozen, the tower ends where it is read."""
    backbone = Backbone(path=str(folder), attention="eager" if eager else "sdpa")
    module = MMModule(backbone, policy, compute=Compute(packing=packing))
    module.unread = ()
    module.configure_model()
    module.unread = unused_parameters(module.mm, lambda: module.objective(batch).nll)
    module._drop_unread()
    truncate_tower(module.mm, batch, ExitStack())
    return module


def counted(module: MMModule, batch: Batch) -> int:
    """FLOPs of a real step, with what the counter does not know: CPU attention, whose gradients cost twice as much."""

    def attend(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attend_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return 2 * sdpa_flop_count(query, key, value)

    more = {_CPU_ATTENTION: attend, _CPU_ATTENTION_BACKWARD: attend_backward}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        module.training_step(batch, 0).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "vipllava"])  # a LLaVA with a wider connector
def test_floor_is_what_a_step_computes_and_nothing_below_it_is_saved(
    name: str, policy: str, family: Family, data: Data
) -> None:
    """To the last operation; 1e-3, since Mllama also multiplies its masks, which no weight takes part in."""
    batch = batch_of(family(name), data)
    module = prepared(family(name), POLICIES[policy], batch)
    found = StepCost.of(module.mm, module.plan, batch).at(StepShape.of(batch, padded=True))
    with saving(module.model, frozen_below(module)) as saved:
        expected = counted(module, batch)
    assert found.floor == pytest.approx(expected, rel=1e-3 if name == "mllama" else 1e-9)
    assert not saved, f"kept by {sorted(set(saved))[:3]}"


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_without_padding_only_attention_sees_it(
    name: str, alone: bool, family: Family, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where gradients flow, not even that, if each row is attended to alone."""
    batch = batch_of(family(name), data)
    module = prepared(family(name), IntermediateOnly(layers="1-2"), batch, packing=True, eager=False)
    cost = StepCost.of(module.mm, module.plan, batch)
    real, padded = StepShape.of(batch), StepShape.of(batch, padded=True)
    assert real.tokens < padded.tokens
    if not alone:
        monkeypatch.setattr(cpu_kernels, "MIN_MEAN_ROW", 10**6)
    with saving(module.model, frozen_below(module)) as saved:
        expected = counted(module, batch)
    assert not saved
    assert executed_flops(cost, [batch], packed=True, on_cpu=True).floor == pytest.approx(expected, rel=1e-9)
    in_rows = cost.at(replace(padded, tokens=real.tokens)).floor
    assert executed_flops(cost, [batch], packed=True, on_cpu=False).floor == in_rows
    assert cost.at(real).floor < expected <= in_rows
    assert (expected < in_rows) == alone


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "idefics3"])
def test_one_batch_tells_the_cost_of_another(name: str, family: Family, data: Data) -> None:
    """Text does not grow with pictures of one size here, so two batches of other sizes are foretold exactly."""
    module = prepared(family(name), Full(vision="full"), first := batch_of(family(name), data, 2))
    cost = StepCost.of(module.mm, module.plan, first)
    for size in (1, 3):
        batch = batch_of(family(name), data, size)
        expected = cost.at(StepShape.of(batch, padded=True)).floor
        assert expected == pytest.approx(counted(module, batch), rel=1e-2)


def test_shapes_add(family: Family, data: Data) -> None:
    folder = family("llava")
    batch = batch_of(folder, data)
    module = prepared(folder, IntermediateOnly(layers="1-2"), batch)
    cost = StepCost.of(module.mm, module.plan, batch)
    one = StepShape.of(batch)
    assert cost.at(one + one).floor == pytest.approx(2 * cost.at(one).floor)
    assert one.pairs < StepShape.of(batch, padded=True).pairs


def test_parts_are_the_whole_and_the_prefix_is_forward_only(family: Family, data: Data) -> None:
    folder = family("llava")
    batch = batch_of(folder, data)
    module = prepared(folder, IntermediateOnly(layers="1-2"), batch)
    flops = step_flops(module.mm, module.plan, batch)
    parts = flops.parts(module.plan)
    assert sum(part.total for part in parts.values()) == pytest.approx(flops.floor)
    for name in ("vision", "connector", "layers below"):
        assert parts[name].input_gradients == parts[name].weight_gradients == 0 < parts[name].forward
    above, within, head = parts["layers above"], parts["layers in range"], parts["head"]
    assert above.weight_gradients == head.weight_gradients == 0
    assert head.input_gradients == pytest.approx(head.forward)
    # Attention's own two products have no weights: both of their operands need a gradient.
    assert above.forward < above.input_gradients < 2 * above.forward
    assert within.input_gradients + within.weight_gradients == pytest.approx(2 * within.forward)


def test_the_model_and_the_generator_are_left_as_they_are(family: Family, data: Data) -> None:
    folder = family("gemma3")
    batch = batch_of(folder, data)
    module = prepared(folder, LoRAOnMiddle(layers="1-2"), batch)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    generator, hooks = torch.get_rng_state(), sum(len(m._forward_hooks) for m in module.modules())
    StepCost.of(module.mm, module.plan, batch)
    assert torch.equal(generator, torch.get_rng_state())
    assert hooks == sum(len(m._forward_hooks) for m in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_alike_are_rehearsed_once_with_equal_findings(name: str, family: Family, data: Data) -> None:
    batch = batch_of(family(name), data)
    module = prepared(family(name), LoRAOnMiddle(layers="2", lora=LoRA(r=2)), batch)
    found = []
    for once in (True, False):
        skeleton = skeleton_of(module.model)
        with meta_weights():
            apply_plan(MultimodalModel(skeleton, module.mm.layout), module.plan)
        done = trace_step(skeleton, module.mm.layout, batch, equal_once=once)
        places = StepCost.of_trace(done).at(StepShape.of(batch)).by_part
        found.append((dict(places), sum(saved.size for saved in done.saved)))
    assert found[0][0].keys() == found[1][0].keys()
    for place, products in found[0][0].items():
        assert products.total == pytest.approx(found[1][0][place].total)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("lora", [LoRA(r=4, dora=True), LoRA(r=4, rslora=True, rank_per_layer={"2": 8})])
def test_adapters_of_any_kind(lora: LoRA, family: Family, data: Data) -> None:
    batch = batch_of(family("llava"), data)
    module = prepared(family("llava"), LoRAOnMiddle(layers="1-2", lora=lora), batch)
    cost = StepCost.of(module.mm, module.plan, batch)
    assert cost.at(StepShape.of(batch, padded=True)).floor == pytest.approx(counted(module, batch), rel=1e-9)


def test_mixtures_count_the_experts_that_a_token_is_sent_to(family: Family, data: Data) -> None:
    """What torch counts, and the grouped products that it does not see: two per expert, in closed form."""
    folder = family("qwen3_vl")
    text, batch = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, batch_of(folder, data)
    model = mixture(folder, text)
    layout = ModelLayout.of(model)
    plan = IntermediateOnly(layers="1-2").plan(layout)
    apply_plan(MultimodalModel(model, layout), plan)
    found = StepCost.of(MultimodalModel(model, layout), plan, batch).at(StepShape.of(batch, padded=True)).floor
    with FlopCounterMode(display=False) as counter:
        supervised_nll(model, model.get_submodule(layout.head), batch).nll.backward()
    width, tokens = model.config.get_text_config().hidden_size, batch.regions.numel()
    experts = 2 * tokens * 2 * (width * 2 * 32 + 32 * width)  # FLOPs of one layer's, forward
    # Forward in four layers; inputs' gradients in the three from layer 1 up, weights' in two.
    assert found == pytest.approx(counter.get_total_flops() + experts * (4 + 3 + 2), rel=1e-9)


def mixture(folder: Path, text: dict[str, int]) -> Any:
    """Qwen3-VL with experts, otherwise like the tiny one."""
    plain = AutoConfig.from_pretrained(folder).to_dict()
    parts = {
        name: {k: v for k, v in plain[name].items() if k != "model_type"} for name in ("text_config", "vision_config")
    }
    parts["text_config"] |= {**text, "decoder_sparse_step": 1, "mlp_only_layers": []}
    tokens = {name: plain[name] for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")}
    model: Any = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**parts, **tokens))
    model.set_attn_implementation("eager")
    return model


def frozen_below(module: MMModule) -> list[str]:
    """Blocks that nothing trainable comes before."""
    layout = module.mm.layout
    named = module.model.named_parameters()
    trains = {layout.location_of(name).region for name, parameter in named if parameter.requires_grad}
    below = list(layout.layers[: module.plan.lowest_layer])
    return below if Region.VISION in trains else [*layout.vision_blocks, *below]


@contextmanager
def saving(model: nn.Module, names: list[str]) -> Iterator[list[str]]:
    """The names of those modules during whose forward pass a tensor was saved for backward."""
    running: list[str] = []
    saved: list[str] = []

    def keep(tensor: Tensor) -> Tensor:
        if running:
            saved.append(running[-1])
        return tensor

    def enter(name: str) -> Any:
        return lambda *_: running.append(name)

    handles = []
    for name in names:
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(enter(name)))
        handles.append(block.register_forward_hook(lambda *_: running.pop() and None))
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield saved
    finally:
        for handle in handles:
            handle.remove()
