"""Base class of the callbacks that analyze hidden states: a schedule, and one forward pass shared by all of them.

Data flow: the trainer's hooks -> the first of these callbacks -> ``Inspection`` -> ``analyze`` of each callback due.
The module may be ours, or any LightningModule that holds a multimodal LLM of transformers; ``hf`` does the same in
transformers' Trainer.
"""

from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from lightning_mm.analysis.findings import Findings
from lightning_mm.callbacks.guest_run import GuestRun
from lightning_mm.callbacks.runner import Inspection, InspectionInput, restored_budget
from lightning_mm.callbacks.schedule import Budget, Schedule
from lightning_mm.callbacks.subject import Given, Log, Subject, draw_probes, our_data, subject_of_trainer
from lightning_mm.core.notebook import show_messages
from lightning_mm.core.random_state import restore_rng, rng_state
from lightning_mm.core.run_directory import RunDirectory, WritesToRun
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.report.wandb import OnlineLogger
from lightning_mm.training.module import MMModule


class LayerCallback(Callback, WritesToRun):
    """Analyzes the hidden states of every layer on a schedule; subclasses implement ``analyze``.

    All callbacks due at a step share one forward pass over the probe set. The first one in the trainer's list runs it
    and holds the time budget. An ``MMModule`` with its ``MMDataModule`` needs no further arguments; for any other
    module, what one callback is given holds for all of them. Results of such a module's fit go to a new folder
    ``inspection`` in the folder of the trainer's logger (``default_root_dir`` without one).

    Args:
        schedule: When to look, and how much time that may take.
        model: Path of the multimodal LLM in the LightningModule, such as ``model.backbone``; None: the one in it.
        processor: Its processor; None: the module's ``processor``.
        probes: A ``ProbeSet``, a file or rows of pictures with captions and objects, or ``Probes`` (how many, and how
            many at a time); None: the data module's.
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        model: str | None = None,
        processor: Any = None,
        probes: Any = None,
    ) -> None:
        show_messages()
        self.schedule = schedule
        self.given = Given(model, processor, probes)
        self.inspection: Inspection | None = None
        self._budget = Budget()
        self._guest: GuestRun | None = None
        self._earlier: str | None = None
        self._probe_set: ProbeSet | None = None
        self._rejected = RejectedSamples(max_bad_fraction=1.0)

    def begin(self, subject: Subject, step: int) -> None:
        """Called on every rank before the first look, with the optimizer steps done; nothing by default."""

    @abstractmethod
    def analyze(self, data: InspectionInput) -> Findings:
        """Measurements on one inspection's hidden states; called on rank 0 only."""

    def wants_text_only(self, outermost: bool) -> bool:
        """Whether to read the rows without pictures too; ``outermost``: this is the first or last inspection."""
        return False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Draw the probe set before the model is loaded, so that errors in it are raised early."""
        if stage == "fit" and self._runs_inspections(trainer):
            generators, given = rng_state(), self._given_together(trainer)
            self._probe_set = draw_probes(given, our_data(trainer), self._rejected)
            restore_rng(generators)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._runs_inspections(trainer):
            return
        assert self._probe_set is not None, "it is drawn in setup"
        given = self._given_together(trainer)
        subject = subject_of_trainer(trainer, pl_module, given, self._probe_set, self._rejected)
        run = self.run
        if run is None and isinstance(pl_module, MMModule):
            run = RunDirectory(Path(trainer.default_root_dir))
        self._guest = None
        if run is None:
            earlier = Path(self._earlier) if self._earlier else None
            self._guest = GuestRun(Path(trainer.log_dir or trainer.default_root_dir), earlier, trainer.global_step)
            run = self._guest.directory
        self.inspection = Inspection(_LightningLoop(trainer), subject, _inspectors(trainer), run, self._budget)
        if self._guest is None:
            self.inspection.at_start()
            return
        with self._guest.recording():
            if trainer.is_global_zero:
                self._guest.note_start(subject)
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
        if self.inspection is None:
            return
        if not trainer.interrupted:
            self.inspection.at_end()
        self._finish(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._finish(trainer)

    def _finish(self, trainer: L.Trainer) -> None:
        """Write the report of a run that is not ours; once."""
        guest, self._guest = self._guest, None
        if guest is not None and self.inspection is not None and trainer.is_global_zero:
            guest.finish(self.inspection.subject)

    def state_dict(self) -> dict[str, Any]:
        budget = self._budget
        training = budget.training if self.inspection is None else self.inspection.training_seconds
        state = {"spent": budget.spent, "count": budget.count, "training": training}
        return state if self._guest is None else {**state, "run": str(self._guest.directory.path)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._budget, self._earlier = restored_budget(state_dict), state_dict.get("run")

    @property
    def inspection_seconds(self) -> float:
        """Seconds of all inspections so far; zero for all callbacks but the one that runs them."""
        return self._budget.spent

    def _runs_inspections(self, trainer: L.Trainer) -> bool:
        return _inspectors(trainer)[0] is self

    def _given_together(self, trainer: L.Trainer) -> Given:
        return Given.together(callback.given for callback in _inspectors(trainer))


class _LightningLoop:
    """Lightning's trainer as a ``Loop``."""

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = trainer
        steps = trainer.estimated_stepping_batches
        self.total = None if steps == float("inf") else int(steps)
        self.is_rank_zero = trainer.is_global_zero

    @property
    def step(self) -> int:
        return self._trainer.global_step

    def loggers(self) -> dict[str, Log]:
        return {
            f"{type(each).__name__}{f' {number}' if number else ''}": partial(_log, each)
            for number, each in enumerate(self._trainer.loggers)
        }


def _log(logger: Logger, values: dict[str, float], found: Findings) -> None:
    logger.log_metrics(values, step=found.step)
    if isinstance(logger, OnlineLogger):
        logger.log_layers(found.rows)


def _inspectors(trainer: L.Trainer) -> list[LayerCallback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its callback connector
    return [callback for callback in callbacks if isinstance(callback, LayerCallback)]
