"""What all callbacks that look inside share: when they are due, and that one of them does the reading for all.

Data flow: the trainer's hooks -> the first inspecting callback -> ``Inspection`` -> every one that is due.
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_mm.analysis.findings import Findings
from lightning_mm.callbacks.runner import Inspection, Look, restored_budget
from lightning_mm.callbacks.schedule import Budget, Schedule
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.training.eval_context import data_of


class InspectingCallback(Callback):
    """Reads every layer at times; subclasses say what they make of it.

    All that are due at a step share one forward pass over the data module's probe set.

    Args:
        schedule: When to look, and how much time that may take.
    """

    def __init__(self, schedule: Schedule = Schedule()) -> None:  # noqa: B008  (frozen)
        self.schedule = schedule
        self.run: RunDirectory | None = None
        self.inspection: Inspection | None = None
        self._budget = Budget()

    @abstractmethod
    def analyse(self, look: Look) -> Findings:
        """What a reading says; called on rank 0 only."""

    def wants_text_only(self, outermost: bool) -> bool:
        """Whether the rows without pictures are to be read too; ``outermost`` is the first look due, and the last."""
        return False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Draw the probe set before the model is loaded, so that mistakes in it show first."""
        if stage == "fit" and self._leads(trainer):
            data_of(trainer).probe_set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._leads(trainer):
            run = self.run or RunDirectory(Path(trainer.default_root_dir))
            self.inspection = Inspection(trainer, pl_module, _lookers(trainer), run, self._budget)
            self.inspection.at_start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.inspection is not None:
            self.inspection.resume_clock()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.inspection is not None:
            self.inspection.after_batch()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.inspection is not None:
            self.inspection.pause_clock()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.inspection is not None and not trainer.interrupted:
            self.inspection.at_end()

    def state_dict(self) -> dict[str, Any]:
        budget = self._budget
        training = budget.training if self.inspection is None else self.inspection.training_seconds
        return {"spent": budget.spent, "count": budget.count, "training": training}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._budget = restored_budget(state_dict)

    @property
    def inspection_seconds(self) -> float:
        """What looks have cost so far; zero for all but the one that looks for all."""
        return self._budget.spent

    def _leads(self, trainer: L.Trainer) -> bool:
        return _lookers(trainer)[0] is self


def _lookers(trainer: L.Trainer) -> list[InspectingCallback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its callback connector
    return [callback for callback in callbacks if isinstance(callback, InspectingCallback)]
