"""Frozen weights in the type they are used in: under bf16-mixed, autocast makes a bfloat16 copy of them at every use.

Data flow: model under its plan + the trainer's precision -> the same model, whose frozen linear weights are bfloat16.

Autocast keeps the copy of a weight that trains until the step ends, and copies a frozen one anew each time. Held in
bfloat16 there is nothing to copy, and every product is the same to the bit. What no matrix product reads (embeddings,
norms, tables) is not cast by autocast and stays as it is; a frozen head that is tied to the embedding keeps its copy.

Shapes: D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import replace_forward
from lightning_mm.tuning.policy import TuningPlan

FrozenType = Literal["auto", "float32", "bfloat16"]


def cast_frozen_weights(
    mm: MultimodalModel, plan: TuningPlan, precision: str, undo: ExitStack, wanted: FrozenType = "auto"
) -> int:
    """Hold frozen linear weights in bfloat16 where autocast would make them so; in place.

    Call it after the fingerprint was taken: that is of the weights as they were loaded.

    Args:
        mm: Under the plan; on any device.
        plan: What trains.
        precision: ``trainer.precision``.
        undo: Takes what puts the head's forward back; the weights stay as they were cast.
        wanted: 'auto' is bfloat16 under bf16-mixed; float32 leaves everything as it was loaded.

    Returns:
        Bytes saved, the copy of a tied head taken off.

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
        log_decision("model.compute.frozen_dtype", "float32", "asked for; autocast copies frozen weights at every use")
        return 0
    held = castable(mm.model, plan)
    saved = sum(parameter.nbytes // 2 for parameter in held)
    for parameter in held:
        parameter.data = parameter.data.to(torch.bfloat16)
    head: Any = mm.head
    tied = type(head) is nn.Linear and head.weight.dtype == torch.float32
    if tied and not head.weight.requires_grad:
        saved -= head.weight.nbytes // 2
        replace_forward(undo, head, lambda _: _copied_once(head))
    if saved:
        why = f"{saved / 2**20:.0f} MiB less; autocast would copy {len(held)} frozen tensors so at every use"
        log_decision("model.compute.frozen_dtype", "bfloat16", why)
    return saved


def _copied_once(head: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The forward pass of a head whose weight must stay float32: its copy for autocast is made once."""
    made: tuple[object, Tensor] | None = None

    def forward(hidden: Tensor) -> Tensor:  # (..., D) -> (..., V)
        nonlocal made
        kind, weight = hidden.device.type, head.weight
        if not (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16):
            return F.linear(hidden, weight, head.bias)
        state = (weight.device, weight.data_ptr(), weight._version)
        if made is None or made[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # else no backward pass could use it
                made = state, weight.to(torch.bfloat16)
        return F.linear(hidden, made[1], head.bias)

    return forward


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
