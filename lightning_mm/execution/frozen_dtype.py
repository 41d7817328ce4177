"""Frozen weights in the dtype they are used in: under bf16-mixed, autocast copies them to bfloat16 at every use.

Data flow: model under its plan + the trainer's precision -> the same model, whose frozen linear weights are bfloat16.

Autocast caches the copy of a trainable weight until the step ends, but copies a frozen weight at every use. If it is
stored in bfloat16 there is nothing to copy, and every product is the same to the bit. Weights that no matrix product
reads (embeddings, norms, tables) are not cast by autocast and keep their dtype; for a frozen head that is tied to the
embedding, the bfloat16 copy is cached. Frozen experts are cast, too: products of one expert at a time are the same to
the bit, grouped ones, which autocast leaves in float32, become bfloat16.

Shapes: D hidden size, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator
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

FrozenDtype = Literal["auto", "float32", "bfloat16"]


def cast_frozen_weights(
    mm: MultimodalModel, plan: TuningPlan, precision: str, undo: ExitStack, wanted: FrozenDtype = "auto"
) -> int:
    """Cast frozen linear weights to bfloat16 where autocast would do so at every use, in place.

    Call it after ``base_identity``, which is computed from the weights as loaded.

    Args:
        mm: The model, frozen and adapted as planned; on any device.
        plan: Which weights train.
        precision: ``trainer.precision``.
        undo: Gets the callback that restores the head's forward; the weights stay cast.
        wanted: 'auto' (default): bfloat16 under bf16-mixed; 'float32': no weight is cast.

    Returns:
        Bytes saved, less the cached copy of a tied head.

    Raises:
        UserError: ``wanted`` is 'bfloat16' without autocast, which would cast the inputs of those weights.
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
    held = castable_weights(mm.model, plan, mm.layout.stacks)
    saved = sum(parameter.nbytes // 2 for parameter in held)
    for parameter in held:
        parameter.data = parameter.data.to(torch.bfloat16)
    head: Any = mm.head
    tied = type(head) is nn.Linear and head.weight.dtype == torch.float32
    if tied and not head.weight.requires_grad:
        saved -= head.weight.nbytes // 2
        replace_forward(undo, head, lambda _: _linear_with_cached_copy(head))
    if held:
        why = f"{saved / 2**20:.0f} MiB less; autocast would copy {len(held)} frozen tensors so at every use"
        log_decision("model.compute.frozen_dtype", "bfloat16", why)
    if experts := sum(parameter.ndim == 3 for parameter in held):
        why = "autocast would leave their grouped products in float32; set float32 to keep them"
        log_decision("model.compute.frozen_dtype", f"bfloat16 products of {experts} stacks of experts", why)
    return saved


def _linear_with_cached_copy(head: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The forward pass of a linear head with float32 weight; the copy for autocast is cached."""
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


def castable_weights(model: nn.Module, plan: TuningPlan, stacks: Collection[str] = ()) -> list[nn.Parameter]:
    """Frozen float32 weights that only ``torch.nn.Linear`` or a mixture's experts read.

    Excluded: weights shared with an embedding, the tensor that a transformers model's ``dtype`` is read from (models
    cast pixels and masks to it), weights under DoRA adapters, which compute their norm outside of autocast, and experts
    under adapters, whose small changes are added to the weights themselves.

    Args:
        model: The model, frozen and adapted as planned.
        plan: Which weights train.
        stacks: Names of the 3-D parameters that hold experts, in the plain model; none by default.
    """
    weight_decomposed = plan.adapted if plan.lora is not None and plan.lora.dora else frozenset()
    excluded: set[int] = set()
    linear: dict[int, nn.Parameter] = {}
    experts = [model.get_parameter(name) for name in set(stacks) - plan.adapted_stacks]
    frozen_experts = {id(p) for p in experts if not p.requires_grad and p.dtype == torch.float32}
    for name, module in model.named_modules():
        plain = type(module) is nn.Linear and name.removesuffix(".base_layer") not in weight_decomposed
        for parameter in module.parameters(recurse=False):
            frozen = plain and not parameter.requires_grad and parameter.dtype == torch.float32
            if frozen or id(parameter) in frozen_experts:
                linear[id(parameter)] = parameter
            else:
                excluded.add(id(parameter))
        if isinstance(getattr(type(module), "dtype", None), property):
            excluded.update(id(parameter) for parameter in islice(_floating_point_parameters(module), 1))
    return [parameter for key, parameter in linear.items() if key not in excluded]


def _floating_point_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in module.parameters() if parameter.is_floating_point())
