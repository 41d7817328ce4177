"""When to look inside a run, and how much time looking may take.

Data flow: options from the config + the run's number of steps -> the set of due steps; ``Budget`` thins it as it goes.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

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
        """The same with a look before the first step."""
        return replace(self, start=True)

    def steps(self, total: int) -> tuple[int, ...]:
        """The due steps of a run of ``total`` steps: 0 stands for before the first.

        Example:
            >>> Schedule(times=3).steps(100)
            (0, 25, 50, 75, 100)
            >>> Schedule(times=3, spacing="log", start=False).steps(10_000)
            (10, 100, 1000, 10000)
        """
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
    """What inspections have cost so far, and whether one more is affordable.

    Args:
        spent: Seconds of inspections.
        count: Inspections done.
        training: Seconds of everything else since the run began.
    """

    spent: float = 0.0
    count: int = 0
    training: float = 0.0

    def affords(self, share: float | None, step: int, total: int, more_to_keep: int) -> bool:
        """Whether an inspection in between fits, with those that are kept in any case still to come.

        Args:
            share: Of the training time.
            step: Steps done.
            total: Steps of the run.
            more_to_keep: Inspections that will be made whatever they cost.
        """
        if share is None or not self.count:
            return True
        expected = self.training * total / step if step else math.inf
        return self.spent + (1 + more_to_keep) * self.spent / self.count <= share * expected

    def share(self, more: float = 0.0) -> float:
        """Seconds of inspections, and ``more`` of one that is not counted yet, per second of everything else."""
        return (self.spent + more) / self.training if self.training else math.nan
