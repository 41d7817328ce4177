"""Caches the activations of one forward pass, as TransformerLens' ``run_with_cache`` does.

Data flow: model inputs -> ``cache_activations`` -> ``ActivationCache``: block inputs, outputs of the sites, attention
calls, logits -> ``partial_forward`` recomputes variants of the run from it, ``interventions.patch_from`` takes values
from it.

Shapes: B rows, L tokens, D hidden size, V vocabulary size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.causal.interventions.interventions import Intervention, Site, apply_interventions
from lightning_mm.causal.questions.question import last_logits
from lightning_mm.models.attention.interception import AttentionCall, attention_through
from lightning_mm.models.handle import MultimodalModel

SITES: tuple[Site, ...] = ("residual", "attention", "mlp")


@dataclass(eq=False)
class ActivationCache:
    """The activations of one forward pass.

    Args:
        inputs: The model inputs.
        values: (B, L, D) output of each site and layer, also if the module returns the rows flattened to (B * L, D).
        block_inputs: Layer -> (B, L, D) residual stream that entered its block.
        attention_calls: Layer -> queries, keys, values and mask of its attention; layers without attention are absent.
        block_arguments: Layer -> the other positional and keyword arguments of its block.
        returns_tuple: Layer -> whether its block returns a tuple.
        logits: (B, V) float32 logits at the last token.
    """

    inputs: Mapping[str, Tensor]
    values: dict[tuple[Site, int], Tensor] = field(default_factory=dict)
    block_inputs: dict[int, Tensor] = field(default_factory=dict)
    attention_calls: dict[int, AttentionCall] = field(default_factory=dict)
    block_arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    returns_tuple: dict[int, bool] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def length(self) -> int:
        """L, the number of tokens."""
        return next(iter(self.block_inputs.values())).shape[1]


@torch.no_grad()
def cache_activations(
    mm: MultimodalModel,
    inputs: Mapping[str, Tensor],
    interventions: Sequence[Intervention] = (),
    sites: Sequence[Site] = SITES,
) -> ActivationCache:
    """Run the model once and keep its activations.

    Args:
        mm: The unwrapped model in eval mode.
        inputs: Model inputs, (B, L) rows without padding, ending where the answer begins.
        interventions: Changes of this run; cached values are those after the change.
        sites: Sites whose outputs are kept.
    """
    assert not mm.model.training, "dropout would make every run another one"
    cache = ActivationCache(dict(inputs))
    with apply_interventions(mm, interventions), _caching_hooks(mm, cache, sites):
        cache.logits = last_logits(mm, inputs)
    return cache


@contextmanager
def _caching_hooks(mm: MultimodalModel, cache: ActivationCache, sites: Sequence[Site]) -> Iterator[None]:
    handles = []
    for block in mm.layout.blocks:
        module = mm.model.get_submodule(block.name)
        handles.append(module.register_forward_pre_hook(_input_hook(cache, block.index), with_kwargs=True))
        handles.append(module.register_forward_hook(_output_hook(cache, "residual", block.index, "residual" in sites)))
        parts: tuple[tuple[Site, str | None], ...] = (("attention", block.attention), ("mlp", block.mlp))
        for site, name in parts:
            if site in sites and name is not None:
                handles.append(
                    mm.model.get_submodule(name).register_forward_hook(_output_hook(cache, site, block.index, True))
                )

    def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        cache.attention_calls[call.layer] = call
        return call.compute()

    try:
        with attention_through(mm, attend, strict=False):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(cache: ActivationCache, layer: int) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache.block_inputs[layer] = args[0] if args else kwargs["hidden_states"]
        cache.block_arguments[layer] = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})

    return hook


def _output_hook(cache: ActivationCache, site: Site, layer: int, keep: bool) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if site == "residual":
            cache.returns_tuple[layer] = not isinstance(output, Tensor)
        if keep:
            value = output if isinstance(output, Tensor) else output[0]
            cache.values[site, layer] = value.reshape(*cache.block_inputs[layer].shape[:2], -1)

    return hook
