"""What the training loss says by itself: it jumps, or it stays at that of guessing.

Data flow: the loss of each optimizer step, which is on the host to be logged -> two rules -> a line of the log and of
``decisions.json``. Nothing is changed, and no device is waited for.
"""

import math
from collections import deque

from lightning_mm.core.decisions import log_decision

_WINDOW, _MIN_WINDOW = 100, 20
"""Losses before a step that it is compared with: at most, and at least."""
_TIMES, _NATS = 2.0, 0.1
"""A loss is a jump if it is above ``_TIMES`` times the largest loss of the window, plus ``_NATS``. The maximum of a
window is exceeded by chance in one step of a hundred, twice the maximum hardly ever; the constant keeps noise of losses
near zero from counting."""
_LOOK_AT, _MEAN_OF = 50, 20
"""The step at which the mean of the last ``_MEAN_OF`` losses is compared with log(vocabulary)."""
_GUESSING = 0.95
"""Share of log(vocabulary) from which on a loss is that of guessing: a model that only knows which tokens are common is
far below it."""


class LossWatch:
    """Watches the losses of one fit, from its first step here on.

    Args:
        vocabulary: Number of tokens that the model chooses among; None: not known, and guessing is not looked for.
    """

    def __init__(self, vocabulary: int | None) -> None:
        self._guessing = None if vocabulary is None or vocabulary < 2 else math.log(vocabulary)
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._steps = 0

    def add(self, step: int, loss: float) -> None:
        """Look at the loss of a step, the same on every rank.

        Args:
            step: Its number, from 1.
            loss: Nats per supervised token; one that is not finite is passed over.
        """
        if not math.isfinite(loss):
            return
        self._steps += 1
        if len(self._losses) >= _MIN_WINDOW and loss > _TIMES * (largest := max(self._losses)) + _NATS:
            why = f"more than {_TIMES:g} times the largest of the {len(self._losses)} losses before it, {largest:.4g}"
            log_decision("train/loss", f"{loss:.4g} at step {step} is a jump", why)
        self._losses.append(loss)
        if self._steps == _LOOK_AT and self._guessing is not None:
            self._compare_with_guessing(step, self._guessing)

    def _compare_with_guessing(self, step: int, guessing: float) -> None:
        mean = sum(list(self._losses)[-_MEAN_OF:]) / _MEAN_OF
        if mean >= _GUESSING * guessing:
            log_decision(
                "train/loss",
                f"no better than guessing after step {step}",
                f"its mean of {_MEAN_OF} steps is {mean:.4g}, log(vocabulary) is {guessing:.4g}; model.optimizer.lr "
                "may be too low or too high, or the base model have random weights",
            )
