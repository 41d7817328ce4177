"""Signals that end a run: SIGTERM, SIGUSR1 and SIGUSR2 (schedulers), SIGHUP (a lost terminal), SIGINT (Ctrl-C).

Data flow: signal -> a flag, which ``LastCheckpoint`` reads after the next optimizer step; or, outside of steps and at
the second signal, an exception at once. The state of the last complete step is saved either way.
"""

import signal
from types import FrameType
from typing import Any

from lightning_mm.core.decisions import log, log_decision

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_USERS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a program may have a handler of its own for, which stays."""


class Preempted(SystemExit):
    """Raised after a signal other than Ctrl-C, once the checkpoint is saved; ends the process with status 128 + signal.

    Args:
        signum: The signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class StopSignals:
    """Handlers of the signals that end a run, from ``install`` to ``remove``.

    A signal that is ignored stays so, and a handler of the program's own for SIGUSR1 or SIGUSR2 stays.

    Attributes:
        received: The signal that asks the run to stop; None: none so far.
        at_once: Whether a signal raises immediately, instead of after the next optimizer step.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.at_once = False
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Begin to handle the signals."""
        self.received, self.at_once = None, False
        for each in _SIGNALS:
            previous = signal.getsignal(each)
            if previous in (signal.SIG_IGN, None) or (each in _USERS and previous != signal.SIG_DFL):
                continue
            try:
                signal.signal(each, self._receive)
            except ValueError:
                log_decision("preemption", "off", "signals reach the main thread only, and training runs in another")
                return
            self._previous[each] = previous

    def remove(self) -> None:
        """Put back the handlers from before."""
        for each, previous in self._previous.items():
            signal.signal(each, previous)
        self._previous = {}

    def stop(self) -> None:
        """Raise what ends the run: KeyboardInterrupt after Ctrl-C, else ``Preempted``."""
        assert self.received is not None
        raise KeyboardInterrupt if self.received == signal.SIGINT else Preempted(self.received)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = signum
        if again or self.at_once:
            self.stop()
        log.info("%s: the run stops after this step", signal.Signals(signum).name)
