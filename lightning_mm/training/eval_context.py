"""Access to the module in training for callbacks, and an evaluation mode that leaves training unaffected.

Data flow: trainer + module -> ``evaluation_mode`` (eval mode, no gradients, saved random state) -> the callback's
forward passes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import lightning as L
import torch

from lightning_mm.data.batch import PromptBatch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.execution.cache.activation_cache import CacheSettings
from lightning_mm.execution.connector_init import ConnectorInit
from lightning_mm.execution.prepare import Compute
from lightning_mm.execution.step import TrainingStep
from lightning_mm.layer_selection.select import AutoRange, Selection
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone
from lightning_mm.models.side_effects import without_side_effects
from lightning_mm.tuning.census import Census
from lightning_mm.tuning.optimizer import OptimizerSettings
from lightning_mm.tuning.policy import TuningPlan, TuningPolicy


class LiveModule(Protocol):
    """The attributes and methods of ``MMModule`` that callbacks use."""

    backbone: Backbone
    mm: MultimodalModel
    plan: TuningPlan
    census: Census
    tuning: TuningPolicy
    optimizer: OptimizerSettings
    own_optimizer: bool
    activation_checkpointing: bool
    max_new_tokens: int
    auto: AutoRange
    compute: Compute
    cache: CacheSettings
    connector_init: ConnectorInit
    skip_nonfinite: int
    without_files: MMDataModule
    selection: Selection | None
    step: TrainingStep
    loaded_step: int | None
    device: torch.device

    def settings(self) -> dict[str, Any]:
        """Settings of a fit by option name."""
        ...

    def answer(self, batch: PromptBatch) -> list[str]:
        """Greedy answers, one per question."""
        ...


def live(module: L.LightningModule) -> LiveModule:
    """The module, typed as ``LiveModule``."""
    return cast(LiveModule, module)


def data_of(trainer: L.Trainer) -> MMDataModule:
    """The trainer's data module; one without rows, where the user's own loaders are in its place."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, MMDataModule):
        return data
    rows = live(trainer.lightning_module).without_files
    rows.trainer = trainer
    return rows


@contextmanager
def evaluation_mode(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Context with the module in eval mode, without gradients, in the run's precision.

    On exit the train/eval mode of each submodule and all random generators are restored, so that a run with
    evaluations is bit-identical to one without.
    """
    with without_side_effects(module), trainer.precision_plugin.forward_context():
        yield
