"""What a run had left to do behind the step that its checkpoint is of: a validation, and what comes after training.

Data flow: end of a step -> ``AfterStep`` in the checkpoint -> the run that goes on: ``validate_now`` before its first
batch; ``finish_training``, where no step is left.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop

from lightning_mm.core.decisions import log_decision


@dataclass(frozen=True)
class AfterStep:
    """What is left to do behind a step.

    Args:
        validate: The step's validation.
        last: It is the run's last step: what comes after training (the last look, the evaluation, the report) is left.
        stopped: The run was ended early, and the same is left.
    """

    validate: bool = False
    last: bool = False
    stopped: bool = False

    @property
    def ends(self) -> bool:
        """Whether no step follows."""
        return self.last or self.stopped


def left_after(checkpoint: Mapping[str, Any]) -> AfterStep:
    """What a checkpoint says is left to do behind its step.

    Args:
        checkpoint: A loaded checkpoint.
    """
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, Mapping)]
    return next((AfterStep(**state["left"]) for state in states if "left" in state), AfterStep())


class _FinishingLoop(_FitLoop):
    """A loop that trains no step, and calls the hooks of a start and an end of training all the same."""

    @property
    def skip(self) -> bool:
        return False


def validation_is_due(trainer: L.Trainer) -> bool:
    """Whether Lightning validates after the step that has just ended."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def validate_now(trainer: L.Trainer) -> None:
    """Validate as the training loop does after a step; for ``on_train_start``.

    Args:
        trainer: The trainer of a run that goes on.
    """
    log_decision("ckpt_path", "validates first", f"the run was stopped in the validation of step {trainer.global_step}")
    trainer.validating = True
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # the batches that it counts are those of the validation before
    loop.run()
    trainer.training = True


def finish_training(trainer: L.Trainer, left: AfterStep) -> None:
    """Let a run whose steps are done do what comes after training; for ``on_fit_start``.

    Args:
        trainer: The trainer of a run that goes on; with more steps than before it trains them first.
        left: What was left to do.
    """
    if left.ends:
        log_decision("ckpt_path", "does what comes after training", "the run was stopped behind its last step")
        trainer.should_stop = left.stopped
        trainer.fit_loop.__class__ = _FinishingLoop
