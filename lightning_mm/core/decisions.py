"""Decisions that are made for the user: each is logged with its reason, and kept by the run that it belongs to.

Data flow: any module calls ``log_decision`` -> rank 0 prints the line -> the ``DecisionLog`` of the run -> the run
directory, W&B and the report.

A run opens its log with ``DecisionLog.opened``. What is decided before a run begins (while its parts are made) waits in
a log of the process, and the next run that is opened with ``take_pending`` takes it over.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_mm.core.errors import printable

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


class DecisionLog:
    """The decisions of one run in the order they were made; a repeated one is kept and printed once."""

    def __init__(self) -> None:
        self._decisions: dict[Decision, None] = {}

    def record(self, decision: Decision) -> None:
        """Keep a decision, and print it the first time."""
        if decision not in self._decisions:
            self._decisions[decision] = None
            if getattr(rank_zero_only, "rank", 0) == 0:  # Lightning sets it, where it is imported
                log.info("%s", decision)

    def take_pending(self) -> None:
        """Take over, without printing them again, what was decided outside of any run since a run did so last."""
        self._decisions |= _pending._decisions
        _pending.clear()

    @contextmanager
    def opened(self) -> Iterator["DecisionLog"]:
        """While active, what is decided in this process is recorded here."""
        _open_logs.append(self)
        try:
            yield self
        finally:
            _open_logs.remove(self)

    def __iter__(self) -> Iterator[Decision]:
        return iter(tuple(self._decisions))

    def clear(self) -> None:
        """Forget all decisions."""
        self._decisions.clear()


_pending = DecisionLog()
_open_logs: list[DecisionLog] = []


def decision_log() -> DecisionLog:
    """The log of the run that is open; outside of any run, what is waiting for the next one."""
    return _open_logs[-1] if _open_logs else _pending


def run_is_open() -> bool:
    """Whether a run has opened its log."""
    return bool(_open_logs)


def log_decision(name: str, value: object, reason: str) -> Decision:
    """Log a choice that is made for the user, with its reason.

    Args:
        name: The option it stands for, dotted where it has a key.
        value: What was chosen.
        reason: Why, in a few words.
    """
    decision = Decision(*map(printable, (name, str(value), reason)))
    decision_log().record(decision)
    return decision
