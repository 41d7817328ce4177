"""How fast training goes: supervised tokens and samples per second, validation and looks inside kept apart.

Data flow: Batch sizes known on the host + the clock -> two metrics, logged with the trainer's own interval.
"""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_mm.callbacks.inspecting import InspectingCallback
from lightning_mm.dashboards import names
from lightning_mm.data.batch import Batch


class Throughput(Callback):
    """Rates over the steps since they were last logged, waiting for data included: this rank's, times the ranks."""

    def __init__(self) -> None:
        self._tokens = self._samples = 0
        self._since: float | None = None
        self._paused_at = 0.0
        self._looked = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self._since is None:
            self._since, self._looked = time.perf_counter(), _seconds_of_looks(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._since is not None:
            self._since += time.perf_counter() - self._paused_at

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._tokens += batch.num_supervised
        self._samples += len(batch)
        interval = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set by its logger connector
        if trainer.global_step == 0 or trainer.global_step % interval or self._since is None:
            return
        now, looked = time.perf_counter(), _seconds_of_looks(trainer)
        seconds = max(now - self._since - (looked - self._looked), 1e-9)
        pl_module.log(names.TOKENS_PER_SECOND, self._tokens * trainer.world_size / seconds, prog_bar=True)
        pl_module.log(names.SAMPLES_PER_SECOND, self._samples * trainer.world_size / seconds)
        self._tokens = self._samples = 0
        self._since, self._looked = now, looked


def _seconds_of_looks(trainer: L.Trainer) -> float:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its callback connector
    return sum(callback.seconds for callback in callbacks if isinstance(callback, InspectingCallback))
