"""Why a run had fewer steps than it was to have: said where it was stopped, and only then."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping

from lightning_mm.training.callbacks.checkpoints import LastCheckpoint
from lightning_mm.training.run_length import early_end, total_steps
from lightning_mm.tuning.optimizer import OptimizerSettings
from tests.helpers.data import Data, Family
from tests.helpers.training import MIDDLE, train

CONSTANT = OptimizerSettings(schedule="constant", warmup=0)


class Reads(Callback):
    """Records why the run ends; stops it after the step ``stop_at``, if given."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop |= trainer.global_step == self.stop_at

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.why, self.total = early_end(trainer), total_steps(trainer)


def run(family: Family, data: Data, folder: Path, reads: Reads, *callbacks: Callback, **options: Any) -> Reads:
    train(family("llava"), data, folder, tuning=MIDDLE, optimizer=CONSTANT, callbacks=[reads, *callbacks], **options)
    return reads


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*:UserWarning")
def test_a_resumed_run_is_not_ended_by_what_ended_the_run_before(family: Family, data: Data, tmp_path: Path) -> None:
    class Patient(EarlyStopping):
        """Waits 50 validations longer than the run before, whose state it takes over."""

        def on_train_start(self, *_: Any) -> None:
            self.patience += 50

    never_better = {"monitor": "val/loss", "min_delta": 100.0, "patience": -49}
    options = {"max_steps": 100, "limit_val_batches": 1}
    first = run(family, data, tmp_path / "a", Reads(), Patient(**never_better), LastCheckpoint(), **options)
    assert str(first.why).startswith("EarlyStopping: ")
    (checkpoint,) = (tmp_path / "a").rglob("last.ckpt")
    rest = run(family, data, tmp_path / "b", Reads(13), Patient(**never_better), ckpt_path=checkpoint, **options)
    assert rest.why == "trainer.should_stop was set"


def test_a_stop_at_the_last_step_ends_nothing_early(family: Family, data: Data, tmp_path: Path) -> None:
    assert run(family, data, tmp_path, Reads(2), max_steps=2).why is None


def test_a_run_without_bounds_has_no_total(family: Family, data: Data, tmp_path: Path) -> None:
    reads = run(family, data, tmp_path, Reads(2), max_steps=-1, max_epochs=-1)
    assert reads.total is None
    assert reads.why == "trainer.should_stop was set"
