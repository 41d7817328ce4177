"""Where the time of a run goes: training (waiting for data as a part of it), validation, looks inside, checkpoints.

Data flow: the loader, the callbacks that know what they cost, and the wall clock -> ``Clock.spent`` -> differences.
"""

import time
from dataclasses import astuple, dataclass

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_mm.callbacks.inspecting import InspectingCallback
from lightning_mm.callbacks.saving import LastCheckpoint
from lightning_mm.data.loader import GuardedLoader
from lightning_mm.tuning.peak import wait_for


@dataclass(frozen=True)
class Spent:
    """Seconds up to some moment; only differences mean anything.

    Args:
        wall: All of them.
        waiting: Waiting for the next training batch; training time.
        validation: From its start to the next step, but for waiting: scores, ``best.ckpt`` and the report are in it.
        looks: Looking inside.
        checkpoints: Writing ``last.ckpt``.
    """

    wall: float
    waiting: float
    validation: float
    looks: float
    checkpoints: float

    @property
    def training(self) -> float:
        """What is left for training."""
        return self.wall - self.validation - self.looks - self.checkpoints

    def since(self, earlier: "Spent") -> "Spent":
        """What was spent in between."""
        pairs = zip(astuple(self), astuple(earlier), strict=True)
        return Spent(*(max(0.0, late - early) for late, early in pairs))

    def __str__(self) -> str:
        parts = {"validation": self.validation, "looks inside": self.looks, "checkpoints": self.checkpoints}
        aside = "".join(f", {name} {seconds:.1f} s" for name, seconds in parts.items() if seconds)
        return f"{self.wall:.1f} s: training {self.training:.1f} s (waiting for data {self.waiting:.1f} s){aside}"


class Clock:
    """Reads what was spent; between ``leave`` and ``back`` all but waiting for data counts as validation."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._validation = 0.0
        self._left: tuple[float, float] | None = None

    def spent(self) -> Spent:
        """What was spent so far, once the device has done what it was told to."""
        wait_for(self._module.device)
        looks, saves = self._cost(InspectingCallback), self._cost(LastCheckpoint)
        return Spent(time.perf_counter(), self._waited(), self._validation, looks, saves)

    def leave(self) -> None:
        """What comes now is not training."""
        wait_for(self._module.device)
        self._left = time.perf_counter(), self._waited()

    def back(self) -> None:
        """Training goes on; without effect if it was never left."""
        if self._left is not None:
            began, waited = self._left
            self._validation += time.perf_counter() - began - (self._waited() - waited)
            self._left = None

    def _waited(self) -> float:
        loader = self._trainer.train_dataloader
        return loader.waited if isinstance(loader, GuardedLoader) else 0.0

    def _cost(self, kind: type[InspectingCallback] | type[LastCheckpoint]) -> float:
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
        return sum(callback.seconds for callback in callbacks if isinstance(callback, kind))
