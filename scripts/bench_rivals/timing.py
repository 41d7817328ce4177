"""The stopwatch as a Lightning callback: ``--trainer.callbacks+=bench_rivals.timing.Timing``.

Data flow: the trainer's hooks -> ``Stopwatch``; rank 0 writes.
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from bench_rivals.stopwatch import Stopwatch
from lightning_mm.core import metric_names
from lightning_mm.data.batch import Batch


class Timing(Callback):
    """Stands before the product's own callbacks: what they do at the end of a step counts to the next one."""

    def __init__(self) -> None:
        self.watch = Stopwatch.of_job()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.watch.begin()
        self.watch.look(batch.inputs, batch.targets)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.watch.end(trainer.callback_metrics[metric_names.TRAIN_LOSS].clone())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.watch.write()
