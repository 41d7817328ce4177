"""Policies on tiny models of five families: what is named trains, nothing else, and the loss is transformers' own."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import (
    EarlyLayers,
    Full,
    IntermediateOnly,
    LateLayers,
    LoRA,
    LoRAOnMiddle,
    PerRegion,
    RandomLayers,
    TuningPolicy,
    UniformSparse,
)
from lightning_mm.tuning.apply import apply_plan
from lightning_mm.tuning.census import take_census
from lightning_mm.tuning.optimizer import OptimizerSettings
from tests.helpers.data import FAMILIES, Data, Family, batch_of
from tests.helpers.training import POLICIES, configured, train


def labels_of(batch: Batch) -> Tensor:
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    labels.view(-1)[batch.supervised + 1] = batch.targets
    return labels


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_is_that_of_transformers(name: str, family: Family, data: Data) -> None:
    """1e-5: the same fp32 arithmetic, with the head's matrix product over fewer rows."""
    model = load_model(Backbone(path=str(family(name))))
    batch = batch_of(family(name), data)
    layout = ModelLayout.of(model)
    ours = supervised_nll(model, model.get_submodule(layout.head), batch)
    theirs = model(**batch.inputs, labels=labels_of(batch)).loss
    torch.testing.assert_close(ours.nll / ours.num_tokens, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_steps_move_what_is_named_and_nothing_else(
    name: str, policy: str, family: Family, data: Data, tmp_path: Path
) -> None:
    before: dict[str, Tensor] = {}

    def remember(module: MMModule) -> None:
        before.update({n: p.detach().clone() for n, p in module.named_parameters()})

    settings = OptimizerSettings(lr=1e-2, weight_decay=0.1)
    module, trainer = train(
        family(name), data, tmp_path, tuning=POLICIES[policy], optimizer=settings, max_steps=20, on_start=remember
    )
    trained = set(module.trainable)
    for parameter_name, parameter in module.named_parameters():
        moved = not torch.equal(parameter, before[parameter_name])
        assert moved == (parameter_name in trained), parameter_name
        assert parameter_name in trained or parameter.grad is None, parameter_name
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.trainable.values()}
    assert set(map(id, trainer.optimizers[0].state)) == held


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "vision too"])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_below_the_boundary_is_saved_for_backward(name: str, policy: str, family: Family, data: Data) -> None:
    module = configured(family(name), POLICIES[policy])
    saved = saved_by_block(module, batch_of(family(name), data))
    built_in = name == "qwen2_5_vl" and module.plan.modes[Region.CONNECTOR] == "full"  # its connector is in the tower
    assert (saved.pop("vision") == 0) != built_in
    assert [block for block, count in saved.items() if count] == list(
        module.mm.layout.layers[module.plan.lowest_layer :]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_keeps_the_boundary_and_the_gradients(name: str, family: Family, data: Data) -> None:
    batch = batch_of(family(name), data)
    plain = configured(family(name), IntermediateOnly(layers="1-2"))
    recomputed = configured(family(name), IntermediateOnly(layers="1-2"), activation_checkpointing=True)
    saved, fewer = saved_by_block(plain, batch), saved_by_block(recomputed, batch)
    assert fewer["vision"] == fewer[plain.mm.layout.layers[0]] == 0
    assert sum(fewer.values()) < sum(saved.values())
    for module in (plain, recomputed):
        module.eval()  # dropout would draw other numbers in the two runs
        module.objective(batch).nll.backward()
    for name_, parameter in plain.trainable.items():
        # The same operations in the same order: recomputation must not change a bit.
        assert torch.equal(parameter.grad, recomputed.trainable[name_].grad), name_  # type: ignore[arg-type]


def saved_by_block(module: MMModule, batch: Batch) -> dict[str, int]:
    """How many tensors autograd saves while each decoder block, and the vision tower, runs."""
    counts = dict.fromkeys(("vision", *module.mm.layout.layers), 0)
    running: list[str] = []
    handles = []

    def watch(key: str, part: nn.Module) -> None:
        handles.append(part.register_forward_pre_hook(lambda *_: running.append(key)))
        handles.append(part.register_forward_hook(lambda *_: running.pop() and None))

    def pack(tensor: Tensor) -> Tensor:
        for key in running[-1:]:
            counts[key] += 1
        return tensor

    watch("vision", module.model.get_encoder(modality="image"))
    for block in module.mm.layout.layers:
        watch(block, module.model.get_submodule(block))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module.objective(batch)
    for handle in handles:
        handle.remove()
    return counts


def test_input_gradient_hooks_are_taken_off(family: Family, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PEFT and transformers set for their own checkpointing puts the frozen prefix into the graph."""
    from lightning_mm.tuning import apply as loading_room

    def hooked(backbone: Backbone) -> nn.Module:
        model = load_model(backbone)
        model.enable_input_require_grads()
        return model

    monkeypatch.setattr(loading_room, "load_model", hooked)
    module = configured(family("llava"), IntermediateOnly(layers="2"))
    saved = saved_by_block(module, batch_of(family("llava"), data))
    assert saved["vision"] == saved[module.mm.layout.layers[0]] == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_modes_follow_what_trains(name: str, family: Family) -> None:
    module = configured(family(name), IntermediateOnly(layers="1-2"))
    training = [module.model.get_submodule(block).training for block in module.mm.layout.layers]
    assert training == [False, True, True, False]
    assert not module.model.get_encoder(modality="image").training


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_and_rates(name: str, family: Family) -> None:
    policy = PerRegion(layers="1", layers_mode="full", parts=["mlp"], connector="full", lr={"connector": 1e-3})
    module = configured(family(name), policy)
    places = [module.mm.layout.location_of(n.removeprefix("model.")) for n in module.trainable]
    assert {p.part for p in places if p.region is Region.LAYERS} == {"mlp"}
    rates = {row.region.split()[0]: row.lr for row in module.census.rows if row.trainable}
    assert rates == {"connector": 1e-3, "layers": module.optimizer.lr}


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (IntermediateOnly(layers="9"), "0 to 3"),
        (PerRegion(), "trains nothing"),
        (PerRegion(layers="1", layers_mode="lora", parts=["norm"]), "matches nothing"),
        (Full(lr={"conector": 1.0}), "no region is called"),
    ],
)
def test_selectors_that_match_nothing_stop(policy: TuningPolicy, said: str, family: Family) -> None:
    with pytest.raises(UserError, match=said):
        configured(family("llava"), policy)


def test_a_tied_head_cannot_train_alone(family: Family) -> None:
    with pytest.raises(UserError, match="tied"):
        configured(family("gemma3"), PerRegion(head="full"))


def test_a_stray_tensor_stops_the_census(family: Family) -> None:
    model = load_model(Backbone(path=str(family("llava"))))
    layout = ModelLayout.of(model)
    plan = IntermediateOnly(layers="1").plan(layout)
    apply_plan(MultimodalModel(model, layout), plan)
    model.get_submodule(layout.layers[3]).mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"Stray: \['model.language_model.layers.3.mlp.up_proj.weight'\]"):
        take_census(MultimodalModel(model, layout), plan)


def test_lora_ranks_per_layer_keep_the_scale(family: Family) -> None:
    lora = LoRA(r=4, alpha=8, rank_per_layer={"2": 8})
    module = configured(family("qwen2_5_vl"), LoRAOnMiddle(layers="1-2", lora=lora))
    for index, rank in ((1, 4), (2, 8)):
        projection = module.model.get_submodule(module.mm.layout.layers[index]).self_attn.q_proj
        assert projection.lora_A["default"].weight.shape[0] == rank
        assert projection.scaling["default"] == 2.0


@pytest.mark.parametrize("option", ["rslora", "dora"])
def test_lora_variants_start_at_the_base_model(option: str, family: Family, data: Data) -> None:
    """1e-5: DoRA divides and multiplies by the same column norms."""
    base = load_model(Backbone(path=str(family("llava"))))
    batch = batch_of(family("llava"), data)
    module = configured(family("llava"), LoRAOnMiddle(layers="1-2", lora=LoRA(r=4, **{option: True})))
    module.eval()
    torch.testing.assert_close(module.model(**batch.inputs).logits, base(**batch.inputs).logits, atol=1e-5, rtol=1e-5)


def test_lora_stays_out_of_the_vision_tower(family: Family) -> None:
    """PEFT's layers_to_transform would adapt blocks 1 and 2 of the tower as well."""
    module = configured(family("llava"), LoRAOnMiddle(layers="1-2"))
    assert all(".language_model.layers." in name for name in module.trainable)


def test_policies_have_equal_budget(family: Family) -> None:
    layout = ModelLayout.of(load_model(Backbone(path=str(family("llava")))))
    controls = [EarlyLayers, LateLayers, UniformSparse, RandomLayers]
    counts = {len(policy(budget="1-2").plan(layout).layers) for policy in controls}
    assert counts == {len(IntermediateOnly(layers="1-2").plan(layout).layers)}


def test_a_policy_is_a_value() -> None:
    assert copy.deepcopy(IntermediateOnly(layers="6-16")) == IntermediateOnly(layers="6-16")
    described = IntermediateOnly(layers="6-16", connector="full").describe()
    assert described == "IntermediateOnly(connector='full', layers='6-16')"
