"""Frozen weights in the type they are used in: under bf16-mixed, autocast makes a bfloat16 copy of them at every use.

Data flow: model under its plan + the trainer's precision -> the same model, whose frozen linear weights are bfloat16.

Autocast keeps the copy of a weight that trains until the step ends, and copies a frozen one anew each time. Held in
bfloat16 there is nothing to copy, and every product is the same to the bit. What no matrix product reads (embeddings,
norms, tables, weights tied to any of them) is not cast by autocast, so it stays as it is.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Literal

import torch
from torch import nn

from lightning_mm.decisions import decide
from lightning_mm.errors import UserError
from lightning_mm.tuning.policy import TuningPlan

FrozenType = Literal["auto", "float32", "bfloat16"]


def hold_frozen(model: nn.Module, plan: TuningPlan, precision: str, wanted: FrozenType = "auto") -> int:
    """Hold frozen linear weights in bfloat16 where autocast would make them so; in place.

    Call it after the fingerprint was taken: that is of the weights as they were loaded.

    Args:
        model: Under the plan; on any device.
        plan: What trains.
        precision: ``trainer.precision``.
        wanted: 'auto' is bfloat16 under bf16-mixed; float32 leaves everything as it was loaded.

    Returns:
        Bytes saved.

    Raises:
        UserError: bfloat16 was asked for where nothing casts what enters those weights.
    """
    if precision != "bf16-mixed":
        if wanted == "bfloat16":
            raise UserError(
                f"model.compute.frozen_dtype: bfloat16 does not go with trainer.precision {precision}.",
                "Without autocast, float32 activations would meet bfloat16 weights.",
                "Set trainer.precision bf16-mixed, or model.backbone.dtype bfloat16 for all weights.",
            )
        return 0
    if wanted == "float32":
        decide("model.compute.frozen_dtype", "float32", "asked for; autocast copies frozen weights at every use")
        return 0
    held = castable(model, plan)
    saved = sum(parameter.nbytes // 2 for parameter in held)
    for parameter in held:
        parameter.data = parameter.data.to(torch.bfloat16)
    if held:
        why = f"{saved / 2**20:.0f} MiB less; autocast would copy {len(held)} frozen tensors so at every use"
        decide("model.compute.frozen_dtype", "bfloat16", why)
    return saved


def castable(model: nn.Module, plan: TuningPlan) -> list[nn.Parameter]:
    """Frozen float32 weights that nothing but ``torch.nn.Linear`` reads.

    Left out: weights that an embedding shares, the tensor that a transformers model takes for its ``dtype`` (models
    cast pictures and masks to it), and those under DoRA adapters, which measure them outside of autocast.
    """
    weight_decomposed = plan.adapted if plan.lora is not None and plan.lora.dora else frozenset()
    kept: set[int] = set()
    linear: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        plain = type(module) is nn.Linear and name.removesuffix(".base_layer") not in weight_decomposed
        for parameter in module.parameters(recurse=False):
            if plain and not parameter.requires_grad and parameter.dtype == torch.float32:
                linear[id(parameter)] = parameter
            else:
                kept.add(id(parameter))
        if isinstance(getattr(type(module), "dtype", None), property):
            kept.update(id(parameter) for parameter in islice(_floating(module), 1))
    return [parameter for key, parameter in linear.items() if key not in kept]


def _floating(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in module.parameters() if parameter.is_floating_point())
