"""Every attention of the decoder through a function of ours: to see queries, keys and values, and to change them.

Data flow: the model's attention modules -> transformers' registry of attention functions -> ``AttentionCall`` -> the
given function -> back into the model. Masks arrive written out, whichever kernel the model runs.

Shapes: B rows, H query heads, G key heads (H a multiple of G), Q queries, K keys, E head size.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from lightning_mm.core.decisions import decide
from lightning_mm.core.errors import UserError
from lightning_mm.models.handle import MultimodalModel

_NAME = "lightning_mm"
_MASKED = ("eager", "sdpa")
"""Kernels that take a written-out mask; FlashAttention and FlexAttention have forms of their own."""
_ONLY_EAGER = ("softcap", "s_aux")
"""What sdpa does not know: capped scores, sinks."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What one attention module is about to compute.

    Args:
        layer: Index of its decoder block.
        module: The attention module.
        query: (B, H, Q, E), positions rotated in.
        key: (B, G, K, E).
        value: (B, G, K, E).
        mask: Additive, broadcasts to (B, H, Q, K): 0 or a very negative number; None where every query sees every key.
        kernel: The model's own choice: eager, sdpa, ...
        options: Its other arguments (scaling, soft-capping, sinks, ...).
    """

    layer: int
    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kernel: str
    options: dict[str, Any]

    def compute(self) -> tuple[Tensor, Tensor | None]:
        """As the model's own kernel does: output (B, Q, H, E), and weights (B, H, Q, K) where it gives them.

        Kernels that take no written-out mask are stood in for by one that does.
        """
        kernel = self.kernel
        if kernel not in _MASKED:
            kernel = "eager" if any(self.options.get(name) is not None for name in _ONLY_EAGER) else "sdpa"
            decide("causal.attention", kernel, f"{self.kernel} takes no written-out mask; this one computes the same")
        compute = _eager_of(self.module) if kernel == "eager" else AttentionInterface()[kernel]
        return compute(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def explicit(self) -> tuple[Tensor, Tensor]:
        """As the family's written-out attention does: output (B, Q, H, E) and weights (B, H, Q, K)."""
        compute = _eager_of(self.module)
        return compute(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def changed(self, **fields: Any) -> "AttentionCall":
        """The same call with other tensors."""
        return replace(self, **fields)


Attend = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]


@contextmanager
def attention_through(mm: MultimodalModel, attend: Attend, strict: bool = True) -> Iterator[None]:
    """While active, ``attend`` answers for every attention of the decoder; towers keep their own.

    Args:
        mm: The plain model; adapters and quantised weights may be in it.
        attend: Takes each call and returns what the attention function would: output (B, Q, H, E), weights or None.
        strict: Refuse where a layer mixes tokens otherwise; else such a layer keeps its own way, and is never asked.

    Raises:
        UserError: A layer does not use transformers' attention registry (``strict``).
    """
    mixers: dict[int, Any] = {b.index: mm.model.get_submodule(b.attention) for b in mm.layout.blocks if b.attention}
    own = [layer for layer, module in mixers.items() if not exchangeable(module)]
    if own and strict:
        raise _cannot(own[0], mixers[own[0]])
    modules = [module for layer, module in mixers.items() if layer not in own]
    layers = {id(module): layer for layer, module in mixers.items() if layer not in own}
    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    kernels = {key: config._attn_implementation for key, config in configs.items()}

    def through(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        kernel = kernels[id(module.config)]
        call = AttentionCall(layers.get(id(module), -1), module, query, key, value, mask, kernel, options)
        return attend(call) if id(module) in layers else call.compute()

    AttentionInterface.register(_NAME, through)
    AttentionMaskInterface.register(_NAME, eager_mask)
    try:
        for config in configs.values():
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = kernels[key]
        AttentionInterface._global_mapping.pop(_NAME)
        AttentionMaskInterface._global_mapping.pop(_NAME)


def repeated(heads: Tensor, like: Tensor) -> Tensor:
    """(B, H, K, E) keys or values, those that several query heads share written out for each.

    Args:
        heads: (B, G, K, E).
        like: The query (B, H, Q, E).
    """
    return heads.repeat_interleave(like.shape[1] // heads.shape[1], 1)


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The family's own written-out attention: it knows of soft-capping and sinks."""
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    assert callable(found), "refused before"
    return found


def exchangeable(module: nn.Module) -> bool:
    """Whether it looks its attention function up in transformers' registry."""
    return hasattr(sys.modules[type(module).__module__], "eager_attention_forward") and hasattr(module, "config")


def _cannot(layer: int, module: nn.Module) -> UserError:
    return UserError(
        f"The attention of layer {layer} ({type(module).__name__}) cannot be changed.",
        "It mixes tokens in a way of its own, not through transformers' registry of attention functions.",
        "Leave knockout out, or choose a model with ordinary attention in every layer.",
    )
