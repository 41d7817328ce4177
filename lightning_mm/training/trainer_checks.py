"""What a trainer may not do to a run of ours: refused when a run starts, before its folder is made.

Data flow: the trainer's options and callbacks -> ``check_trainer`` -> ``UserError`` that says what to use instead.
"""

import difflib

import lightning as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.finetuning import BaseFinetuning
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_mm.core import metric_names
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.training.callbacks.checkpoints import BestCheckpoint

_OURS = ("lightning.", "lightning_mm.")
"""Where code that is not the user's comes from."""
_REFUSED: dict[type[Callback], tuple[str, str]] = {
    BaseFinetuning: ("It thaws weights that the policy froze.", "Say by model.tuning what trains."),
    ModelPruning: ("It changes weights that the policy froze.", "Prune the exported model."),
    StochasticWeightAveraging: (
        "It copies the module before the model is loaded, and would average nothing.",
        "Use WeightAveraging, which computes the same average, and model.optimizer.schedule constant.",
    ),
    BatchSizeFinder: (
        "It would make the loader anew while the run's order of samples is fixed.",
        "Ask `lightning-mm plan` what a data.batch_size needs.",
    ),
    LearningRateFinder: (
        "It replaces the schedule, and regions have learning rates of their own.",
        "Compare short runs with several model.optimizer.lr (trainer.max_steps 50).",
    ),
}


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse what would give wrong results or fail later.

    Args:
        trainer: The trainer, about to run.

    Raises:
        UserError: An option or a callback does not go with this module.
    """
    check_precision(str(trainer.precision))
    _check_numbers(trainer)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its callback connector
    for callback in callbacks:
        for kind, (why, fix) in _REFUSED.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: {type(callback).__name__} cannot be used.", why, fix)
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise UserError(
            f"trainer.strategy: {type(trainer.strategy).__name__} cannot be used.",
            "Gradients are divided by the tokens of all ranks, which it keeps in pieces.",
            "Use auto (one device) or ddp.",
        )
    _check_names(trainer.lightning_module, callbacks)
    _check_accumulation(trainer, callbacks)
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, MMDataModule) and (data.paths["val"] is None or not trainer.limit_val_batches):
        _check_monitors(callbacks)
    connector = trainer._accelerator_connector
    if trainer.world_size > 1 and connector.use_distributed_sampler and isinstance(trainer.datamodule, MMDataModule):  # type: ignore[attr-defined]
        connector.use_distributed_sampler = False
        log_decision("trainer.use_distributed_sampler", "false", "the data module deals out samples itself")


def check_precision(precision: str) -> None:
    """Refuse a precision that would give wrong results.

    Args:
        precision: As the user or the trainer names it; a trainer on a CPU takes bf16-mixed where 16-mixed was asked.

    Raises:
        UserError: It is not supported.
    """
    if precision not in ("32-true", "32", "bf16-mixed", "bf16"):
        raise UserError(
            f"trainer.precision: {precision} is not supported.",
            "It would cast what must stay in float32 (rotary tables, summed losses).",
            "Use 32-true or bf16-mixed; for bfloat16 weights, 32-true with model.backbone.dtype bfloat16.",
        )


def _check_numbers(trainer: L.Trainer) -> None:
    """Refuse numbers that Lightning takes, and that turn a step into nonsense."""
    clip = trainer.gradient_clip_val
    if clip is not None and clip < 0:
        raise UserError(
            f"trainer.gradient_clip_val: {clip} is negative.", "It would turn the gradient around.", "Use 1.0, say."
        )
    if trainer.accumulate_grad_batches < 1:
        raise UserError(
            f"trainer.accumulate_grad_batches: {trainer.accumulate_grad_batches} is no number of batches.",
            "An optimizer step needs one at least.",
            "Use 1 or more.",
        )


def _check_accumulation(trainer: L.Trainer, callbacks: list[Callback]) -> None:
    """Refuse two that say how many batches a step has; Lightning would do so after the model is loaded."""
    schedules = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
    if schedules and trainer.accumulate_grad_batches != 1:
        raise UserError(
            "GradientAccumulationScheduler and trainer.accumulate_grad_batches both say how many batches a step has.",
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}.",
            "Leave it at 1; the callback's scheduling {0: N} begins with N.",
        )


def _monitor(callback: Callback) -> str | None:
    """The metric that a callback of the user waits for."""
    own = isinstance(callback, (EarlyStopping, ModelCheckpoint)) and not isinstance(callback, BestCheckpoint)
    return callback.monitor if own else None  # type: ignore[attr-defined]  # both have it


def _check_names(module: L.LightningModule, callbacks: list[Callback]) -> None:
    """Refuse a metric by the name that it has elsewhere (val_loss); Lightning would fail after an epoch.

    Code of the user may log one of that name: where there is any, nothing is refused.
    """
    if not all(type(part).__module__.startswith(_OURS) for part in (module, *callbacks)):
        return
    spelled = {name.replace("/", "").replace("_", ""): name for name in metric_names.FIXED}
    for callback in callbacks:
        watched = _monitor(callback)
        if watched is None or metric_names.lookup(watched) is not None:
            continue
        near = difflib.get_close_matches(watched.replace("/", "").replace("_", "").lower(), spelled, n=1, cutoff=0.85)
        if near:
            raise UserError(
                f"{type(callback).__name__} watches {watched}, which is not logged.",
                "Names of metrics have their stage in front of a slash.",
                f"Did you mean {spelled[near[0]]}?",
            )


def _check_monitors(callbacks: list[Callback]) -> None:
    """Refuse a callback that waits for a validation where there is none; Lightning would fail after an epoch."""
    for callback in callbacks:
        watched = _monitor(callback)
        if watched is not None and watched.startswith("val/"):
            raise UserError(
                f"{type(callback).__name__} watches {watched}, and the run does not validate.",
                "It has no data.val, or trainer.limit_val_batches is 0.",
                "Give --data.val FILE, or watch train/loss.",
            )
