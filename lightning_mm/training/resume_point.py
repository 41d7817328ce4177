"""Where a run can be resumed exactly: after its last complete optimizer step.

Data flow: end of an optimizer step -> ``ResumePoint.record`` (positions of the loops, random generators; no weights).
A checkpoint that is saved later than that and before the next step (inside an accumulation window, after an exception,
at the end of an epoch) gets these in place of the present ones: its weights are still those of that step. In the first
step of a process, the positions are those with which it began.
"""

from copy import deepcopy
from typing import Any

import lightning as L

from lightning_mm.core.distributed import all_gather_object
from lightning_mm.core.random_state import rng_state


class ResumePoint:
    """Positions of the loops and random generators of this rank after the last complete optimizer step.

    Attributes:
        rng: The generators; empty before the first batch.
    """

    def __init__(self) -> None:
        self._step = -1
        self._loops: dict[str, Any] = {}
        self.rng: dict[str, Any] = {}
        self._updating = False

    def begin(self, trainer: L.Trainer) -> None:
        """Remember the positions with which training begins, or goes on."""
        loops = deepcopy(trainer._checkpoint_connector._get_loops_state_dict())
        self._step, self._loops, self.rng, self._updating = trainer.global_step, loops, {}, False

    def begin_batch(self) -> None:
        """Remember the generators as the first batch finds them; later batches change nothing."""
        self.rng = self.rng or rng_state()

    def record(self, trainer: L.Trainer) -> None:
        """Remember this moment, if it is the end of an optimizer step."""
        if at_step_end(trainer):
            loops = deepcopy(trainer._checkpoint_connector._get_loops_state_dict())
            self._step, self._loops, self.rng = trainer.global_step, loops, rng_state()

    def begin_update(self) -> None:
        """Say that the optimizer now changes weights."""
        self._updating = True

    def end_update(self) -> None:
        """Say that the optimizer has changed all weights."""
        self._updating = False

    @property
    def weights_are_whole(self) -> bool:
        """Whether no optimizer step was left in its middle."""
        return not self._updating

    def put_into(self, checkpoint: dict[str, Any], trainer: L.Trainer) -> list[dict[str, Any]]:
        """Make a checkpoint one of the last complete step, wherever between two steps it is saved.

        A collective call, unless the run was interrupted: then the other ranks may never come.

        Args:
            checkpoint: About to be saved; its ``loops`` are replaced if they are not those of a complete step.
            trainer: The trainer of the run.

        Returns:
            The random generators of all ranks at that step; of this rank alone if the run was interrupted.
        """
        between = trainer.interrupted or not at_step_end(trainer) or _epoch_is_closed(trainer)
        recorded = between and self._step == trainer.global_step and bool(self.rng)
        if recorded:
            checkpoint["loops"] = self._loops
        generators = self.rng if recorded else rng_state()
        return [generators] if trainer.interrupted else all_gather_object(generators)


def at_step_end(trainer: L.Trainer) -> bool:
    """Whether no batch is in work and no gradient waits for its optimizer step."""
    loop: Any = trainer.fit_loop.epoch_loop
    in_work = loop.batch_progress.current.ready != loop.batch_progress.current.processed
    return not in_work and not bool(loop._should_accumulate())


def _epoch_is_closed(trainer: L.Trainer) -> bool:
    """Whether Lightning has counted the epoch as processed: a run resumed from there would count it a second time."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return bool(epochs.ready == epochs.processed and epochs.ready > 0)
