"""Hybrids of two models (2606.03871): tuned blocks in the starting model, and what that is worth on a task.

Data flow: starting model, tuned model (or one model with adapters) + conversations -> hybrids by layers -> share of
answers that each gets right, per modality.

An answer is right where each of its tokens is the most likely one given those before it: what greedy decoding writes.

Shapes: N conversations, S supervised positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mm.core.estimate import Estimate, finite
from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import gathered_before
from lightning_mm.geometry.resampling import mean_interval
from lightning_mm.layer_selection.transplant_criterion import transplanted
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region

Mode = Literal["cumulative", "sliding"]
Hybrid = Callable[[Sequence[int]], AbstractContextManager[None]]
"""Makes the hybrid that has these layers of the tuned model, for as long as its context lasts."""


@dataclass(frozen=True)
class Answered:
    """Which conversations were answered right.

    Args:
        right: (N,) 0 or 1.
        modalities: Of each: picture or text.
        groups: (N,) equal for conversations about the same picture.
    """

    right: Tensor
    modalities: tuple[str, ...]
    groups: Tensor


def windows(mode: Mode, num_layers: int, width: int = 1, step: int = 1) -> dict[int, tuple[int, ...]]:
    """The layers that are transplanted, by the layer a curve shows them at.

    Example:
        >>> windows("cumulative", 4, step=2)
        {1: (0, 1), 3: (0, 1, 2, 3)}
        >>> windows("sliding", 4, width=3, step=2)
        {0: (0, 1), 2: (1, 2, 3)}
    """
    if mode == "cumulative":
        return {last: tuple(range(last + 1)) for last in range(num_layers - 1, -1, -step)[::-1]}
    half = width // 2
    return {
        middle: tuple(range(max(0, middle - half), min(num_layers, middle - half + width)))
        for middle in range(0, num_layers, step)
    }


def from_two(base: MultimodalModel, tuned: nn.Module) -> Hybrid:
    """Hybrids of two models of one architecture; layers up to the last bring the final norm and the head with them."""
    layout = base.layout
    above = [name for region in (Region.NORM, Region.HEAD) for name in layout.parameters_in(region)]
    top = sorted({name.rpartition(".")[0] for name in above})

    def hybrid(layers: Sequence[int]) -> AbstractContextManager[None]:
        modules = [layout.layers[layer] for layer in layers]
        return transplanted(base.model, tuned, [*modules, *(top if layout.num_layers - 1 in layers else [])])

    return hybrid


def both(one: Hybrid, other: Hybrid) -> Hybrid:
    """What two ways do together: adapters of some layers, and tensors put back elsewhere."""

    @contextmanager
    def hybrid(layers: Sequence[int]) -> Iterator[None]:
        with one(layers), other(layers):
            yield

    return hybrid


def from_adapters(mm: MultimodalModel) -> Hybrid:
    """Hybrids of a model and its adapters: those of other layers count nothing for a while. Copies no weight."""
    return partial(_adapters_in, mm)


def from_start(mm: MultimodalModel, start: Mapping[str, Tensor]) -> Hybrid:
    """Hybrids of a model and what some of its tensors were: those of other layers are put back for a while.

    Args:
        mm: As it is now.
        start: Parameter name -> what it was, on any device.
    """
    return partial(_started_but_for, mm, start)


@contextmanager
def _started_but_for(mm: MultimodalModel, start: Mapping[str, Tensor], layers: Sequence[int]) -> Iterator[None]:
    inside = tuple(f"{mm.layout.layers[layer]}." for layer in layers)
    parameters = dict(mm.model.named_parameters())
    held = {name: parameters[name].data for name in start if not (inside and name.startswith(inside))}
    try:
        for name, data in held.items():
            parameters[name].data = start[name].to(data)
        yield
    finally:
        for name, data in held.items():
            parameters[name].data = data


@contextmanager
def _adapters_in(mm: MultimodalModel, layers: Sequence[int]) -> Iterator[None]:
    inside = tuple(f"{mm.layout.layers[layer]}." for layer in layers)
    silenced: list[tuple[Any, bool]] = [
        (module, module._disable_adapters)
        for name, module in mm.model.named_modules()
        if hasattr(module, "lora_A")
        and hasattr(module, "_disable_adapters")
        and not (inside and name.startswith(inside))
    ]
    try:
        for module, _ in silenced:
            module._disable_adapters = True
        yield
    finally:
        for module, held in silenced:
            module._disable_adapters = held


def transplant_curve(
    mm: MultimodalModel,
    hybrid: Hybrid,
    batches: Sequence[Batch],
    device: torch.device,
    layers: Mapping[int, Sequence[int]],
) -> dict[int, Answered]:
    """What each hybrid answers right.

    Args:
        mm: The model that hybrids are made in.
        hybrid: Makes them.
        batches: Conversations with answers.
        device: Where the model is.
        layers: As ``windows`` gives them.
    """
    curve = {}
    for shown, chosen in layers.items():
        with hybrid(chosen):
            curve[shown] = answered(mm, batches, device)
    return curve


@torch.no_grad()
def answered(mm: MultimodalModel, batches: Sequence[Batch], device: torch.device) -> Answered:
    """Which conversations a model answers right, all their answers."""
    right, modalities, pictures = [], [], []
    for batch in batches:
        there = batch.to(device)
        with gathered_before(mm.model.get_submodule(mm.layout.head), there.supervised):
            logits = mm.model(**there.inputs, use_cache=False).logits
        hit_S = logits.reshape(len(there.targets), -1).argmax(-1) == there.targets
        row_S = there.supervised // there.inputs["input_ids"].shape[1]
        missed = torch.zeros(len(batch), device=device).index_add_(0, row_S, (~hit_S).float())
        right.append((missed == 0).double().cpu())
        modalities += ["picture" if sample.images else "text" for sample in batch.samples]
        pictures += [str(sample.images[0]) if sample.images else sample.id for sample in batch.samples]
    numbers = {picture: number for number, picture in enumerate(dict.fromkeys(pictures))}
    return Answered(torch.cat(right), tuple(modalities), torch.tensor([numbers[picture] for picture in pictures]))


def transplant_rows(
    mode: Mode, curve: Mapping[int, Answered], untouched: Answered
) -> Iterator[tuple[str, dict[int, Estimate]]]:
    """Place and one Estimate per layer shown: the share answered right, per modality, pictures counting as groups.

    Args:
        mode: Of the curve.
        curve: By the layer it is shown at.
        untouched: What the starting model answers right: the null.
    """
    for modality in sorted(set(untouched.modalities)):
        members = torch.tensor([found == modality for found in untouched.modalities])
        ends = mean_interval(torch.stack([each.right[members] for each in curve.values()]), untouched.groups[members])
        found = zip(*(end.tolist() for end in ends), strict=True)
        n, null = int(members.sum()), float(untouched.right[members].mean())
        yield (
            f"{mode}/{modality}",
            {
                layer: finite(mean, n, low=max(0.0, low), high=min(1.0, high), null=null)
                for layer, (mean, low, high) in zip(curve, found, strict=True)
            },
        )
