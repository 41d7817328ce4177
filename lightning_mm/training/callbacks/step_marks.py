"""Marks along a fit for those who compare fits: the seconds of every step, and a checkpoint at one chosen step.

Data flow: end of an optimizer step -> its seconds, step_seconds.json in the run's folder; at the chosen step
``checkpoints/<name>.ckpt``.
"""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_json
from lightning_mm.core.run_directory import WritesToRun
from lightning_mm.planning.devices import synchronize
from lightning_mm.training.resume_point import at_step_end


class StepSeconds(Callback, WritesToRun):
    """Measures every optimizer step, from the end of the one before, waiting for data included.

    The device is synchronized once a step. The first step after a start or a resume has no beginning, and is left out.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._ended: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds, self._ended = [], None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_end(trainer):
            return
        synchronize(trainer.strategy.root_device)
        now = time.perf_counter()
        if self._ended is not None:
            self.seconds.append(now - self._ended)
        self._ended = now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.run is not None and trainer.is_global_zero:
            write_json(self.run.path / "step_seconds.json", self.seconds)


class CheckpointAt(Callback, WritesToRun):
    """Saves ``checkpoints/<name>.ckpt`` after one step.

    Args:
        step: Number of optimizer steps done.
        name: Of the file.
    """

    def __init__(self, step: int, name: str) -> None:
        if step < 1:
            raise UserError(f"The step of CheckpointAt is {step}.", "It counts optimizer steps.", "Give 1 or more.")
        self.step, self.name = step, name

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.run is not None and at_step_end(trainer) and trainer.global_step == self.step:
            trainer.save_checkpoint(self.run.checkpoints / f"{self.name}.ckpt")
