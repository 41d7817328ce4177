"""What every run has, whoever made its trainer: run folder, metrics.csv, report, checkpoints, progress, throughput.

Data flow: a trainer -> ``add_standard_callbacks`` (``MMModule.configure_callbacks`` calls it) -> the same trainer with
what it lacked; ``RunRecorder.setup`` then makes the run's folder, and all of them write there.
"""

import warnings
from collections.abc import Sequence

import lightning as L
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn

from lightning_mm.core.csv_logger import ResumableCSVLogger
from lightning_mm.core.decisions import log_decision
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.training.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from lightning_mm.training.callbacks.evaluation import HeldOutEvaluation
from lightning_mm.training.callbacks.progress import ProgressBar
from lightning_mm.training.callbacks.run_recorder import RunRecorder
from lightning_mm.training.callbacks.teardown import TeardownAfterException
from lightning_mm.training.callbacks.throughput import Throughput
from lightning_mm.training.checkpoint_file import CheckpointFile

_ORDER = (ProgressBar, Throughput, HeldOutEvaluation, LastCheckpoint, RunRecorder)
"""In this order their hooks are called, after those of all other callbacks: time is taken before the last evaluation,
and the report is written after all else."""
_NOTHING_NEW = (
    ".*in eval mode at the start of training",  # what is frozen is so on purpose, and the census shows it
    ".*isinstance.treespec, LeafSpec.*",  # at each step; between Lightning 2.6.6 and torch 2.13
    ".*the hooks will not be called on every batch",  # GradientAccumulationScheduler: our optimizer_step needs no more
    "You requested to overfit but enabled",  # overfit_batches
)
"""Warnings of Lightning about what is meant to be so."""
_DEFAULTS = (ModelCheckpoint, RichProgressBar, TQDMProgressBar, ModelSummary, RichModelSummary)
"""Callbacks that Lightning puts into a trainer which was given none of their kind."""


def add_standard_callbacks(trainer: L.Trainer) -> None:
    """Give a trainer what every run has and it lacks; what the user gave it stays.

    ``Trainer(enable_progress_bar=False)`` has no bar, ``enable_checkpointing=False`` no checkpoints, ``logger=False``
    no metrics.csv, and ``barebones=True`` nothing of all this, not even a folder. To set an option of one of these
    parts, pass it to the trainer: ``L.Trainer(callbacks=[RunRecorder(name="mine"), LastCheckpoint(every=50)])``.

    Args:
        trainer: The trainer, about to run a fit or another verb; its lists of callbacks and loggers are replaced.
    """
    for message in _NOTHING_NEW:
        warnings.filterwarnings("ignore", message=message)
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one of the user's
        trainer.strategy.checkpoint_io = CheckpointFile()
    if trainer.barebones:
        log_decision("trainer.barebones", "no run folder, report or checkpoint", "nothing may run beside training")
        return
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its callback connector
    left_out = [callback for callback in callbacks if _is_default(callback)]
    missing = _missing(callbacks, left_out, trainer.state.fn == TrainerFn.FITTING, _validates(trainer))
    replaced = [callback for callback in callbacks if isinstance(callback, TeardownAfterException)]  # by the module's
    kept = [callback for callback in callbacks if callback not in (*left_out, *replaced)]
    trainer.callbacks = sorted([*kept, *missing], key=_position)  # type: ignore[attr-defined]
    _add_metrics_file(trainer)
    if left_out:
        names = ", ".join(type(callback).__name__ for callback in left_out)
        why = "the census, one bar for the whole run and last.ckpt say and keep more; one with options of yours stays"
        log_decision("trainer.callbacks", f"without Lightning's default {names}", why)


def _missing(
    callbacks: Sequence[Callback], left_out: Sequence[Callback], fits: bool, validates: bool
) -> list[Callback]:
    """What is missing of ``add_standard_callbacks``.

    Args:
        callbacks: All callbacks of the trainer.
        left_out: Those of them that are replaced.
        fits: Whether the trainer is about to fit.
        validates: Whether the fit validates.
    """

    def has(kind: type[Callback]) -> bool:
        return any(isinstance(callback, kind) for callback in callbacks if callback not in left_out)

    missing: list[Callback] = []
    if not has(LightningProgressBar) and any(isinstance(each, LightningProgressBar) for each in left_out):
        missing.append(ProgressBar())
    if not has(Throughput):
        missing.append(Throughput())
    if fits and not has(HeldOutEvaluation):
        missing.append(HeldOutEvaluation())
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):  # else checkpointing is disabled
        if not has(LastCheckpoint):
            missing.append(LastCheckpoint())
        if fits and validates and not has(BestCheckpoint):
            missing.append(BestCheckpoint())
    if not has(RunRecorder):
        missing.append(RunRecorder())
    return missing


def _validates(trainer: L.Trainer) -> bool:
    """Whether the trainer's fit validates, so that there can be a best checkpoint."""
    data = trainer.datamodule  # type: ignore[attr-defined]  # set by its data connector
    if isinstance(data, MMDataModule):
        return data.paths["val"] is not None
    return trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()


def _position(callback: Callback) -> int:
    """Place in the order of hooks; others come first. Lightning itself moves ``ModelCheckpoint``s to the end."""
    return next((place for place, kind in enumerate(_ORDER) if isinstance(callback, kind)), -1)


def keep_all(trainer: L.Trainer) -> None:
    """Say that the trainer's callbacks were all asked for, also those that are as Lightning would make them."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its callback connector
    for callback in callbacks:
        vars(callback)["asked_for"] = True  # and so it is no more like one without options


def _is_default(callback: Callback) -> bool:
    """Whether Lightning made the callback itself, or the user one that is no different."""
    return type(callback) in _DEFAULTS and vars(callback) == vars(type(callback)())


def _add_metrics_file(trainer: L.Trainer) -> None:
    """Add our CSV logger beside the user's loggers, or in place of the one that Lightning makes by default."""
    loggers = list(trainer.loggers)
    if not loggers or any(isinstance(logger, (ResumableCSVLogger, DummyLogger)) for logger in loggers):
        return
    kept = [logger for logger in loggers if not _is_default_csv(logger, trainer)]
    if len(kept) < len(loggers):
        log_decision("trainer.logger", "metrics.csv of the run's folder", "in place of Lightning's lightning_logs/")
    trainer.loggers = [*kept, ResumableCSVLogger()]


def _is_default_csv(logger: object, trainer: L.Trainer) -> bool:
    return (
        type(logger) is CSVLogger
        and logger.name == "lightning_logs"
        and logger.save_dir == str(trainer.default_root_dir)
    )
