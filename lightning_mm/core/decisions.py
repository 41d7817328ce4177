"""Every choice that is made for the user is said aloud, with its reason, and kept for the report.

Data flow: any module calls ``decide``; rank 0 prints the line; the run directory and the dashboards read ``decisions``.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger("lightning_mm")


@dataclass(frozen=True)
class Decision:
    """One automatic choice.

    Args:
        name: The option it stands for, dotted where it has a key.
        value: What was chosen.
        reason: Why.
    """

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.value} ({self.reason})"


class Decisions:
    """The decisions of this process, in the order they were taken; a repeated one is kept once."""

    def __init__(self) -> None:
        self._taken: dict[Decision, None] = {}

    def __call__(self, name: str, value: object, reason: str) -> Decision:
        decision = Decision(name, str(value), reason)
        if decision not in self._taken:
            self._taken[decision] = None
            _say(decision)
        return decision

    def __iter__(self) -> Iterator[Decision]:
        return iter(tuple(self._taken))

    def clear(self) -> None:
        """Forget everything: a new run begins."""
        self._taken.clear()


@rank_zero_only
def _say(decision: Decision) -> None:
    log.info("%s", decision)


decide = Decisions()
