"""Make a model obey a plan: adapters in, gradients on for what was named and off for all else, modes set.

Data flow: model + layout + plan -> the same model, changed in place; ``census`` then verifies it from the outside.

A backbone and a policy made into a model that obeys the policy.

Data flow: ``Backbone`` + ``TuningPolicy`` -> skeleton or model -> layout -> plan -> the loaded, frozen, adapted model.

Find planned tensors that the model never reads, by asking autograd once.

Data flow: one real sample -> loss -> which planned tensors of tower and connector got no gradient -> a smaller plan.
LLaVA reads its tower below the top; what is above would sit in the optimizer, and hold up DDP, for nothing.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from lightning_mm.core.decisions import decide
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import remove_input_gradient_hooks
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.models.loading import Backbone, load_model, load_skeleton
from lightning_mm.models.lora import add_lora
from lightning_mm.tuning.layers import resolve_layers
from lightning_mm.tuning.policy import TuningPlan, TuningPolicy


def apply_plan(mm: MultimodalModel, plan: TuningPlan) -> None:
    """Freeze, unfreeze and adapt, in place. Raises UserError where an adapter cannot stand where it was planned."""
    if plan.lora is not None:
        add_lora(mm.model, plan.adapted, plan.lora, _ranks(mm.layout, plan))
    for name, parameter in mm.model.named_parameters():
        parameter.requires_grad_(trains(name, mm.layout, plan))
    set_modes(mm, plan)


def trains(name: str, layout: ModelLayout, plan: TuningPlan) -> bool:
    """Whether a parameter, named as in the adapted model, is planned to move."""
    if ".lora_" in name:
        return name.partition(".lora_")[0] in plan.adapted
    return name.replace(".base_layer.", ".") in plan.full


def set_modes(mm: MultimodalModel, plan: TuningPlan) -> None:
    """Train mode for what trains, eval mode for what is frozen.

    A decoder or vision block counts as one piece: if any of it trains, its dropout is on. Elsewhere a module is in
    train mode if all of its parameters train.
    """
    mm.model.eval()
    blocks = [mm.model.get_submodule(name) for name in (*mm.layout.layers, *mm.layout.vision_blocks)]
    for module in mm.model.modules():
        parameters = list(module.parameters())
        if parameters and all(p.requires_grad for p in parameters):
            module.train()
    # An adapter's dropout has no weights of its own, and its module holds frozen ones.
    adapted = [mm.model.get_submodule(name) for name in plan.adapted]
    for part in (*blocks, *adapted):
        if any(p.requires_grad for p in part.parameters()):
            part.train()


def _ranks(layout: ModelLayout, plan: TuningPlan) -> dict[str, int]:
    """Rank of each adapted module that does not have the common one."""
    assert plan.lora is not None
    ranks: dict[str, int] = {}
    for spec, rank in plan.lora.rank_per_layer.items():
        layers = resolve_layers(spec, layout.num_layers)
        for module in plan.adapted:
            place = layout.locations[f"{module}.weight"]
            if place.region is Region.LAYERS and place.layer in layers:
                ranks[module] = rank
    return ranks


def prepare(backbone: Backbone, tuning: TuningPolicy) -> tuple[MultimodalModel, TuningPlan]:
    """Load a model and put it under a policy.

    Raises:
        UserError: The model cannot be loaded, or the policy does not fit it.
    """
    mm, plan = _planned(backbone, tuning)
    apply_plan(mm, plan)
    if removed := remove_input_gradient_hooks(mm.model):
        decide("input-gradient hooks", f"{removed} removed", "they would put the frozen prefix into the graph")
    return mm, plan


def _planned(backbone: Backbone, tuning: TuningPolicy) -> tuple[MultimodalModel, TuningPlan]:
    """What trains at full rank must be known before quantization takes it: then the plan is made on the skeleton."""
    if backbone.quantization == "none":
        mm = MultimodalModel.of(load_model(backbone), source=backbone.path)
        return mm, tuning.plan(mm.layout)
    layout = ModelLayout.of(load_skeleton(backbone))
    plan = tuning.plan(layout)
    keep = {name.rpartition(".")[0] for name in plan.full} & layout.linears | {layout.head}
    return MultimodalModel(load_model(backbone, keep_full=keep), layout, source=backbone.path), plan


def unread_tensors(mm: MultimodalModel, loss: Callable[[], Tensor]) -> tuple[str, ...]:
    """Trainable tensors of vision tower and connector that ``loss`` does not depend on.

    Args:
        mm: After ``apply_plan``.
        loss: Computes the training loss () of a sample with a picture.
    """
    regions = (Region.VISION, Region.CONNECTOR)
    asked = {
        n: p for n, p in mm.model.named_parameters() if p.requires_grad and mm.layout.location_of(n).region in regions
    }
    if not asked:
        return ()
    with torch.random.fork_rng():
        gradients = torch.autograd.grad(loss(), list(asked.values()), allow_unused=True)
    return tuple(name for name, gradient in zip(asked, gradients, strict=True) if gradient is None)


def without(plan: TuningPlan, unread: Collection[str]) -> TuningPlan:
    """The plan less some tensors, named as in the adapted model."""
    modules = {name.partition(".lora_")[0] for name in unread if ".lora_" in name}
    return replace(plan, full=plan.full - set(unread), adapted=plan.adapted - modules)
