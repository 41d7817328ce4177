"""However a run ends, its last state is saved, and a run that goes on from it is the uninterrupted one, bit for bit."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint, Timer
from torch import Tensor

from lightning_mm.training.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from lightning_mm.training.callbacks.stop_signals import Preempted
from lightning_mm.training.module import MMModule
from lightning_mm.tuning.optimizer import OptimizerSettings
from tests.helpers.data import Data, Family, make_rows
from tests.helpers.training import DROPOUT, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*:UserWarning"),
    pytest.mark.skipif(
        "PYTEST_XDIST_WORKER" in os.environ, reason="sends signals to its process: scripts/test.sh runs it by itself"
    ),
]
CONSTANT = OptimizerSettings(lr=1e-2, schedule="constant", warmup=0)
"""Its learning rates do not depend on the length of the run."""
END = 9
"""Optimizer steps of the uninterrupted run: 12 rows, batches of 2, two micro-batches a step, three steps an epoch."""
Hook = Callable[[L.Trainer], None]


class At(Callback):
    """Does something at a hook, once a step is reached."""

    def __init__(self, hook: str, step: int, act: Hook) -> None:
        done: list[int] = []

        def call(trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step >= step and not done and not trainer.sanity_checking:
                done.append(step)
                act(trainer)

        setattr(self, hook, call)


def stop(trainer: L.Trainer) -> None:
    trainer.should_stop = True


def fail(_: L.Trainer) -> None:
    raise RuntimeError("broken")


def interrupt(_: L.Trainer) -> None:
    raise KeyboardInterrupt


def send(signum: int) -> Hook:
    return lambda _: os.kill(os.getpid(), signum)


def run_out_of_time(trainer: L.Trainer) -> None:
    (timer,) = (callback for callback in trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
    timer.load_state_dict({"time_elapsed": {"train": 7200.0}})


def never_better(**options: Any) -> EarlyStopping:
    return EarlyStopping("val/loss", min_delta=100.0, patience=1, **options)


VALIDATING = {"limit_val_batches": 2, "val_check_interval": 2}
WAYS: dict[str, tuple[Callable[[], list[Callback]], dict[str, Any], type[BaseException] | None]] = {
    "max_steps": (lambda: [], {"max_steps": 4}, None),
    "max_epochs": (lambda: [], {"max_steps": -1, "max_epochs": 1}, None),
    "EarlyStopping within an epoch": (lambda: [never_better()], VALIDATING, None),
    "EarlyStopping after an epoch": (lambda: [never_better()], {"limit_val_batches": 2}, None),
    "EarlyStopping on the training loss": (
        lambda: [EarlyStopping("train/loss", min_delta=100.0, patience=0, check_on_train_epoch_end=True)],
        {},
        None,
    ),
    "should_stop in a batch": (lambda: [At("on_train_batch_end", 2, stop)], {}, None),
    "should_stop before a batch": (lambda: [At("on_train_batch_start", 2, stop)], {}, None),
    "should_stop in a validation": (lambda: [At("on_validation_end", 2, stop)], VALIDATING, None),
    "Timer": (lambda: [Timer(duration={"hours": 1}), At("on_train_batch_start", 2, run_out_of_time)], {}, None),
    "max_time": (lambda: [At("on_train_batch_start", 2, run_out_of_time)], {"max_time": {"hours": 1}}, None),
    "exception before a batch": (lambda: [At("on_train_batch_start", 2, fail)], {}, RuntimeError),
    "exception in the backward pass": (lambda: [At("on_after_backward", 2, fail)], {}, RuntimeError),
    "exception after a batch": (lambda: [At("on_train_batch_end", 2, fail)], {}, RuntimeError),
    "exception in a validation": (lambda: [At("on_validation_batch_end", 2, fail)], VALIDATING, RuntimeError),
    "exception after training": (lambda: [At("on_train_end", 2, fail)], {"max_steps": 4}, RuntimeError),
    "KeyboardInterrupt": (lambda: [At("on_before_backward", 2, interrupt)], {}, SystemExit),
    "Ctrl-C": (lambda: [At("on_before_backward", 2, send(signal.SIGINT))], {}, SystemExit),
    "Ctrl-C in a validation": (
        lambda: [At("on_validation_batch_end", 2, send(signal.SIGINT))],
        VALIDATING,
        SystemExit,
    ),
    "SIGTERM": (lambda: [At("on_train_batch_start", 2, send(signal.SIGTERM))], {}, Preempted),
    "SIGTERM in a validation": (lambda: [At("on_validation_end", 2, send(signal.SIGTERM))], VALIDATING, Preempted),
    "SIGHUP": (lambda: [At("on_train_batch_end", 2, send(signal.SIGHUP))], {}, Preempted),
    "SIGUSR1": (lambda: [At("on_before_backward", 2, send(signal.SIGUSR1))], {}, Preempted),
    "SIGUSR2 in a validation": (
        lambda: [At("on_validation_batch_end", 2, send(signal.SIGUSR2))],
        VALIDATING,
        Preempted,
    ),
}


def weights(module: MMModule) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.trainable.items()}


class Kept(Callback):
    """Keeps the module, which a run that fails does not return."""

    module: MMModule

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, MMModule)
        self.module = pl_module


class Fit:
    """Fits of one module and data set, each in a folder of its own."""

    def __init__(self, model: Path, data: Data, folder: Path) -> None:
        self.model, self.data, self.folder = model, data, folder

    def __call__(self, name: str, *callbacks: Callback, **options: Any) -> tuple[dict[str, Tensor], Path]:
        kept = Kept()
        common = {"max_steps": END, "accumulate_grad_batches": 2, "tuning": DROPOUT, "optimizer": CONSTANT}
        try:
            train(
                self.model,
                self.data,
                self.folder / name,
                callbacks=[kept, *callbacks, LastCheckpoint(100)],
                **common | options,
            )
        finally:
            self.end = weights(kept.module)
        return self.end, self.checkpoint(name)

    def checkpoint(self, name: str, file: str = "last.ckpt") -> Path:
        return self.folder / name / "checkpoints" / file


@pytest.fixture(scope="module")
def fit(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    folder = tmp_path_factory.mktemp("ends")
    data = {}
    for seed, (split, count) in enumerate({"train": 12, "val": 4}.items()):
        data[split] = folder / f"{split}.json"
        data[split].write_text(json.dumps(make_rows(folder, count, seed=seed)))
    return Fit(family("llava"), data, folder)


@pytest.fixture(scope="module")
def whole(fit: Fit) -> dict[str, Tensor]:
    return fit("whole")[0]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", WAYS)
def test_the_end_is_saved_and_can_be_gone_on_from(way: str, fit: Fit, whole: dict[str, Tensor], tmp_path: Path) -> None:
    callbacks, options, raised = WAYS[way]
    fit.folder, before = tmp_path, signal.getsignal(signal.SIGINT)
    if raised is None:
        fit("ended", *callbacks(), **options)
    else:
        with pytest.raises(raised) as caught:
            fit("ended", *callbacks(), **options)
        assert caught.type is raised
    assert signal.getsignal(signal.SIGINT) == before
    at_end, path = fit.end, fit.checkpoint("ended")
    saved = torch.load(path, weights_only=True)
    assert 0 < saved["global_step"] < END
    assert same(saved["state_dict"], at_end)
    rest = {key: value for key, value in options.items() if key in VALIDATING}
    assert same(fit("rest", ckpt_path=path, **rest)[0], whole)


def test_best_and_the_users_own_checkpoints_are_of_complete_steps(
    fit: Fit, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    """A validation after three micro-batches falls between two steps; all files go into one folder."""
    fit.folder = tmp_path
    own = ModelCheckpoint(monitor="val/loss", filename="own", save_top_k=1)
    options = {"limit_val_batches": 2, "val_check_interval": 3, "max_steps": 2}
    fit("ended", own, BestCheckpoint(), **options)
    folder = fit.checkpoint("ended").parent
    assert sorted(file.name for file in folder.iterdir()) == ["best.ckpt", "last.ckpt", "own.ckpt"]
    for name in ("best", "own"):
        assert torch.load(folder / f"{name}.ckpt", weights_only=True)["global_step"] == 1
        assert same(fit(name, ckpt_path=folder / f"{name}.ckpt")[0], whole)


@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint available")
def test_lightnings_own_checkpoint_of_an_exception_is_gone_on_from(
    fit: Fit, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    """It is found without ``ckpt_path``, and taken away once a run with it has ended well."""
    fit.folder = tmp_path
    own, kept = OnExceptionCheckpoint(tmp_path / "own"), tmp_path / "own/on_exception.ckpt"
    with pytest.raises(RuntimeError):
        fit("ended", own, At("on_after_backward", 2, fail))  # in the first of two micro-batches
    assert same(torch.load(kept, weights_only=True)["state_dict"], fit.end)
    assert same(fit("rest", own)[0], whole)
    assert not kept.exists()


def test_an_update_that_was_left_in_its_middle_is_not_saved(fit: Fit, tmp_path: Path) -> None:
    class Torn(Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            optimizer = trainer.optimizers[0]

            def tear(*_: Any) -> None:
                if trainer.global_step == 1:
                    raise RuntimeError("out of memory, say")

            optimizer.register_step_post_hook(tear)

    fit.folder = tmp_path
    with pytest.raises(RuntimeError, match="out of memory"):
        fit("torn", Torn())
    assert not list(tmp_path.rglob("last.ckpt"))


def by_epoch(groups: list[dict[str, Any]]) -> dict[str, Any]:
    optimizer = torch.optim.SGD(groups, lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


@pytest.mark.parametrize("way", ["max_epochs", "EarlyStopping after an epoch"])
def test_a_schedule_by_epochs_goes_on(way: str, fit: Fit, tmp_path: Path) -> None:
    """Lightning moves such a schedule after everything that saves a checkpoint at the end of an epoch."""
    fit.folder = tmp_path
    whole = fit("whole", optimizer=by_epoch)[0]
    callbacks, options, _ = WAYS[way]
    every_epoch = ModelCheckpoint(filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit("ended", every_epoch, *callbacks(), optimizer=by_epoch, **options)
    for name in ("last", "epoch=0"):
        path = fit.checkpoint("ended", f"{name}.ckpt")
        assert same(fit(name, ckpt_path=path, optimizer=by_epoch)[0], whole), name


class Copied(Callback):
    """Copies last.ckpt at a hook, as a kill would leave it there."""

    def __init__(self, hook: str, path: Path) -> None:
        def copy(trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step and not trainer.sanity_checking:
                copyfile(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt", path)

        setattr(self, hook, copy)


class Counted(Callback):
    """Counts the ends of training and of validations."""

    def __init__(self) -> None:
        self.ends, self.validations = 0, []

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.ends += 1

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.validations.append(trainer.global_step)


@pytest.mark.parametrize("stopped_early", [False, True])
@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_train_end"])
def test_what_comes_after_training_is_done_by_the_run_that_goes_on(
    hook: str, stopped_early: bool, fit: Fit, tmp_path: Path
) -> None:
    """Killed in the validation of the last step, or behind it; done once, and not a second time."""
    fit.folder = tmp_path
    options = {"limit_val_batches": 2, "val_check_interval": 4, "max_steps": END if stopped_early else 2}
    stops = [At("on_train_batch_end", 2, stop)] if stopped_early else []
    fit("killed", *stops, Copied(hook, tmp_path / "copy.ckpt"), **options)
    counted, again = Counted(), Counted()
    fit("rest", counted, ckpt_path=tmp_path / "copy.ckpt", **options)
    assert (counted.ends, counted.validations) == (1, [2] if hook == "on_validation_batch_end" else [])
    assert same(fit.end, torch.load(tmp_path / "copy.ckpt", weights_only=True)["state_dict"])
    if not stopped_early:
        fit("again", again, ckpt_path=fit.checkpoint("rest"), **options)
        assert (again.ends, again.validations) == (0, [])


def test_a_validation_that_a_signal_stopped_is_made_before_the_next_step(fit: Fit, tmp_path: Path) -> None:
    fit.folder = tmp_path
    with pytest.raises(Preempted):
        fit("killed", At("on_validation_batch_end", 2, send(signal.SIGTERM)), **VALIDATING)
    counted, whole = Counted(), Counted()
    fit("rest", counted, ckpt_path=fit.checkpoint("killed"), **VALIDATING)
    fit("whole", whole, **VALIDATING)
    assert [step for step in whole.validations if step >= 2] == counted.validations


def test_a_periodic_checkpoint_holds_the_validation_of_its_step(fit: Fit, tmp_path: Path) -> None:
    fit.folder = tmp_path
    counted = Counted()
    copied = Copied("on_train_batch_end", tmp_path / "copy.ckpt")
    copied.on_train_batch_end = lambda trainer, *_: (  # type: ignore[method-assign,assignment]
        trainer.global_step == 3 and copyfile(fit.checkpoint("killed"), tmp_path / "copy.ckpt")
    )
    fit("killed", LastCheckpoint(2), copied, limit_val_batches=2, val_check_interval=4, max_steps=5)
    assert torch.load(tmp_path / "copy.ckpt", weights_only=True)["global_step"] == 2
    fit("rest", counted, ckpt_path=tmp_path / "copy.ckpt", limit_val_batches=2, val_check_interval=4, max_steps=5)
    assert counted.validations == [5]
