"""Every attention of the decoder through a function of ours: to see queries, keys and values, and to change them.

Data flow: the model's attention modules -> transformers' registry of attention functions -> ``AttentionCall`` -> the
given function -> back into the model. Masks arrive written out, whichever kernel the model runs.

Shapes: B rows, H query heads, G key heads (H a multiple of G), Q queries, K keys, E head size.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.models.attention.dispatch import (
    AttentionFunction,
    Lookup,
    attention_modules,
    change_attention,
    eager_attention,
    has_eager_attention,
    write_out_masks,
)
from lightning_mm.models.handle import MultimodalModel

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
        lookup: Finds the model's own attention function for a kernel's name.
        options: Its other arguments (scaling, soft-capping, sinks, ...).
    """

    layer: int
    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kernel: str
    lookup: Lookup
    options: dict[str, Any]

    def compute(self) -> tuple[Tensor, Tensor | None]:
        """As the model's own kernel does: output (B, Q, H, E), and weights (B, H, Q, K) where it gives them.

        Kernels that take no written-out mask are stood in for by one that does.
        """
        kernel = self.kernel
        if kernel not in _MASKED:
            kernel = "eager" if any(self.options.get(name) is not None for name in _ONLY_EAGER) else "sdpa"
            log_decision(
                "causal.attention", kernel, f"{self.kernel} takes no written-out mask; this one computes the same"
            )
        return self.lookup(kernel, _eager_of(self.module))(
            self.module, self.query, self.key, self.value, self.mask, **self.options
        )

    def explicit(self) -> tuple[Tensor, Tensor]:
        """As the family's written-out attention does: output (B, Q, H, E) and weights (B, H, Q, K)."""
        return _eager_of(self.module)(self.module, self.query, self.key, self.value, self.mask, **self.options)

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
    other = [layer for layer, module in mixers.items() if not has_eager_attention(module)]
    if other and strict:
        raise _cannot(other[0], mixers[other[0]])
    layers = {id(module): layer for layer, module in mixers.items() if layer not in other}
    configs: dict[int, Any] = {id(mixers[layer].config): mixers[layer].config for layer in layers.values()}
    # Modules of towers that share the decoder's config get a written-out mask, too.
    modules = [m for m in attention_modules(mm.model) if id(getattr(m, "config", None)) in configs]
    kernels = {key: config._attn_implementation for key, config in configs.items()}

    def change(_: str, __: AttentionFunction, below: Lookup) -> AttentionFunction:
        def through(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any
        ) -> tuple[Tensor, Tensor | None]:
            kernel = kernels[id(module.config)]
            call = AttentionCall(layers.get(id(module), -1), module, query, key, value, mask, kernel, below, options)
            return attend(call) if id(module) in layers else call.compute()

        return through

    with ExitStack() as undo:
        change_attention(undo, modules, change)
        write_out_masks(undo, configs.values())
        yield


def repeated(heads: Tensor, like: Tensor) -> Tensor:
    """(B, H, K, E) keys or values, those that several query heads share written out for each.

    Args:
        heads: (B, G, K, E).
        like: The query (B, H, Q, E).
    """
    return heads.repeat_interleave(like.shape[1] // heads.shape[1], 1)


def _eager_of(module: nn.Module) -> AttentionFunction:
    found = eager_attention(module)
    assert found is not None, "refused before"
    return found


def _cannot(layer: int, module: nn.Module) -> UserError:
    return UserError(
        f"The attention of layer {layer} ({type(module).__name__}) cannot be changed.",
        "It mixes tokens in a way of its own, not through transformers' registry of attention functions.",
        "Leave knockout out, or choose a model with ordinary attention in every layer.",
    )
