"""One run written down: what entered each block, what its parts put out, which keys and values it attended with.

Data flow: model inputs -> ``record`` -> ``Recording`` -> ``replay`` computes variants of the run
from there, ``interventions.patch`` takes values from it.

Shapes: B rows, L tokens, D hidden size, G key heads, K keys, E head size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.causal.interventions.interventions import Intervention, Site, intervened
from lightning_mm.causal.questions.question import last_logits
from lightning_mm.models.attention.interception import AttentionCall, attention_through
from lightning_mm.models.handle import MultimodalModel

SITES: tuple[Site, ...] = ("residual", "attention", "mlp")


@dataclass(eq=False)
class Recording:
    """A run.

    Args:
        inputs: What the model was given.
        values: (B, L, D) of each site and layer, also where a site puts out the rows in one (B * L, D).
        entered: Per layer, the (B, L, D) stream that entered it.
        calls: Per layer that attends, the call (queries, keys, values, mask); none where it mixes tokens otherwise.
        arguments: Per layer, what its block was given besides the stream.
        tuples: Per layer, whether its block returns a tuple.
        logits: (B, V) at the last token, float32.
    """

    inputs: Mapping[str, Tensor]
    values: dict[tuple[Site, int], Tensor] = field(default_factory=dict)
    entered: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, AttentionCall] = field(default_factory=dict)
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    tuples: dict[int, bool] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def length(self) -> int:
        """L."""
        return next(iter(self.entered.values())).shape[1]


@torch.no_grad()
def record(
    mm: MultimodalModel,
    inputs: Mapping[str, Tensor],
    interventions: Sequence[Intervention] = (),
    sites: Sequence[Site] = SITES,
) -> Recording:
    """Run the model once and write everything down.

    Args:
        mm: The plain model in eval mode.
        inputs: (B, L) of rows without padding, ending where an answer would begin.
        interventions: What to change in this run; the values are those after the change.
        sites: Which sites' values to keep.
    """
    assert not mm.model.training, "dropout would make every run another one"
    made = Recording(dict(inputs))
    with intervened(mm, interventions), _watched(mm, made, sites):
        made.logits = last_logits(mm, inputs)
    return made


@contextmanager
def _watched(mm: MultimodalModel, made: Recording, sites: Sequence[Site]) -> Iterator[None]:
    handles = []
    for block in mm.layout.blocks:
        module = mm.model.get_submodule(block.name)
        handles.append(module.register_forward_pre_hook(_entering(made, block.index), with_kwargs=True))
        handles.append(module.register_forward_hook(_leaving(made, "residual", block.index, "residual" in sites)))
        parts: tuple[tuple[Site, str | None], ...] = (("attention", block.attention), ("mlp", block.mlp))
        for site, name in parts:
            if site in sites and name is not None:
                handles.append(
                    mm.model.get_submodule(name).register_forward_hook(_leaving(made, site, block.index, True))
                )

    def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        made.calls[call.layer] = call
        return call.compute()

    try:
        with attention_through(mm, attend, strict=False):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(made: Recording, layer: int) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        made.entered[layer] = args[0] if args else kwargs["hidden_states"]
        made.arguments[layer] = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})

    return hook


def _leaving(made: Recording, site: Site, layer: int, keep: bool) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if site == "residual":
            made.tuples[layer] = not isinstance(output, Tensor)
        if keep:
            value = output if isinstance(output, Tensor) else output[0]
            made.values[site, layer] = value.reshape(*made.entered[layer].shape[:2], -1)

    return hook
