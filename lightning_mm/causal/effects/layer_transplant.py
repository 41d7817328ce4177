"""Layer transplantation: hybrids of two models, with layers of the tuned model in the starting model, scored on a task.

After Palacios et al. 2026, arXiv:2606.03871.

Data flow: starting model, tuned model (or one model with adapters) + conversations -> hybrids by layers -> fraction of
correct answers of each hybrid, per modality.

An answer is correct if each of its tokens is the most likely one given those before it, which is what greedy decoding
writes.

Shapes: N conversations, S supervised positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mm.analysis.findings import Findings
from lightning_mm.core.errors import UserError
from lightning_mm.core.estimate import Estimate
from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import select_positions_before_head
from lightning_mm.geometry.resampling import clustered_mean_interval
from lightning_mm.layer_selection.transplant_criterion import transplanted
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region

Mode = Literal["cumulative", "sliding"]
Hybrid = Callable[[Sequence[int]], AbstractContextManager[None]]
"""Returns a context in which the model has the given layers of the tuned model."""


@dataclass(frozen=True)
class ConversationScores:
    """Which conversations were answered correctly.

    Args:
        right: (N,) 1 if all answers of the conversation are correct, else 0.
        modalities: ``picture`` or ``text``, for each conversation.
        groups: (N,) cluster ids: equal for conversations about the same image.
    """

    right: Tensor
    modalities: tuple[str, ...]
    groups: Tensor


def transplant_windows(mode: Mode, num_layers: int, width: int = 1, step: int = 1) -> dict[int, tuple[int, ...]]:
    """Layers to transplant together, by the layer that stands for them on a curve's axis.

    Example:
        >>> transplant_windows("cumulative", 4, step=2)
        {1: (0, 1), 3: (0, 1, 2, 3)}
        >>> transplant_windows("sliding", 4, width=3, step=2)
        {0: (0, 1), 2: (1, 2, 3)}
    """
    if mode == "cumulative":
        return {last: tuple(range(last + 1)) for last in range(num_layers - 1, -1, -step)[::-1]}
    half = width // 2
    return {
        middle: tuple(range(max(0, middle - half), min(num_layers, middle - half + width)))
        for middle in range(0, num_layers, step)
    }


def hybrid_from_models(base: MultimodalModel, tuned: nn.Module) -> Hybrid:
    """Hybrids of two models of equal architecture; the last layer brings the final norm and the head with it."""
    layout = base.layout
    above = [name for region in (Region.NORM, Region.HEAD) for name in layout.parameters_in(region)]
    top = sorted({name.rpartition(".")[0] for name in above})

    def hybrid(layers: Sequence[int]) -> AbstractContextManager[None]:
        modules = [layout.layers[layer] for layer in layers]
        return transplanted(base.model, tuned, [*modules, *(top if layout.num_layers - 1 in layers else [])])

    return hybrid


def combine_hybrids(one: Hybrid, other: Hybrid) -> Hybrid:
    """Hybrids by two mechanisms at once, such as adapters in some layers and restored tensors elsewhere."""

    @contextmanager
    def hybrid(layers: Sequence[int]) -> Iterator[None]:
        with one(layers), other(layers):
            yield

    return hybrid


def hybrid_from_adapters(mm: MultimodalModel) -> Hybrid:
    """Hybrids of a model with its own adapters: adapters of other layers are disabled. Copies no weights."""

    @contextmanager
    def hybrid(layers: Sequence[int]) -> Iterator[None]:
        inside = tuple(f"{mm.layout.layers[layer]}." for layer in layers)
        disabled: list[tuple[Any, bool]] = [
            (module, module._disable_adapters)
            for name, module in mm.model.named_modules()
            if hasattr(module, "lora_A")
            and hasattr(module, "_disable_adapters")
            and not (inside and name.startswith(inside))
        ]
        try:
            for module, _ in disabled:
                module._disable_adapters = True
            yield
        finally:
            for module, was_disabled in disabled:
                module._disable_adapters = was_disabled

    return hybrid


def hybrid_from_start(mm: MultimodalModel, start: Mapping[str, Tensor]) -> Hybrid:
    """Hybrids of a trained model with its initial parameters: those of other layers are restored.

    Args:
        mm: The trained model.
        start: Parameter name -> initial value, on any device; other parameters stay trained.
    """

    @contextmanager
    def hybrid(layers: Sequence[int]) -> Iterator[None]:
        inside = tuple(f"{mm.layout.layers[layer]}." for layer in layers)
        parameters = dict(mm.model.named_parameters())
        trained = {name: parameters[name].data for name in start if not (inside and name.startswith(inside))}
        try:
            for name, data in trained.items():
                parameters[name].data = start[name].to(data)
            yield
        finally:
            for name, data in trained.items():
                parameters[name].data = data

    return hybrid


def transplant_curve(
    mm: MultimodalModel,
    hybrid: Hybrid,
    batches: Sequence[Batch],
    device: torch.device,
    layers: Mapping[int, Sequence[int]],
) -> dict[int, ConversationScores]:
    """Correctness of each hybrid on the conversations, by the layer that stands for it.

    Args:
        mm: The model that hybrids are made in.
        hybrid: Makes a hybrid from layers.
        batches: Conversations with answers.
        device: Device of the model.
        layers: Axis layer -> layers to transplant, as ``transplant_windows`` returns them.
    """
    curve = {}
    for axis_layer, chosen in layers.items():
        with hybrid(chosen):
            curve[axis_layer] = score_conversations(mm, batches, device)
    return curve


@torch.no_grad()
def score_conversations(mm: MultimodalModel, batches: Sequence[Batch], device: torch.device) -> ConversationScores:
    """Score conversations by teacher forcing: correct if every token of every answer is the most likely one."""
    right, modalities, pictures = [], [], []
    for batch in batches:
        batch = batch.to(device)
        with select_positions_before_head(mm.model.get_submodule(mm.layout.head), batch.supervised):
            logits = mm.model(**batch.inputs, use_cache=False).logits
        is_hit_S = logits.reshape(len(batch.targets), -1).argmax(-1) == batch.targets
        row_S = batch.supervised // batch.inputs["input_ids"].shape[1]
        missed = torch.zeros(len(batch), device=device).index_add_(0, row_S, (~is_hit_S).float())
        right.append((missed == 0).double().cpu())
        modalities += ["picture" if sample.images else "text" for sample in batch.samples]
        pictures += [str(sample.images[0]) if sample.images else sample.id for sample in batch.samples]
    numbers = {picture: number for number, picture in enumerate(dict.fromkeys(pictures))}
    return ConversationScores(
        torch.cat(right), tuple(modalities), torch.tensor([numbers[picture] for picture in pictures])
    )


def transplant_rows(
    mode: Mode, curve: Mapping[int, ConversationScores], untouched: ConversationScores
) -> Iterator[tuple[str, dict[int, Estimate]]]:
    """Yields ``mode/modality`` and axis layer -> Estimate: the fraction answered correctly, clustered by image.

    Args:
        mode: Mode of the curve.
        curve: Scores by axis layer, as ``transplant_curve`` returns them.
        untouched: Scores of the starting model, the null.
    """
    for modality in sorted(set(untouched.modalities)):
        members = torch.tensor([each == modality for each in untouched.modalities])
        ends = clustered_mean_interval(
            torch.stack([each.right[members] for each in curve.values()]), untouched.groups[members]
        )
        intervals = zip(*(end.tolist() for end in ends), strict=True)
        n, null = int(members.sum()), float(untouched.right[members].mean())
        yield (
            f"{mode}/{modality}",
            {
                layer: Estimate.of(mean, n, low=max(0.0, low), high=min(1.0, high), null=null)
                for layer, (mean, low, high) in zip(curve, intervals, strict=True)
            },
        )


@dataclass(frozen=True)
class TransplantConfig:
    """Which windows of layers are transplanted.

    Args:
        width: Layers of a sliding window; None: twice the step and one. Palacios et al. 2026 (arXiv:2606.03871): 1.
        step: Layers from one window to the next, and from one cumulative hybrid to the next; None: about a fifteenth of
            all layers. Palacios et al. 2026: 2.
    """

    width: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        for name in ("width", "step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}.", "Nothing would be transplanted.", "Give 1 or more.")

    def windows(self, mode: Mode, num_layers: int) -> dict[int, tuple[int, ...]]:
        """The windows of a mode, by the layer that stands for each."""
        step = self.step or max(1, num_layers // 15)
        return transplant_windows(mode, num_layers, self.width or 2 * step + 1, step)


def add_transplant_curves(
    findings: Findings,
    base: MultimodalModel,
    tuned: nn.Module,
    batches: Sequence[Batch],
    config: TransplantConfig = TransplantConfig(),
) -> None:
    """Add the cumulative and sliding curves of two models of equal architecture."""
    hybrid = hybrid_from_models(base, tuned)
    untouched = score_conversations(base, batches, base.device)
    modes: tuple[Mode, ...] = ("cumulative", "sliding")
    for mode in modes:
        layers = config.windows(mode, base.layout.num_layers)
        curve = transplant_curve(base, hybrid, batches, base.device, layers)
        for site, estimates in transplant_rows(mode, curve, untouched):
            for layer, estimate in estimates.items():
                findings.add("causal", "transplant", site, [estimate], first=layer)
