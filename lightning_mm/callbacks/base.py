"""Base class of the callbacks that analyze hidden states: a schedule, and one forward pass shared by all of them.

Data flow: the trainer's hooks -> the first inspection callback -> ``Inspection`` -> ``analyze`` of each callback due.
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_mm.analysis.findings import Findings
from lightning_mm.callbacks.runner import Inspection, InspectionInput, restored_budget
from lightning_mm.callbacks.schedule import Budget, Schedule
from lightning_mm.core.run_directory import RunDirectory, WritesToRun
from lightning_mm.training.eval_context import data_of


class InspectionCallback(Callback, WritesToRun):
    """Analyzes the hidden states of every layer on a schedule; subclasses implement ``analyze``.

    All callbacks due at a step share one forward pass over the data module's probe set. The first one in the
    trainer's list runs it and holds the time budget.

    Args:
        schedule: When to look, and how much time that may take.
    """

    def __init__(self, schedule: Schedule = Schedule()) -> None:  # noqa: B008  (frozen)
        self.schedule = schedule
        self.inspection: Inspection | None = None
        self._budget = Budget()

    @abstractmethod
    def analyze(self, data: InspectionInput) -> Findings:
        """Measurements on one inspection's hidden states; called on rank 0 only."""

    def wants_text_only(self, outermost: bool) -> bool:
        """Whether to read the rows without pictures too; ``outermost``: this is the first or last inspection."""
        return False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Draw the probe set before the model is loaded, so that errors in it are raised early."""
        if stage == "fit" and self._runs_inspections(trainer):
            data_of(trainer).probe_set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._runs_inspections(trainer):
            run = self.run or RunDirectory(Path(trainer.default_root_dir))
            self.inspection = Inspection(trainer, pl_module, _inspectors(trainer), run, self._budget)
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
        """Seconds of all inspections so far; zero for all callbacks but the one that runs them."""
        return self._budget.spent

    def _runs_inspections(self, trainer: L.Trainer) -> bool:
        return _inspectors(trainer)[0] is self


def _inspectors(trainer: L.Trainer) -> list[InspectionCallback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its callback connector
    return [callback for callback in callbacks if isinstance(callback, InspectionCallback)]
