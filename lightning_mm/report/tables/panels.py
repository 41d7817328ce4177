"""Rows of layers.csv, sorted into one panel per measure and site: what a heat map, a profile and a headline read.

Data flow: ``layer_table.read_layers`` -> panels -> drawn by ``figures.layers``, ``figures.tracks``, ``wandb_layers``.

Shapes: a panel is S steps x L layers; layer -1 is the embeddings, layer i the output of decoder block i.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_mm.core.layer_table import MOST_LAYERS, LayerRow
from lightning_mm.core.measure_catalog import Measure, describe_site, measure
from lightning_mm.report.tables.numbers import percent, short

EMBEDDINGS = -1


@dataclass(frozen=True)
class TrainedLayers:
    """Which decoder layers train; in a report on an untrained model, which were chosen to.

    Args:
        layers: Their numbers, ascending; none where nothing is known.
        total: How many decoder layers there are; 0 where that is not known.
        word: What is said of them.
    """

    layers: tuple[int, ...] = ()
    total: int = 0
    word: Literal["trained", "chosen"] = "trained"

    @classmethod
    def of(cls, census: Any) -> "TrainedLayers":
        """From census.json, or from as much of it as ``lightning-mm inspect`` writes.

        Raises:
            LookupError, TypeError, ValueError: If it has another shape.
        """
        total = int(census["layers"]["total"])
        if not 0 <= total <= MOST_LAYERS:
            raise ValueError(f"{total} layers")
        return cls(tuple(sorted({int(i) for i in census["layers"]["trained"] if 0 <= int(i) < total})), total)

    def place(self, layer: int) -> str:
        """Where a layer lies, seen from these; empty where there are none.

        Example:
            >>> [TrainedLayers((7, 8, 9), 12).place(layer) for layer in (8, 11, 6)]
            ['inside', '2 above', '1 below']
        """
        if not self.layers:
            return ""
        if layer in self.layers:
            return "inside"
        if layer > self.layers[-1]:
            return f"{layer - self.layers[-1]} above"
        return f"{self.layers[0] - layer} below" if layer < self.layers[0] else "in between"

    @property
    def ends(self) -> list[int]:
        """The first and the last layer of each run."""
        return [i for i in self.layers if i - 1 not in self.layers or i + 1 not in self.layers]


@dataclass(frozen=True)
class StepLabels:
    """What the steps of layers.csv are called: by their number, or by the labels of inspection.json.

    Args:
        labels: What stands for a step; steps without a label keep their number.
    """

    labels: Mapping[int, str]

    def long(self, step: int) -> str:
        return self.labels.get(step, f"step {step:,}")

    def tick(self, step: int) -> str:
        """What fits under a column: the number, or the letter of a label."""
        return chr(ord("A") + sorted(self.labels).index(step) % 26) if step in self.labels else short(step)

    def in_legend(self, step: int) -> str:
        """For a legend, which has room for a few words: labels stand at the head of the report."""
        if step not in self.labels:
            return self.long(step)
        return self.tick(step) if len(self.labels) > 1 else "value"


@dataclass(frozen=True)
class Panel:
    """One measure at one site.

    Args:
        measure: What is measured.
        site: Where.
        steps: The steps at which it was, ascending.
        layers: The layers in which it was, ascending.
        cells: The row of each (step, layer); a cell that is missing was not measured.
    """

    measure: Measure
    site: str
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    cells: Mapping[tuple[int, int], LayerRow]

    @property
    def place(self) -> str:
        return describe_site(self.site)

    def value(self, step: int, layer: int) -> float | None:
        row = self.cells.get((step, layer))
        return row.value if row else None

    def profile(self, step: int) -> list[LayerRow]:
        """The defined rows of one step, from the embeddings up."""
        rows = (self.cells.get((step, layer)) for layer in self.layers)
        return [row for row in rows if row is not None and row.value is not None]

    @property
    def measured(self) -> list[int]:
        """The steps that have a value."""
        return [step for step in self.steps if self.profile(step)]

    def peak(self, step: int) -> LayerRow | None:
        """The row of the layer that the measure is about, the lowest such layer where several tie; None if all do."""
        sign = 1 if self.measure.seek == "max" else -1
        rows = self.profile(step)
        if len(rows) > 1 and len({row.value for row in rows}) == 1:
            return None
        return max(rows, key=lambda row: sign * (row.value or 0.0)) if rows else None

    def spell(self, value: float) -> str:
        return percent(value) if self.measure.in_percent else short(value)


def panels(rows: Iterable[LayerRow]) -> list[Panel]:
    """One panel per measure and site. Where a row stands twice, the later one counts."""
    found: dict[tuple[str, str], dict[tuple[int, int], LayerRow]] = {}
    for row in rows:
        found.setdefault((row.measure, row.site), {})[row.step, row.layer] = row
    return [
        Panel(
            measure(name),
            site,
            tuple(sorted({step for step, _ in cells})),
            tuple(sorted({layer for _, layer in cells})),
            cells,
        )
        for (name, site), cells in found.items()
    ]


def layer_name(layer: int) -> str:
    """A layer in words."""
    return "embeddings" if layer == EMBEDDINGS else f"layer {layer}"


def layer_tick(layer: int) -> str:
    """A layer on an axis."""
    return "emb" if layer == EMBEDDINGS else str(layer)


def subsample_steps(steps: Sequence[int], most: int) -> tuple[int, ...]:
    """At most ``most`` steps, evenly taken, the first and the last among them.

    Example:
        >>> subsample_steps(range(10), 4)
        (0, 3, 6, 9)
    """
    if len(steps) <= max(2, most):
        return tuple(steps)
    last = len(steps) - 1
    return tuple(steps[round(i * last / (most - 1))] for i in range(most))
