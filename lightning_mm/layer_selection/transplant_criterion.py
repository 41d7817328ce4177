"""How much of a tuned model's gain each of its blocks carries alone, by sliding transplantation.

Data flow: base model + tuned model + a few batches -> loss of the base with a few neighboring blocks of the tuned model
in it, position by position -> share of the gain. The base is bit-identical afterwards
(Palacios et al. 2026, arXiv:2606.03871).

Shapes: K batches, L decoder blocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.layer_selection.gradient_criteria import half_means
from lightning_mm.layer_selection.layer_range_search import Criterion
from lightning_mm.models.handle import MultimodalModel


def transplant_gains(
    base: MultimodalModel,
    tuned: nn.Module,
    batches: Sequence[Batch],
    device: torch.device,
    width: int = 1,
) -> Tensor:
    """Decrease of the base's loss when blocks of the tuned model replace its own.

    Args:
        base: The untuned model.
        tuned: A model of the same architecture and types of weights, with adapters or without.
        batches: K batches to take the loss of.
        device: Of both models.
        width: Blocks on either side of the middle one that are transplanted with it.

    Returns:
        (K, L) loss of the base minus loss of the hybrid, in nats per supervised token.
    """
    layout = base.layout
    gains = torch.zeros(len(batches), layout.num_layers, dtype=torch.float64)
    for k, batch in enumerate(batches):
        on_device = batch.to(device)
        alone = _loss(base, on_device)
        for middle in range(layout.num_layers):
            blocks = range(max(0, middle - width), min(layout.num_layers, middle + width + 1))
            with transplanted(base.model, tuned, [layout.layers[index] for index in blocks]):
                gains[k, middle] = alone - _loss(base, on_device)
    return gains


def transplant_criterion(gains: Tensor, resamples: int) -> Criterion:
    """The transplant criterion from (K, L) gains."""
    return Criterion("transplant", gains.mean(0), half_means(gains, resamples), "meaning")


@contextmanager
def transplanted(base: nn.Module, tuned: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """While active, the named blocks of ``base`` are those of ``tuned``: whole modules with their adapters."""
    own = {name: base.get_submodule(name) for name in blocks}
    try:
        for name in blocks:
            _put(base, name, tuned.get_submodule(name))
        yield
    finally:
        for name, block in own.items():
            _put(base, name, block)


def _put(model: nn.Module, name: str, block: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, block)


@torch.no_grad()
def _loss(mm: MultimodalModel, batch: Batch) -> float:
    objective = supervised_nll(mm.model, mm.model.get_submodule(mm.layout.head), batch)
    return float(objective.nll) / max(objective.num_tokens, 1)
