"""Checkpoint callbacks: they save only after complete optimizer steps, so that every file resumes exactly.

Data flow: end of a batch -> ``is_accumulation_complete`` -> ``last.ckpt`` every n steps, at the last step, and on
SIGTERM (a flag is all that the signal handler sets); ``best.ckpt`` after a validation.
"""

import signal
import time
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.run_directory import WritesToRun
from lightning_mm.planning.devices import synchronize

EXIT_CODE = 143
"""Exit code of a process that ended on SIGTERM."""


class Preempted(Exception):
    """Raised after SIGTERM, once the checkpoint is saved."""


def is_accumulation_complete(trainer: L.Trainer) -> bool:
    """Whether no micro-batch waits for its optimizer step; a checkpoint would lose its gradient."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


class LastCheckpoint(Callback, WritesToRun):
    """Saves ``checkpoints/last.ckpt`` of the run every n steps, at the last step and on SIGTERM.

    Args:
        every: Optimizer steps between saves; default 200.

    Attributes:
        seconds: Seconds spent on saving so far.
    """

    def __init__(self, every: int = 200) -> None:
        self.every = every
        self.seconds = 0.0
        self._saved_at = -1
        self._stop_requested = False
        self._previous: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = trainer.global_step
        try:
            self._previous = signal.signal(signal.SIGTERM, self._request_stop)
        except ValueError:
            log_decision("preemption", "off", "signals reach the main thread only, and training runs in another")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_signal_handler()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_signal_handler()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_accumulation_complete(trainer):
            return
        stop = trainer.strategy.reduce_boolean_decision(self._stop_requested, all=False)
        assert self.run is not None, "checkpoints are written into the folder of a run"
        path = self.run.checkpoints / "last.ckpt"
        due = trainer.global_step - self._saved_at >= self.every or _is_last(trainer)
        if (due or stop) and trainer.global_step != self._saved_at:
            synchronize(pl_module.device)
            began = time.perf_counter()
            trainer.save_checkpoint(path)
            self.seconds += time.perf_counter() - began
            self._saved_at = trainer.global_step
        if stop:
            log_decision("preemption", f"stopped at step {trainer.global_step}", f"SIGTERM; go on with {path}")
            raise Preempted

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self._stop_requested = True

    def _restore_signal_handler(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None


class BestCheckpoint(ModelCheckpoint):
    """Saves ``best.ckpt`` of the run by validation loss; a validation inside an accumulation window saves nothing."""

    def __init__(self) -> None:
        super().__init__(
            filename="best",
            monitor="val/loss",
            save_top_k=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_accumulation_complete(trainer):
            super().on_validation_end(trainer, pl_module)
        else:
            log_decision("best.ckpt", "not written", "validation fell inside an accumulation window")


def _is_last(trainer: L.Trainer) -> bool:
    if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return last_epoch and trainer.is_last_batch
