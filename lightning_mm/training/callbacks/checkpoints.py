"""When checkpoints are written: at optimizer steps, never inside one, so that every file resumes exactly.

Data flow: end of a batch -> is the accumulation window closed? -> ``last.ckpt`` every n steps, at the last step, and on
SIGTERM (a flag is all that the signal handler sets); ``best.ckpt`` after a validation.
"""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_mm.core.decisions import log_decision
from lightning_mm.planning.devices import synchronize

EXIT_CODE = 143
"""What a process that ended on SIGTERM returns."""


class Preempted(Exception):
    """SIGTERM came, and the run is saved."""


def window_closed(trainer: L.Trainer) -> bool:
    """Whether no micro-batch waits for its optimizer step: its gradient would be lost with a checkpoint."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


class LastCheckpoint(Callback):
    """Keeps ``last.ckpt``.

    Args:
        path: Where to save.
        every: Steps between saves.

    Attributes:
        seconds: What saving has cost so far.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self.seconds = 0.0
        self._saved_at = -1
        self._asked = False
        self._previous: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = trainer.global_step
        try:
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:
            log_decision("preemption", "off", "signals reach the main thread only, and training runs in another")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not window_closed(trainer):
            return
        stop = trainer.strategy.reduce_boolean_decision(self._asked, all=False)
        due = trainer.global_step - self._saved_at >= self.every or _is_last(trainer)
        if (due or stop) and trainer.global_step != self._saved_at:
            synchronize(pl_module.device)
            began = time.perf_counter()
            trainer.save_checkpoint(self.path)
            self.seconds += time.perf_counter() - began
            self._saved_at = trainer.global_step
        if stop:
            log_decision("preemption", f"stopped at step {trainer.global_step}", f"SIGTERM; go on with {self.path}")
            raise Preempted

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt``, by validation loss; a validation inside an accumulation window writes none."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor="val/loss",
            save_top_k=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if window_closed(trainer):
            super().on_validation_end(trainer, pl_module)
        else:
            log_decision("best.ckpt", "not written", "validation fell inside an accumulation window")


def _is_last(trainer: L.Trainer) -> bool:
    if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return last_epoch and trainer.is_last_batch
