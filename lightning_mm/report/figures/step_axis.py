"""The step axis of a heat map: each inspected step is a column around its place on a true axis of steps.

Data flow: steps -> ``StepAxis`` -> edges of columns in pixels, and the names that fit below them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from lightning_mm.report.figures.heatmap_parts import Columns
from lightning_mm.report.tables.panels import StepLabels

_NARROWEST = 3.0


@dataclass(frozen=True)
class StepAxis:
    """Columns over steps: a column reaches halfway to its neighbors, and is 3 pixels wide or more.

    Args:
        steps: Ascending.
        names: What steps are called; columns of named ones, which are models compared, are equally wide.
        width: In pixels.
    """

    steps: Sequence[int]
    names: StepLabels
    width: float

    @cached_property
    def edges(self) -> list[float]:
        """Where columns begin and end, in pixels from the left."""
        steps = self.steps
        if len(steps) == 1 or any(step in self.names.labels for step in steps):
            return [self.width * i / len(steps) for i in range(len(steps) + 1)]
        between = [(a + b) / 2 for a, b in pairwise(steps)]
        ends = [2 * steps[0] - between[0], *between, 2 * steps[-1] - between[-1]]
        least = min(_NARROWEST, self.width / len(steps))
        true = [self.width * (b - a) / (ends[-1] - ends[0]) for a, b in pairwise(ends)]
        spare = [max(0.0, size - least) for size in true]
        room = self.width - least * len(true)
        sizes = [least + room * size / (sum(spare) or 1.0) for size in spare] if min(true) < least else true
        return [0.0, *accumulate(sizes)]

    @property
    def columns(self) -> Columns:
        """The horizontal scale, in pixels."""
        return Columns(0, self.width, self.width)

    def span(self, step: int) -> dict[str, float]:
        """Where the column of a step begins and ends."""
        index = self.steps.index(step)
        return {"left": self.edges[index], "right": self.edges[index + 1]}

    def ticks(self) -> list[dict[str, Any]]:
        """Names of the last step, the first, and of those between that do not touch another."""
        kept: list[tuple[float, float]] = []
        ticked = []
        count = len(self.steps)
        for column in sorted({count - 1, 0}, reverse=True) + list(range(1, count - 1)):
            label = self.names.tick(self.steps[column])
            x, room = (self.edges[column] + self.edges[column + 1]) / 2, 3.6 * len(label) + 4
            if all(abs(x - other) >= room + theirs for other, theirs in kept):
                kept.append((x, room))
                ticked.append({"x": x, "text": label})
        return ticked
