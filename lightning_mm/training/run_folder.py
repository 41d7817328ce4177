"""The folder of one fit, and everything that writes into it.

Data flow: trainer -> ``make_run_folder`` (rank 0 makes it, every rank opens it) -> ``use_run_folder``: the trainer's
callbacks, checkpoints and our CSV logger write there.
"""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_mm.core.csv_logger import ResumableCSVLogger
from lightning_mm.core.distributed import all_gather_object, run_on_all_ranks
from lightning_mm.core.errors import UserError
from lightning_mm.core.run_directory import RunDirectory, WritesToRun


def make_run_folder(trainer: L.Trainer, root: str | Path, name: str | None, default: str) -> RunDirectory:
    """A folder that no other run has: rank 0 makes it, and all ranks return it. A collective call.

    Args:
        trainer: The trainer of the run, after its process group is there.
        root: The folder of all runs.
        name: What the user calls the run; None: ``default``. A name that is taken gets -2, -3, ...
        default: The name where the user gives none.

    Raises:
        UserError: On all ranks, if rank 0 cannot make it.
    """
    made, failure = run_on_all_ranks(
        lambda: RunDirectory.create(root, name, default) if trainer.is_global_zero else None
    )
    if isinstance(failure, UserError):
        raise failure
    if failure:
        raise RuntimeError(f"the run directory could not be made: {failure}")
    run: RunDirectory = all_gather_object(made)[0]
    return run


def use_run_folder(trainer: L.Trainer, run: RunDirectory, earlier: RunDirectory | None = None) -> None:
    """Let all parts of a trainer write into a run's folder.

    Checkpoints go to its ``checkpoints/``, those of a ``ModelCheckpoint`` too, unless the user gave it a ``dirpath``.

    Args:
        trainer: The trainer.
        run: The run's folder.
        earlier: Folder of this trainer's run before; None (default) if there was none.
    """
    for logger in trainer.loggers:
        if isinstance(logger, ResumableCSVLogger):
            logger.write_to(run.metrics)
    ours = (None, str(earlier.checkpoints)) if earlier is not None else (None,)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its callback connector
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath in ours:
            callback.dirpath = str(run.checkpoints)
        if isinstance(callback, WritesToRun):
            callback.run = run
