"""Heat maps as inline SVG: layers by steps, and layers by layers; undefined cells are hatched, what trains is marked.

Data flow: a ``Panel``, or a matrix of matrices.json -> cells in the classes of ``colours`` -> ``inside`` lays them out.

Shapes: S steps, L layers; drawing units are about pixels, so that text has its true size.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lightning_mm.report.figures import colors
from lightning_mm.report.figures.layer_axis import LayerAxis
from lightning_mm.report.tables.numbers import short
from lightning_mm.report.tables.panels import Panel, StepNames, Trained, short_name, spoken

_HATCH = 5.0


@dataclass(frozen=True)
class Scale:
    """What the colour scale stands for.

    Args:
        low: The lowest value it shows.
        high: The highest.
        null: What chance would give; None where that is not known.
        turned: The lowest value has the strongest colour, since it is the one that counts.
        null_word: What that is called.
    """

    low: float
    high: float
    null: float | None = None
    turned: bool = False
    null_word: str = "chance"

    @classmethod
    def of(cls, panel: Panel, steps: Sequence[int]) -> "Scale":
        """From the values shown and chance; no narrower than an interval, so that noise does not look like change."""
        rows = [row for step in steps for row in panel.profile(step)]
        nulls = [row.null for row in rows if row.null is not None and panel.measure.from_chance]
        values = [row.value for row in rows if row.value is not None] or [0.0]
        null = sum(nulls) / len(nulls) if nulls else None
        low, high = min([*values, *nulls]), max([*values, *nulls])
        reach = sorted(row.high - row.low for row in rows if row.high is not None and row.low is not None)
        least = reach[len(reach) // 2] if reach else 0.0
        spare = max(0.0, max(least, 1e-3 * max(abs(low), abs(high)), 1e-9) - (high - low)) / 2
        return cls(low - spare, high + spare, null, panel.measure.seek == "min", panel.measure.null_word)

    def share(self, value: float) -> float:
        """How far along the colours a value is, 0 at the palest."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return 1 - share if self.turned else share

    @property
    def ends(self) -> tuple[float, float]:
        """The values of the palest and of the strongest colour."""
        return (self.high, self.low) if self.turned else (self.low, self.high)

    def rounded(self, value: float) -> float:
        """A value without the digits that the scale does not resolve."""
        return round(value, 1 - math.floor(math.log10(self.high - self.low))) + 0.0 if self.high > self.low else value


@dataclass(frozen=True)
class Cells:
    """A grid of values to be drawn.

    Args:
        x: Left edge of a column.
        y: Upper edge of a row.
        width: Of a cell.
        height: Of a cell.
        tip: What a cell says when pointed at; without it, cells of one colour are one shape, which keeps pages small.
    """

    x: Callable[[int], float]
    y: Callable[[int], float]
    width: float
    height: float
    tip: Callable[[int, int], str] | None = None

    def draw(self, values: Mapping[tuple[int, int], float | None], scale: Scale) -> str:
        """Cells by (column, row); None is hatched, and what is missing stays empty."""
        shapes: dict[int, list[str]] = {}
        drawn = []
        for (column, row), value in values.items():
            if value is None:
                continue
            box = _box(self.x(column), self.y(row), self.width + 0.3, self.height + 0.3)  # overlap hides seams
            kind = colors.level(scale.share(value))
            if self.tip is None:
                shapes.setdefault(kind, []).append(box)
            else:
                drawn.append(f'<path class="q{kind}" d="{box}"><title>{escape(self.tip(column, row))}</title></path>')
        merged = [f'<path class="q{kind}" d="{"".join(boxes)}"/>' for kind, boxes in sorted(shapes.items())]
        return "".join([*drawn, *merged, self._hatched(place for place, value in values.items() if value is None)])

    def _hatched(self, places: Iterable[tuple[int, int]]) -> str:
        """Diagonals over cells, drawn as lines: a pattern would need an id that is unique in the page."""
        lines, boxes = [], []
        for column, row in places:
            x, y, w, h = self.x(column), self.y(row), self.width, self.height
            boxes.append(_box(x, y, w, h))
            offset = _HATCH / 2
            while offset < w + h:
                a, b = min(offset, w), min(offset, h)
                lines.append(f"M{x + a:.1f} {y + offset - a:.1f}L{x + offset - b:.1f} {y + b:.1f}")
                offset += _HATCH
        if not boxes:
            return ""
        tip = "<title>undefined: the reason stands below</title>"
        return f'<path class="none" d="{"".join(boxes)}">{tip}</path><path class="hatch" d="{"".join(lines)}"/>'


def heat_map(
    panel: Panel, axis: LayerAxis, steps: Sequence[int], names: StepNames, left: float, right: float, *, tips: bool
) -> str:
    """Layers by steps, as a part of a drawing; columns are equally wide, whatever the distance of their steps."""
    width = (right - left) / len(steps)
    scale = Scale.of(panel, steps)

    def tip(column: int, layer: int) -> str:
        value = panel.value(steps[column], layer)
        return f"{spoken(layer)}, {names.long(steps[column])}: {'undefined' if value is None else panel.spell(value)}"

    cells = Cells(
        lambda column: left + column * width,
        lambda layer: axis.y(layer) - axis.row / 2,
        width,
        axis.row,
        tip if tips else None,
    )
    shown = {step: column for column, step in enumerate(steps)}
    values = {(shown[step], layer): row.value for (step, layer), row in panel.cells.items() if step in shown}
    ticks = _ticks(steps, names, lambda column: left + (column + 0.5) * width, axis.bottom + 13)
    return cells.draw(values, scale) + axis.edges(left, right) + ticks + legend(panel.spell, scale, left, right, axis)


def legend(spell: Callable[[float], str], scale: Scale, left: float, right: float, axis: LayerAxis) -> str:
    """The colour scale with its ends, and chance marked on it."""
    y, width = axis.bottom + 23, (right - left) / colors.LEVELS
    blocks = "".join(
        f'<rect class="q{i}" x="{left + i * width:.1f}" y="{y:.1f}" width="{width + 0.3:.1f}" height="7"/>'
        for i in range(colors.LEVELS)
    )
    pale, strong = (escape(spell(scale.rounded(end))) for end in scale.ends)
    ends = (
        f'<text x="{left:.1f}" y="{y + 19:.1f}">{pale}</text>'
        f'<text x="{right:.1f}" y="{y + 19:.1f}" text-anchor="end">{strong}</text>'
    )
    if scale.null is None:
        return blocks + ends
    x = left + (right - left) * scale.share(scale.null)
    tip = f"<title>{scale.null_word}: {escape(spell(scale.null))}</title>"
    return f'{blocks}{ends}<path class="chance" d="M{x:.1f} {y - 3:.1f}v10">{tip}</path>'


def matrix(layers: Sequence[int], values: Sequence[Sequence[float | None]], trained: Trained, *, tips: bool) -> str:
    """Layers by layers, embeddings at the lower left, as a whole drawing; what trains is marked on both axes.

    Args:
        layers: (L,) the layers of rows and columns, ascending.
        values: (L, L).
        trained: Which layers train.
        tips: Whether each cell says its value when pointed at.
    """
    axis = LayerAxis.over(layers, trained)
    left, half = 64.0, axis.row / 2
    right = left + axis.bottom - axis.top

    def x(layer: int) -> float:
        return right - (axis.y(layer) - axis.top)

    def tip(column: int, row: int) -> str:
        value = grid[column, row]
        return f"{spoken(row)} and {spoken(column)}: {'undefined' if value is None else short(value)}"

    grid = {(b, a): values[i][j] for i, a in enumerate(layers) for j, b in enumerate(layers)}
    known = [value for value in grid.values() if value is not None] or [0.0]
    scale = Scale(min(0.0, *known), max(1.0, *known))
    cells = Cells(lambda c: x(c) - half, lambda r: axis.y(r) - half, axis.row, axis.row, tip if tips else None)
    body = cells.draw(grid, scale) + axis.edges(left, right) + axis.bars(left - 7) + axis.numbers(left - 10)
    lowered = LayerAxis(axis.first, axis.last, trained, axis.top + 10)
    words = f"layer by layer matrix of {len(layers)} layers"
    return (
        f'<svg viewBox="0 0 360 {axis.bottom + 66:.0f}" role="img" aria-label="{words}"><title>{words}</title>'
        f"{body}{_under(axis, left, x)}{legend(short, scale, left, right, lowered)}</svg>"
    )


def _under(axis: LayerAxis, left: float, x: Callable[[int], float]) -> str:
    """The horizontal axis of a matrix: what trains, and the layer numbers."""
    marks = ""
    for top, bottom in axis.stretches:
        start, end = left + axis.bottom - bottom, left + axis.bottom - top
        marks += f'<rect class="trained-bar" x="{start:.1f}" y="{axis.bottom + 3:.1f}" '
        marks += f'width="{end - start:.1f}" height="4" rx="1.5"/>'
        for edge in (start, end):
            marks += f'<path class="trained-edge" d="M{edge:.1f} {axis.top:g}V{axis.bottom:.1f}"/>'
    for layer in axis.numbered:
        place = f'x="{x(layer):.1f}" y="{axis.bottom + 19:.1f}"'
        marks += f'<text {place} text-anchor="middle">{short_name(layer)}</text>'
    return marks


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h-{width:.1f}z"


def _ticks(steps: Sequence[int], names: StepNames, x: Callable[[int], float], y: float) -> str:
    """Step numbers under their columns: the last, the first, and those between that do not touch another."""
    kept: list[tuple[float, float]] = []
    drawn = []
    for column in sorted({len(steps) - 1, 0}, reverse=True) + list(range(1, len(steps) - 1)):
        text = names.tick(steps[column])
        reach = 3.6 * len(text) + 4
        if all(abs(x(column) - other) >= reach + theirs for other, theirs in kept):
            kept.append((x(column), reach))
            drawn.append(f'<text x="{x(column):.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>')
    return "".join(drawn)
