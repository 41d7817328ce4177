"""Load a model and put it under a tuning policy: adapters in, gradients on for what trains, train and eval modes set.

Data flow: ``Backbone`` + ``TuningPolicy`` -> layout -> ``TuningPlan`` -> the loaded model, frozen and adapted in place;
``census`` then verifies it from the outside.
"""

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.models.handle import MultimodalModel, unwrap_model
from lightning_mm.models.hooks import remove_input_gradient_hooks
from lightning_mm.models.layout import ModelLayout, Region, plain_name
from lightning_mm.models.loading import Backbone, load_model, load_skeleton
from lightning_mm.models.lora import adapted_modules, add_lora
from lightning_mm.tuning.layers import resolve_layers
from lightning_mm.tuning.part_sizes import log_reach, num_weights
from lightning_mm.tuning.policy import TuningPlan, TuningPolicy


def prepare_model(
    backbone: Backbone, policy: TuningPolicy, loaded: nn.Module | None = None
) -> tuple[MultimodalModel, TuningPlan]:
    """A loaded model under a policy, and the plan that it follows.

    Args:
        backbone: What to load.
        policy: Which weights train.
        loaded: The model, if the user has loaded it; it is frozen and adapted in place. None (default): load it.

    Raises:
        UserError: The model cannot be loaded, or the policy does not fit it.
    """
    if backbone.quantization == "none":
        mm = MultimodalModel.of(load_model(backbone) if loaded is None else loaded, source=backbone.path)
        plan = policy.plan(mm.layout)
    else:
        # Quantization must leave out what trains at full rank, so that the plan is made before the weights are loaded.
        layout = ModelLayout.of(load_skeleton(backbone))
        plan = policy.plan(layout)
        # A router may be a linear module that does more than a product (Llama 4's).
        keep = {name.rpartition(".")[0] for name in plan.full | layout.routers} & layout.linears | {layout.head}
        mm = MultimodalModel(load_model(backbone, keep_full=keep), layout, source=backbone.path)
        _log_unquantized(mm, backbone)
    apply_plan(mm, plan)
    log_reach(mm, plan)
    if removed := remove_input_gradient_hooks(mm.model):
        log_decision("input-gradient hooks", f"{removed} removed", "they would put the frozen prefix into the graph")
    return mm, plan


def _log_unquantized(mm: MultimodalModel, backbone: Backbone) -> None:
    """Say what share of the weights is in experts, which are quantized in linear modules only."""
    if mm.layout.stacks:
        sizes = {name: num_weights(parameter) for name, parameter in mm.model.named_parameters()}
        share = sum(sizes[name] for name in mm.layout.stacks) / sum(sizes.values())
        why = f"{share:.1%} of all weights are in 3-D parameters; {backbone.quantization} is applied to linear modules"
        log_decision("model.backbone.quantization", "experts are not quantized", why)


def apply_policy(model: nn.Module, policy: TuningPolicy) -> TuningPlan:
    """The plan of a policy, after it was applied to a loaded model in place: for training loops that are not ours.

    Adapters are added, ``requires_grad`` is on for what the policy trains and off for all else, and what is frozen is
    in eval mode; ``model.train()`` would undo the modes, which matters only where a frozen part has dropout. A later
    call with another policy sets all of that anew.

    Args:
        model: A multimodal LLM of transformers, as ``from_pretrained`` returns it.
        policy: Which weights train, such as ``IntermediateOnly(layers="25%-50%")``.

    Raises:
        UserError: The policy does not fit the model, or the model has adapters already.

    Example::

        model = AutoModelForImageTextToText.from_pretrained("org/name")
        plan = apply_policy(model, LoRAOnMiddle(layers="25%-50%"))
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    """
    if not isinstance(policy, TuningPolicy):
        written = policy.__name__ if isinstance(policy, type) else repr(policy)
        raise UserError(
            f"{written} is no tuning policy.", "A policy is an object.", "Give one, such as lightning_mm.Full()."
        )
    inner = unwrap_model(model) if isinstance(model, nn.Module) else model
    if isinstance(inner, nn.Module) and adapted_modules(inner):
        raise UserError(
            f"This {type(inner).__name__} has adapters already.",
            "A policy decides which modules have adapters, and names what trains by the names without them.",
            "Load the model anew, or merge its adapters.",
        )
    mm = MultimodalModel.of(inner)
    plan = policy.plan(mm.layout)
    if packed := sorted(n for n in plan.full if not mm.model.get_parameter(n).is_floating_point()):
        raise UserError(
            f"{policy.describe()} would train quantized weights.",
            f"{len(packed)} tensors are not of floating point, such as {packed[0]}.",
            "Train them with LoRA, or leave them out of quantization (llm_int8_skip_modules).",
        )
    apply_plan(mm, plan)
    log_reach(mm, plan)
    return plan


def apply_plan(mm: MultimodalModel, plan: TuningPlan) -> None:
    """Add adapters and set ``requires_grad`` and modes, in place; raises UserError where an adapter does not fit."""
    if plan.lora is not None:
        add_lora(mm.model, plan.adapted, plan.lora, _lora_ranks(mm.layout, plan), plan.adapted_stacks)
    set_requires_grad(mm, plan)


def set_requires_grad(mm: MultimodalModel, plan: TuningPlan) -> None:
    """Gradients on for what the plan trains and off for all else, and modes to match, in place."""
    for name, parameter in mm.model.named_parameters():
        parameter.requires_grad_(is_trainable(name, plan))
    _set_modes(mm, plan)


def is_trainable(name: str, plan: TuningPlan) -> bool:
    """Whether the plan trains a parameter, named as in the adapted model."""
    if ".lora_" in name:
        module = plain_name(name.partition(".lora_")[0])
        return module in plan.adapted or module in plan.modules_of_stacks
    return plain_name(name) in plan.full


def drop_parameters(plan: TuningPlan, unused: Collection[str]) -> TuningPlan:
    """The plan without some parameters, named as in the adapted model."""
    # Of the tower and the connector, which hold no stacks.
    modules = {name.partition(".lora_")[0] for name in unused if ".lora_" in name}
    return replace(plan, full=plan.full - set(unused), adapted=plan.adapted - modules)


def _set_modes(mm: MultimodalModel, plan: TuningPlan) -> None:
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
    adapted = [mm.model.get_submodule(name) for name in (*plan.adapted, *plan.modules_of_stacks)]
    for part in (*blocks, *adapted):
        if any(p.requires_grad for p in part.parameters()):
            part.train()


def _lora_ranks(layout: ModelLayout, plan: TuningPlan) -> dict[str, int]:
    """Rank of each adapted module or stack whose layer has a rank of its own."""
    assert plan.lora is not None
    ranks: dict[str, int] = {}
    for spec, rank in plan.lora.rank_per_layer.items():
        layers = resolve_layers(spec, layout.num_layers)
        for weight in plan.adapted_weights:
            location = layout.locations[weight]
            if location.region is Region.LAYERS and location.layer in layers:
                ranks[weight if weight in plan.adapted_stacks else weight.removesuffix(".weight")] = rank
    return ranks
