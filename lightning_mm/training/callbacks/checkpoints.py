"""Checkpoint callbacks: Lightning's ModelCheckpoint, with files that resume exactly however a run ends.

Data flow: a step, with its validation and its row of metrics.csv -> ``last.ckpt`` every n steps; end of a step -> at
the last step, at an early end, on a signal and after an exception; end of a validation -> ``best.ckpt``.
``training.resume_point`` makes each of them one of a complete step; what was left to do behind that step,
``training.unfinished`` does.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.call import _call_callbacks_state_dict

from lightning_mm.core.decisions import log
from lightning_mm.core.errors import UserError
from lightning_mm.planning.devices import synchronize
from lightning_mm.training.callbacks.stop_signals import StopSignals
from lightning_mm.training.checkpoint_file import read_checkpoint
from lightning_mm.training.resume_point import at_step_end
from lightning_mm.training.unfinished import (
    AfterStep,
    finish_training,
    left_after,
    validate_now,
    validation_is_due,
)


class LastCheckpoint(ModelCheckpoint):
    """Saves ``checkpoints/last.ckpt`` every n steps, and where the run ends, however it ends.

    What is saved is the last complete optimizer step. SIGTERM, SIGHUP and Ctrl-C end the run after the step that they
    fall into, outside of steps at once; a second one ends it at once everywhere.

    Args:
        every: Optimizer steps between saves; default 200.

    Attributes:
        seconds: Seconds spent on saving so far.
    """

    def __init__(self, every: int = 200) -> None:
        if every < 1:
            raise UserError(f"run.save_every is {every}.", "It counts optimizer steps.", "Give 1 or more.")
        super().__init__(filename="last", every_n_train_steps=every, enable_version_counter=False)
        self.every = every
        self.seconds = 0.0
        self._signals = StopSignals()
        self._started = self._due = False
        self._left = AfterStep()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._started = self._due = False
        self._left = AfterStep()
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        finish_training(trainer, self._left)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_global_step_saved, self._started = trainer.global_step, True
        self._signals.install()
        if self._left.ends and not Path(self._path()).is_file():  # it goes on in a new folder
            self._save(trainer, again=True)
        if self._left.validate:
            validate_now(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._due:
            self._save(trainer)
        self._due = self._signals.at_once = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_end(trainer):
            return
        asked = self._signals.received is not None or trainer.received_sigterm
        stop = trainer.strategy.reduce_boolean_decision(asked, all=False)
        self._left = AfterStep(validation_is_due(trainer), _is_last(trainer), _stops_early(trainer))
        # Not yet: the validation of this step and its row of metrics.csv come next, and are a part of what is saved.
        self._due = trainer.global_step - self._last_global_step_saved >= self.every
        if stop or self._left.ends:
            self._save(trainer)
        if stop:
            self._stop(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals.at_once = trainer.world_size == 1  # ranks stop together, after a step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._left = AfterStep(False, self._left.last, _stops_early(trainer))
        if self._left.ends:
            self._save(trainer, again=True)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals.at_once = False  # what the callbacks make of the validation belongs to it

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals.at_once = trainer.world_size == 1
        if _stops_early(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._left = AfterStep()
        self._save(trainer)
        self._note_end(trainer)
        self._signals.remove()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._started:  # a run that is resumed at its end trains no step, and has a checkpoint all the same
            self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._signals.remove()
        if not self._started:  # nothing is trained, and the folder of the run may be gone
            return
        step = trainer.global_step
        if self._should_skip_saving_checkpoint(trainer) or not trainer.optimizers:
            pass
        elif not pl_module.resume_point.weights_are_whole:  # type: ignore[union-attr]  # an MMModule
            log.warning("step %d was left in the middle of its update: it is not saved", step + 1)
            return
        elif isinstance(trainer.strategy, (DDPStrategy, SingleDeviceStrategy)):
            # Not trainer.save_checkpoint: its barrier waits for ranks that may be gone.
            path = self._path()
            trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(), path)
            self._last_global_step_saved = step
        if self._last_global_step_saved == step and Path(self._path()).is_file():
            log.info("stopped at step %d; go on with --ckpt_path %s", step, self._path())

    def save_before_step(self, trainer: L.Trainer) -> Path:
        """Save the state before a step that is not done, on all ranks, unless it is saved; returns the file."""
        path = Path(self._path())
        self._save(trainer, again=not path.is_file())
        return path

    def state_dict(self) -> dict[str, Any]:
        return {"left": asdict(self._left)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was left to do behind the step that was saved, not Lightning's names of files."""
        self._left = AfterStep(**state_dict.get("left", {}))

    def _path(self) -> str:
        return self.format_checkpoint_name({})

    def _save(self, trainer: L.Trainer, again: bool = False) -> None:
        """Save the state, unless this step is saved already; ``again``: also then, for more of it is done."""
        if again:
            self._last_global_step_saved = -1
        if self._should_skip_saving_checkpoint(trainer):
            return
        synchronize(trainer.strategy.root_device)
        began = time.perf_counter()
        self.last_model_path = self.best_model_path = self._path()
        self._save_checkpoint(trainer, self.last_model_path)
        self.seconds += time.perf_counter() - began

    def _note_end(self, trainer: L.Trainer) -> None:
        """Let the file of the last step say that nothing is left to do, and hold what callbacks have found since.

        Its weights stay: a callback may have put others into the model at the end, such as an average.
        """
        path = Path(self._path())
        if not trainer.is_global_zero or not path.is_file():
            return
        saved = read_checkpoint(path)
        if not left_after(saved).ends:
            return
        saved["callbacks"] = _call_callbacks_state_dict(trainer)
        trainer.strategy.checkpoint_io.save_checkpoint(saved, path)

    def _stop(self, trainer: L.Trainer) -> None:
        """End the run, after a signal that this rank or another one got."""
        self._signals.received = self._signals.received or 15
        self._signals.stop()


class BestCheckpoint(ModelCheckpoint):
    """Saves ``checkpoints/best.ckpt`` of the run by validation loss."""

    def __init__(self) -> None:
        super().__init__(
            filename="best",
            monitor="val/loss",
            save_top_k=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the best score of a checkpoint only if its file is in this run's folder; a resumed run has its own."""
        if state_dict.get("dirpath") == self.dirpath:
            super().load_state_dict(state_dict)
            self.current_score = state_dict.get("current_score")  # Lightning leaves it out


def _stops_early(trainer: L.Trainer) -> bool:
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def _is_last(trainer: L.Trainer) -> bool:
    if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return last_epoch and trainer.is_last_batch
