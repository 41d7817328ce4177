"""Intercept every attention call of the decoder, to read and change queries, keys, values and masks.

Data flow: the model's attention modules -> transformers' registry of attention functions -> ``AttentionCall`` -> the
given function -> back into the model. Masks are explicit, whichever kernel the model runs.

Shapes: B rows, H query heads, G key heads (H a multiple of G), Q queries, K keys, E head size.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

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
"""Kernels that take an explicit mask; FlashAttention and FlexAttention have other formats."""
_ONLY_EAGER = ("softcap", "s_aux")
"""Options that sdpa does not support: capped scores, sinks."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments of one attention module's attention function.

    Args:
        layer: Index of its decoder block.
        module: The attention module.
        query: (B, H, Q, E), after rotary positions.
        key: (B, G, K, E), after rotary positions.
        value: (B, G, K, E).
        mask: Additive, broadcasts to (B, H, Q, K): 0 or a very negative number; None if every query attends to every
            key.
        kernel: Name of the model's kernel: 'eager', 'sdpa', ...
        lookup: Returns the model's attention function of a kernel's name.
        options: Further keyword arguments (scaling, soft-capping, sinks, ...).
    """

    layer: int
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kernel: str
    lookup: Lookup
    options: dict[str, Any]

    def compute(self) -> tuple[Tensor, Tensor | None]:
        """Output (B, Q, H, E) of the model's own kernel, and its weights (B, H, Q, K) or None.

        Kernels that take no explicit mask are replaced by one that does.
        """
        kernel = self.kernel
        if kernel not in _MASKED:
            kernel = "eager" if any(self.options.get(name) is not None for name in _ONLY_EAGER) else "sdpa"
            log_decision(
                "causal.attention", kernel, f"{self.kernel} takes no written-out mask; this one computes the same"
            )
        own = cast(AttentionFunction, eager_attention(self.module))  # looked up under 'eager' only, where it exists
        return self.lookup(kernel, own)(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def explicit(self) -> tuple[Tensor, Tensor]:
        """Output (B, Q, H, E) and weights (B, H, Q, K) of the family's eager attention."""
        return _required_eager_attention(self.module)(
            self.module, self.query, self.key, self.value, self.mask, **self.options
        )

    def changed(self, **fields: Any) -> "AttentionCall":
        """A copy of the call with some fields replaced."""
        return replace(self, **fields)


Attend = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]


@contextmanager
def attention_through(mm: MultimodalModel, attend: Attend, strict: bool = True) -> Iterator[None]:
    """While active, ``attend`` computes every attention of the decoder; vision towers are not affected.

    Args:
        mm: The plain model; adapters and quantized weights are supported.
        attend: Takes each call; returns output (B, Q, H, E), and weights or None, as the attention function does.
        strict: Whether to raise if a layer does not use transformers' registry; if False, such a layer is left as it
            is. True by default.

    Raises:
        UserError: A layer does not use transformers' attention registry (``strict``).
    """
    mixers: dict[int, Any] = {b.index: mm.model.get_submodule(b.attention) for b in mm.layout.blocks if b.attention}
    other = [layer for layer, module in mixers.items() if not has_eager_attention(module)]
    if other and strict:
        raise _not_interceptable(other[0], mixers[other[0]])
    layers = {id(module): layer for layer, module in mixers.items() if layer not in other}
    configs: dict[int, Any] = {id(mixers[layer].config): mixers[layer].config for layer in layers.values()}
    # Modules of towers that share the decoder's config get an explicit mask, too.
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


def repeat_kv(heads: Tensor, like: Tensor) -> Tensor:
    """Keys or values repeated for each query head, (B, H, K, E).

    Args:
        heads: Keys or values (B, G, K, E).
        like: The query (B, H, Q, E).
    """
    return heads.repeat_interleave(like.shape[1] // heads.shape[1], 1)


def _required_eager_attention(module: nn.Module) -> AttentionFunction:
    found = eager_attention(module)
    assert found is not None, "refused before"
    return found


def _not_interceptable(layer: int, module: nn.Module) -> UserError:
    return UserError(
        f"The attention of layer {layer} ({type(module).__name__}) cannot be changed.",
        "It mixes tokens in a way of its own, not through transformers' registry of attention functions.",
        "Leave knockout out, or choose a model with ordinary attention in every layer.",
    )
