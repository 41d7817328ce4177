"""How many optimizer steps a run has, for its learning-rate schedule, bar and settings; and why it had fewer.

Data flow: limits of the trainer and batches of an epoch (and a ``GradientAccumulationScheduler``) -> optimizer steps.
"""

import math

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, GradientAccumulationScheduler, Timer


def total_steps(trainer: L.Trainer) -> int | None:
    """Optimizer steps of the whole run; None where neither steps nor epochs are bounded.

    Lightning's own estimate takes the accumulation of the first epoch for that of all.

    Args:
        trainer: The trainer, with its training loader.
    """
    estimated = trainer.estimated_stepping_batches
    if not math.isfinite(estimated) or estimated < 0:
        return None
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its callback connector
    schedulers = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if not schedulers or epochs is None or epochs < 0 or not math.isfinite(batches):
        return int(estimated)
    steps = sum(math.ceil(batches / schedulers[0].get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)


def early_end(trainer: L.Trainer) -> str | None:
    """Why a run was ended before its last step; None if nothing has asked for that.

    Args:
        trainer: The trainer, at the end of its training.
    """
    total = total_steps(trainer)
    if not trainer.should_stop or (total is not None and trainer.global_step >= total):
        return None
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its callback connector
    for callback in callbacks:
        # A resumed run holds the reason and the epoch of an earlier stop; an epoch that ended is counted already.
        stopped_now = isinstance(callback, EarlyStopping) and callback.stopped_epoch >= trainer.current_epoch - 1
        if isinstance(callback, EarlyStopping) and stopped_now and callback.stopping_reason_message:
            return f"EarlyStopping: {' '.join(callback.stopping_reason_message.split())}"
        if isinstance(callback, Timer) and (callback.time_remaining() or 0.0) < 0:
            return "its time is over (trainer.max_time, or a Timer)"
    return "trainer.should_stop was set"
