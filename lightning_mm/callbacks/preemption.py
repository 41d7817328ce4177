"""Stop cleanly when the machine is taken away: SIGTERM -> finish the optimizer step -> ``last.ckpt`` -> exit 143.

Data flow: signal (a flag, nothing else happens inside the handler) -> end of batch, all ranks agree -> checkpoint.
"""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_mm.decisions import decide

EXIT_CODE = 143
"""What a process that ended on SIGTERM returns."""


class Preemption(Callback):
    """Saves at an optimizer step, never inside one, so that the resumed run equals the uninterrupted one.

    Args:
        checkpoint: Where to save.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.stopped = False
        self._asked = False
        self._previous: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        try:
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:
            decide("preemption", "off", "signals reach the main thread only, and training runs in another")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = trainer.fit_loop.epoch_loop._accumulated_batches_reached() or trainer.is_last_batch
        if last and trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = self.stopped = True
            decide("preemption", f"stopped at step {trainer.global_step}", f"SIGTERM; go on with {self.checkpoint}")

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
