"""What a callback may know of the live module, and how it looks at it without leaving a trace.

Data flow: trainer + module -> ``evaluation_mode`` (eval mode, no gradients, own randomness) -> whatever the callback reads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import lightning as L
import torch

from lightning_mm.data.batch import PromptBatch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.execution.step import TrainingStep
from lightning_mm.layer_selection.select import Selection
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.training import checkpoint
from lightning_mm.tuning.census import Census
from lightning_mm.tuning.policy import TuningPlan


class LiveModule(Protocol):
    """The part of ``MMModule`` that callbacks use."""

    mm: MultimodalModel
    plan: TuningPlan
    census: Census
    selection: Selection | None
    step: TrainingStep
    device: torch.device

    def answer(self, batch: PromptBatch) -> list[str]:
        """Greedy answers, one per question."""
        ...


def live(module: L.LightningModule) -> LiveModule:
    """The module as callbacks see it."""
    return cast(LiveModule, module)


def data_of(trainer: L.Trainer) -> MMDataModule:
    """The run's data module."""
    return cast(MMDataModule, trainer.datamodule)  # type: ignore[attr-defined]


@contextmanager
def evaluation_mode(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Read the model as it is now: all of it in eval mode, without gradients, in the run's precision.

    Modes and every random generator are as before when it ends, so a run that is looked at is bit-identical to one
    that is not.
    """
    modes = {part: part.training for part in module.modules()}
    generators = checkpoint.rng_state()
    module.eval()
    try:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
        checkpoint.restore_rng(generators)
