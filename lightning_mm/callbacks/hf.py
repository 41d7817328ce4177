"""The same looks inside transformers' Trainer and those built on it (TRL's SFTTrainer): one TrainerCallback.

Data flow: on_train_begin -> ``guest_subject`` -> ``Inspection`` (the runner of the Lightning callbacks too) -> at
on_step_end by schedule, and at on_train_end -> ``output_dir/inspection``: layers.csv, report.html; peaks of the
profiles -> ``state.log_history``, and the trackers of ``report_to``.

Example::

    looks = [ProbingCallback(), GeometryCallback(), DriftCallback()]
    inspection = InspectionCallback(looks, probes="probes.json", processor=processor)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=processor)
    inspection.add_to(trainer)
    trainer.train()
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_mm.analysis.findings import Findings
from lightning_mm.callbacks.base import LayerCallback
from lightning_mm.callbacks.guest_run import GuestRun, newest_run
from lightning_mm.callbacks.runner import Inspection
from lightning_mm.callbacks.schedule import Budget
from lightning_mm.callbacks.subject import Given, Log, draw_probes, guest_subject
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.random_state import restore_rng, rng_state
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.models.trainer_callback import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    trackers_of,
)


class InspectionCallback(TrainerCallback):
    """Looks inside every layer while transformers' Trainer trains, which is bit-identical with and without it.

    The model may have adapters of PEFT, gradient checkpointing, mixed precision, and be trained by several processes
    (DDP); where its weights are sharded, the callback refuses at the start. Each training makes a folder of its own,
    ``inspection``, ``inspection-2``, ... in ``output_dir``; one that is resumed takes over what the newest of them
    holds up to its step. Metrics are added to ``state.log_history``; with ``add_to(trainer)`` in place of the Trainer's
    ``callbacks=[...]`` also to the trackers of its ``report_to`` (as ``train/inspect/...``), which a callback alone
    cannot reach.

    Args:
        callbacks: What to look for, and when: ``ProbingCallback``, ``GeometryCallback``, ``DriftCallback``,
            ``CausalCallback``; one of each kind.
        probes: A ``ProbeSet``, a file or rows of pictures with captions and objects, or ``Probes``; None: what a
            callback has.
        processor: What ``AutoProcessor`` gave for the model; None: the Trainer's ``processing_class``.

    Attributes:
        run: Folder of the training that runs, or ran last; None before.

    Raises:
        UserError: There is no callback, or two of one kind.
    """

    def __init__(self, callbacks: Sequence[LayerCallback], probes: Any = None, processor: Any = None) -> None:
        kinds = [type(callback).__name__ for callback in callbacks]
        if not kinds or len(set(kinds)) < len(kinds):
            raise UserError(
                "InspectionCallback looks for nothing." if not kinds else "InspectionCallback has two of one kind.",
                f"It was given {', '.join(kinds) or 'no callback'}.",
                "Give it one of each kind, such as [ProbingCallback(), GeometryCallback()].",
            )
        self.callbacks = tuple(callbacks)
        self.given = Given.together([Given(None, processor, probes), *(each.given for each in callbacks)])
        self.run: RunDirectory | None = None
        self._inspection: Inspection | None = None
        self._guest: GuestRun | None = None
        self._begun = False
        self._rejected = RejectedSamples(max_bad_fraction=1.0)
        self._trainer: Trainer | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Add this callback to a Trainer, and send its metrics to the Trainer's trackers (TensorBoard, W&B, ...) too.

        Args:
            trainer: transformers' Trainer, or one built on it; instead of ``callbacks=[...]`` when it was made.
        """
        others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
        trainer.callback_handler.callbacks = [self, *others]  # first, since trackers close at the end of training
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the model and draw the probes.

        Raises:
            UserError: The model or its processor cannot be read, or there are no probes.
        """
        generators = rng_state()
        root, given = kwargs["model"], self.given
        if given.processor is None:
            given = Given(given.model, kwargs.get("processing_class"), given.probes)
        subject = guest_subject(
            root, given, draw_probes(given, None, self._rejected), self._rejected, _precision(args, root)
        )
        folder = Path(str(args.output_dir))
        earlier = newest_run(folder) if state.global_step else None
        self._guest = GuestRun(folder, earlier, state.global_step)
        self.run = self._guest.directory
        self._begun = False
        loop = _TrainerLoop(args, state, control, self._trainer)
        self._inspection = Inspection(loop, subject, self.callbacks, self.run, Budget())
        restore_rng(generators)
        with self._guest.recording():
            if args.load_best_model_at_end:
                log_decision("inspection.end", "the best model", "load_best_model_at_end; its rows have the last step")
            if state.is_world_process_zero:
                self._guest.note_start(subject)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look before the first step: trackers are open now."""
        self._look_at_start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of training time, which inspections may take a share of."""
        self._look_at_start()
        if self._inspection is not None:
            self._inspection.resume_clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look, if a callback is due after this step."""
        if self._inspection is not None and self._guest is not None:
            with self._guest.recording():
                self._inspection.after_batch()

    def _look_at_start(self) -> None:
        """Once; not every loop built on the Trainer has epochs."""
        if self._inspection is not None and self._guest is not None and not self._begun:
            self._begun = True
            with self._guest.recording():
                self._inspection.at_start()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look a last time, and write the report."""
        if self._inspection is None or self._guest is None:
            return
        self._look_at_start()  # a training that is resumed at its end has no step
        with self._guest.recording():
            self._inspection.at_end()
        if state.is_world_process_zero:
            self._guest.finish(self._inspection.subject)
        self._inspection = self._guest = None


class _TrainerLoop:
    """transformers' Trainer as a ``Loop``."""

    def __init__(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, trainer: Trainer | None
    ) -> None:
        self._args, self._state, self._control, self._trainer = args, state, control, trainer
        self.total = state.max_steps if state.max_steps > 0 else None
        self.is_rank_zero = state.is_world_process_zero

    @property
    def step(self) -> int:
        return self._state.global_step

    def loggers(self) -> dict[str, Log]:
        trackers = [] if self._trainer is None else trackers_of(self._trainer)
        each = {type(tracker).__name__: partial(self._track, tracker) for tracker in trackers}
        return {"log_history": self._log, **each}

    def _log(self, values: dict[str, float], found: Findings) -> None:
        self._state.log_history.append({**values, "step": found.step, "epoch": self._state.epoch or 0.0})

    def _track(self, tracker: TrainerCallback, values: dict[str, float], found: Findings) -> None:
        """Give a tracker the metrics as the Trainer would, which alone would clear what it has not logged yet."""
        assert self._trainer is not None
        generators = rng_state()
        tracker.on_log(self._args, self._state, self._control, logs=dict(values), model=self._trainer.model)
        restore_rng(generators)


def _precision(args: TrainingArguments, model: nn.Module) -> Any:
    """The autocast of the Trainer's steps: accelerate puts it around the outermost module alone."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    device = next(model.parameters()).device.type

    def context() -> AbstractContextManager[Any]:
        return nullcontext() if dtype is None else torch.autocast(device, dtype)

    return context
