"""Weights of decoder blocks by part, and what share of them a policy's adapters reach.

Data flow: model under its plan -> number of weights by part -> census and the lines that a run prints at its start.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.models.block_parts import BlockPart
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout, plain_name
from lightning_mm.tuning.layers import describe_layers
from lightning_mm.tuning.policy import TuningPlan


def weights_by_part(layout: ModelLayout, parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """Number of weights in each part of the decoder blocks, adapters and other regions left out.

    Args:
        layout: Of the plain model.
        parameters: Parameters by their names in the model, with or without adapters.
    """
    counts = Counter[str]()
    for name, parameter in parameters:
        if (part := layout.location_of(name).part) is not None and ".lora_" not in name:
            counts[part.value] += num_weights(parameter)
    return dict(counts)


def describe_parts(counts: Mapping[str, int]) -> str:
    """Parts and their shares, the largest first.

    Example:
        >>> describe_parts({"attention": 30, "experts": 969, "router": 1})
        'experts 96.9%, attention 3.0%, router 0.1%'
    """
    total, ordered = sum(counts.values()), sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {count / total:.1%}" for part, count in ordered)


def adapter_reach(mm: MultimodalModel, plan: TuningPlan) -> float | None:
    """Share of the weights of the layers in the range that have an adapter; None if none has."""
    counts, adapted = Counter[bool](), plan.adapted_weights
    for name, parameter in mm.model.named_parameters():
        if ".lora_" not in name and mm.layout.location_of(name).layer in plan.layers:
            counts[plain_name(name) in adapted] += num_weights(parameter)
    return counts[True] / counts.total() if counts[True] else None


def log_reach(mm: MultimodalModel, plan: TuningPlan) -> None:
    """Say what share of the range's weights the adapters reach, and that routers are frozen."""
    inside = {name: place.part for name, place in mm.layout.locations.items() if place.layer in plan.layers}
    routers = mm.layout.routers & inside.keys()
    if routers and not routers & (plan.full | plan.adapted_weights):
        why = "a router that trains without a balancing loss may send all tokens to few experts; parts can name it"
        log_decision("model.tuning.parts", f"{len(routers)} tensors of routers stay frozen", why)
    if (reach := adapter_reach(mm, plan)) is not None:
        reached = {part for name, part in inside.items() if name in plan.adapted_weights}
        missed = sorted({str(part) for part in inside.values() if part} - reached - {BlockPart.NORM})
        log_decision(
            "model.tuning.lora",
            f"adapters reach {reach:.1%} of the weights of layers {describe_layers(plan.layers)}",
            f"none in {', '.join(missed)}" if missed else "of all parts but norms",
        )


def num_weights(parameter: nn.Parameter) -> int:
    """Number of weights; bitsandbytes packs two 4-bit weights in a byte and keeps their shape."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
