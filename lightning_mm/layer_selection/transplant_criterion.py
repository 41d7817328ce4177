"""How much of what a tuned model gained each of its blocks carries alone (2606.03871's sliding transplantation).

Data flow: base model + tuned model + a few batches -> loss of the base with one window of the tuned model's blocks in
it, window by window -> share of the gain. The base is bit-identical afterwards.

Shapes: K batches, L decoder blocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.layer_selection.gradient_criteria import halved
from lightning_mm.layer_selection.layer_range_search import Criterion
from lightning_mm.models.handle import MultimodalModel


def transplant_gains(
    base: MultimodalModel,
    tuned: nn.Module,
    batches: Sequence[Batch],
    device: torch.device,
    width: int = 1,
) -> Tensor:
    """Fall of the loss when blocks of the tuned model stand in the base's place.

    Args:
        base: The starting model.
        tuned: Of the same architecture and type of weights; adapters may be in it.
        batches: Conversations to take the loss of.
        device: Where both models are.
        width: Blocks on either side of the middle one that are transplanted with it.

    Returns:
        (K, L) loss of the base minus loss of the hybrid, in nats per supervised token.
    """
    layout = base.layout
    gains = torch.zeros(len(batches), layout.num_layers, dtype=torch.float64)
    for k, batch in enumerate(batches):
        there = batch.to(device)
        alone = _loss(base, there)
        for middle in range(layout.num_layers):
            window = range(max(0, middle - width), min(layout.num_layers, middle + width + 1))
            with transplanted(base.model, tuned, [layout.layers[index] for index in window]):
                gains[k, middle] = alone - _loss(base, there)
    return gains


def transplant_criterion(gains: Tensor, resamples: int) -> Criterion:
    """Criterion 5 from (K, L) gains of K batches."""
    return Criterion("transplant", gains.mean(0), halved(gains, resamples), "meaning")


@contextmanager
def transplanted(base: nn.Module, tuned: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """While active, the named blocks of ``tuned`` stand in ``base``: whole modules, adapters and all."""
    held = {name: base.get_submodule(name) for name in blocks}
    try:
        for name in blocks:
            _put(base, name, tuned.get_submodule(name))
        yield
    finally:
        for name, own in held.items():
            _put(base, name, own)


def _put(model: nn.Module, name: str, block: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, block)


@torch.no_grad()
def _loss(mm: MultimodalModel, batch: Batch) -> float:
    objective = supervised_nll(mm.model, mm.model.get_submodule(mm.layout.head), batch)
    return float(objective.nll) / max(objective.num_tokens, 1)
