"""Make a model obey a plan: adapters in, gradients on for what was named and off for all else, modes set.

Data flow: model + anatomy + plan -> the same model, changed in place; ``census`` then verifies it from the outside.
"""

from torch import nn

from lightning_mm.models.adapters import add_lora
from lightning_mm.models.anatomy import Anatomy, Region
from lightning_mm.tuning.layers import resolve_layers
from lightning_mm.tuning.policy import TuningPlan


def apply_plan(model: nn.Module, anatomy: Anatomy, plan: TuningPlan) -> None:
    """Freeze, unfreeze and adapt, in place. Raises UserError where an adapter cannot stand where it was planned."""
    if plan.lora is not None:
        add_lora(model, plan.adapted, plan.lora, _ranks(anatomy, plan))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name, anatomy, plan))
    set_modes(model, anatomy, plan)


def trains(name: str, anatomy: Anatomy, plan: TuningPlan) -> bool:
    """Whether a parameter, named as in the adapted model, is planned to move."""
    if ".lora_" in name:
        return name.partition(".lora_")[0] in plan.adapted
    return name.replace(".base_layer.", ".") in plan.full


def set_modes(model: nn.Module, anatomy: Anatomy, plan: TuningPlan) -> None:
    """Train mode for what trains, eval mode for what is frozen.

    A decoder or vision block counts as one piece: if any of it trains, its dropout is on. Elsewhere a module is in
    train mode if all of its parameters train.
    """
    model.eval()
    blocks = [model.get_submodule(name) for name in (*anatomy.layers, *anatomy.vision_blocks)]
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and all(p.requires_grad for p in parameters):
            module.train()
    # An adapter's dropout has no weights of its own, and its module holds frozen ones.
    adapted = [model.get_submodule(name) for name in plan.adapted]
    for part in (*blocks, *adapted):
        if any(p.requires_grad for p in part.parameters()):
            part.train()


def _ranks(anatomy: Anatomy, plan: TuningPlan) -> dict[str, int]:
    """Rank of each adapted module that does not have the common one."""
    assert plan.lora is not None
    ranks: dict[str, int] = {}
    for spec, rank in plan.lora.rank_per_layer.items():
        layers = resolve_layers(spec, anatomy.num_layers)
        for module in plan.adapted:
            place = anatomy.places[f"{module}.weight"]
            if place.region is Region.LAYERS and place.layer in layers:
                ranks[module] = rank
    return ranks
