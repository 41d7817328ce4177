"""What the command line adds to the trainer's own options: loggers, callbacks, plugins.

Data flow: ``trainer.*`` as the user gave it (one object, a list, a bool, nothing) -> lists with ours beside the user's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar

from lightning_mm.callbacks.base import LayerCallback
from lightning_mm.core.csv_logger import ResumableCSVLogger
from lightning_mm.core.errors import UserError
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.wandb import OnlineLogger
from lightning_mm.training.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from lightning_mm.training.callbacks.evaluation import HeldOutEvaluation
from lightning_mm.training.callbacks.progress import ProgressBar
from lightning_mm.training.callbacks.run_recorder import RunRecorder
from lightning_mm.training.checkpoint_file import LoadedCheckpoint

Part = TypeVar("Part")


def as_list(given: Sequence[Part] | Part | bool | None) -> list[Part]:
    """An option that may be one object, several, a bool or nothing, as a list of objects."""
    if given is None or isinstance(given, bool):
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]  # type: ignore[list-item]


def loggers(given: Any, run: RunDirectory, mode: Any, project: str | None) -> list[Any]:
    """metrics.csv, W&B where it is wanted, and the user's own loggers.

    Args:
        given: ``trainer.logger``; False leaves out W&B too.
        run: The run's folder.
        mode: ``run.wandb``.
        project: ``run.project``.
    """
    ours: list[Any] = [ResumableCSVLogger(run.metrics)]
    if given is not False and mode != "off":
        ours.append(OnlineLogger(run.path, mode=mode, run_id=run.id, name=run.name, project=project))
    return ours + as_list(given)


def callbacks(
    options: Namespace, run: RunDirectory, save_every: int, evaluation: HeldOutEvaluation | None, validates: bool
) -> list[Callback]:
    """The user's callbacks, and those of ours that have options; the module adds what every run has beside.

    Args:
        options: ``trainer``: ``callbacks``, ``enable_progress_bar``, ``enable_checkpointing``.
        run: The run's folder.
        save_every: Optimizer steps between writes of last.ckpt.
        evaluation: Asks the held-out questions; None: the verb is not ``fit``.
        validates: Whether the run validates.
    """
    given: list[Callback] = as_list(options.get("callbacks"))
    _refuse_duplicates([callback for callback in given if isinstance(callback, LayerCallback)])
    made: list[Callback] = [RunRecorder(run)]
    if options.get("enable_progress_bar") is not False:
        made.append(ProgressBar())
    if evaluation is not None:
        made.append(evaluation)
        if options.get("enable_checkpointing") is not False:
            made.append(LastCheckpoint(save_every))
            if validates:
                made.append(BestCheckpoint())
    return given + [each for each in made if not any(_replaces(own, each) for own in given)]


def plugins(given: Any, resumed: Path | None, checkpoint: dict[str, Any] | None) -> list[Any]:
    """The user's plugins, one that hands on a checkpoint that is read already, and a SLURM that does not requeue.

    Args:
        given: ``trainer.plugins``.
        resumed: Path of the checkpoint; None: none is loaded.
        checkpoint: Its content.
    """
    made = as_list(given)
    if resumed is not None and checkpoint is not None and not any(isinstance(each, CheckpointIO) for each in made):
        made.append(LoadedCheckpoint(resumed, checkpoint))
    if SLURMEnvironment.detect():
        # Lightning would save inside the signal handler, where ranks can deadlock.
        made.append(SLURMEnvironment(auto_requeue=False))
    return made


def _replaces(given: Callback, ours: Callback) -> bool:
    """Whether a callback of the user takes the place of one of ours."""
    bars = isinstance(given, LightningProgressBar) and isinstance(ours, ProgressBar)
    return bars or isinstance(given, type(ours))


def _refuse_duplicates(inspecting: Sequence[LayerCallback]) -> None:
    """Refuse two callbacks of one class: Lightning keeps callback states by class."""
    kinds = [type(callback).__name__ for callback in inspecting]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise UserError(
                f"trainer.callbacks names {kind} {kinds.count(kind)} times.",
                "A run keeps the clock and the findings of one of each kind.",
                f"Name {kind} once: leave out one of the files, or set trainer.callbacks in place of callbacks+.",
            )
