"""Schedule of inspections during a run, and the share of the training time that they may take.

Data flow: options from the config + the run's number of steps -> due steps; ``Budget`` skips those that cost too much.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """The steps after which a callback looks.

    Args:
        every: After every so many optimizer steps.
        times: So many times in between, evenly spread over the run; used where ``every`` is not given.
        spacing: 'log' puts them closer together early, where most moves.
        start: Before the first step too.
        end: After the last step too.
        budget: Largest share of the training time that all inspections of a run may take together; beyond it, looks
            in between are left out, and that is said. Start and end are always kept. None sets no limit.
    """

    every: int | None = None
    times: int = 3
    spacing: Literal["even", "log"] = "even"
    start: bool = True
    end: bool = True
    budget: float | None = 0.05

    def __post_init__(self) -> None:
        for name, value, least in (("every", self.every, 1), ("times", self.times, 0)):
            if value is not None and value < least:
                raise UserError(
                    f"schedule.{name} is {value}.", f"It is {least} or more.", f"Give {name} {least} or more."
                )
        if self.budget is not None and not self.budget > 0:
            raise UserError(
                f"schedule.budget is {self.budget}.",
                "It is a share of the training time, such as 0.05.",
                "Give a positive share, or null for no limit.",
            )

    def beginning(self) -> "Schedule":
        """A copy with an inspection before the first step."""
        return replace(self, start=True)

    def steps(self, total: int | None) -> Sequence[int]:
        """The due steps of a run of ``total`` steps, sorted; 0 means before the first step.

        Where the length of the run is not known (None), looks can be had at the start, every so many steps, and at
        the end, which is not listed.

        Example:
            >>> Schedule(times=3).steps(100)
            (0, 25, 50, 75, 100)
            >>> Schedule(times=3, spacing="log", start=False).steps(10_000)
            (10, 100, 1000, 10000)
        """
        if total is None:
            if self.every is None:
                if self.times:
                    reason = "the run has no number of steps; schedule.every looks on the way"
                    log_decision("inspection.schedule", "start and end", reason)
                return (0,) if self.start else ()
            return range(0 if self.start else self.every, 10**12, self.every)
        if self.every is not None:
            between = set(range(self.every, total, self.every))
        elif self.spacing == "even":
            between = {round(total * (i + 1) / (self.times + 1)) for i in range(self.times)}
        else:
            between = {round(total ** ((i + 1) / (self.times + 1))) for i in range(self.times)}
        ends = ({0} if self.start else set()) | ({total} if self.end else set())
        return tuple(sorted({step for step in between if 0 < step < total} | ends))


@dataclass
class Budget:
    """Time of inspections and of training so far, and whether one more inspection is affordable.

    Args:
        spent: Seconds of inspections.
        count: Inspections done.
        training: Seconds of everything else since the run began.
    """

    spent: float = 0.0
    count: int = 0
    training: float = 0.0

    def affords(self, share: float | None, step: int, total: int, more_to_keep: int) -> bool:
        """Whether one more inspection and those that are always made still fit into the budget.

        Args:
            share: Largest share of the training time; None sets no limit.
            step: Optimizer steps done.
            total: Optimizer steps of the run.
            more_to_keep: Inspections still to come that are made whatever they cost.
        """
        if share is None or not self.count:
            return True
        expected = self.training * total / step if step else math.inf
        return self.spent + (1 + more_to_keep) * self.spent / self.count <= share * expected

    def share(self, more: float = 0.0) -> float:
        """Seconds of inspections per second of everything else; nan before training.

        Args:
            more: Seconds of an inspection that is not counted yet; default 0.
        """
        return (self.spent + more) / self.training if self.training else math.nan
