"""Profiles over the layers, upright beside a heat map: lines at a few steps, interval, chance, and the peak marked.

Data flow: a ``Panel`` and the steps to show -> one SVG drawing of heat map and profile on a common layer axis.

Shapes: L layers upwards, values to the right; 360 units wide, about the pixels of a column of the report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from lightning_mm.core.layer_table import LayerRow
from lightning_mm.report.figures.charts import Key, Style, dash, ticks
from lightning_mm.report.figures.heatmaps import heat_map
from lightning_mm.report.figures.layer_axis import LayerAxis
from lightning_mm.report.tables.panels import Panel, StepNames, Trained, spoken, thinned

_WIDTH, _LEFT, _MIDDLE, _RIGHT = 360.0, 42.0, 190.0, 350.0
MOST_COLUMNS = 24
_MOST_CELLS = 2000
_LOOKS: tuple[tuple[Style, int], ...] = (("faint", 1), ("faint", 0), ("ink", 0))


@dataclass(frozen=True)
class Drawing:
    """Heat map and profile of one panel, and the legend of its lines."""

    svg: str
    keys: tuple[Key, ...]
    note: str = ""


@dataclass(frozen=True)
class _Line:
    """One line of the profile."""

    label: str
    rows: Sequence[LayerRow]
    style: Style
    dash: str
    said: str


@dataclass(frozen=True)
class _Frame:
    """From values to drawing units."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.left + min(max(share, -0.02), 1.02) * (self.right - self.left)

    def within(self, values: Sequence[float]) -> list[float]:
        """Those of the values that are in the frame."""
        slack = 1e-9 * (self.high - self.low)
        return [value for value in values if self.low - slack <= value <= self.high + slack]


def draw(
    panel: Panel, trained: Trained, names: StepNames, blind: Panel | None = None, *, columns: int = MOST_COLUMNS
) -> Drawing:
    """Draw one panel: a heat map where it has several steps, and its profile at the first, the middle and the last.

    Args:
        panel: What was measured; some of it is defined.
        trained: Which layers train.
        names: What the steps are called.
        blind: The same measure with the picture withheld, as a further line.
        columns: The most steps that the heat map shows; below ``MOST_COLUMNS`` its cells carry no tips.
    """
    axis = LayerAxis.over(panel.layers, trained)
    steps = thinned(panel.steps, max(2, min(columns, _MOST_CELLS // len(panel.layers))))
    wide, last = len(steps) == 1, panel.measured[-1]
    lines = _lines(panel, names, blind)
    rows = panel.profile(last)
    frame = _frame(panel, lines, rows, _LEFT if wide else _MIDDLE + 20)
    parts = [axis.bands(_LEFT - 10, _RIGHT + 6), axis.bars(_LEFT - 10), axis.numbers(_LEFT - 14)]
    if not wide:
        parts.append(heat_map(panel, axis, steps, names, _LEFT, _MIDDLE, tips=columns >= MOST_COLUMNS))
    parts += [
        *_rules(panel, frame, axis),
        _chance(rows, frame, axis),
        _area(rows, lambda row: row.low, lambda row: row.high, "interval", frame, axis),
        *(_polyline(line, frame, axis) for line in lines),
        _marks(panel, last, names, frame, axis),
    ]
    height = axis.bottom + (20 if wide else 44)
    left_out = len(panel.steps) - len(steps)
    return Drawing(
        _framed(panel, height, _said(panel, last), "".join(parts)),
        tuple(Key(line.label, line.style, line.dash, line.said) for line in lines),
        f"{left_out} steps in between are left out of the drawing." if left_out else "",
    )


def _lines(panel: Panel, names: StepNames, blind: Panel | None) -> list[_Line]:
    """At most three steps, the last drawn strongest, and the line without the picture."""
    steps = thinned(panel.measured, 3)
    looks = _LOOKS[-len(steps) :] if len(steps) != 2 else (_LOOKS[0], _LOOKS[2])
    withheld = blind.profile(blind.steps[-1]) if blind else []
    lines = [
        _Line(names.keyed(step), panel.profile(step), style, dash(kind), _said(panel, step))
        for step, (style, kind) in zip(steps, looks, strict=True)
    ]
    return lines + ([_Line("without the picture", withheld, "blind", "2 3", "")] if withheld else [])


def _said(panel: Panel, step: int) -> str:
    row = panel.peak(step)
    return "" if row is None or row.value is None else f"{panel.spell(row.value)} at {spoken(row.layer)}"


def _framed(panel: Panel, height: float, peak: str, body: str) -> str:
    words = escape(f"{panel.measure.title}, {panel.place}: by layer; {peak}")
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {height:.0f}" role="img" aria-label="{words}"><title>{words}</title>{body}</svg>'
    )


def _frame(panel: Panel, lines: Sequence[_Line], last: Sequence[LayerRow], left: float) -> _Frame:
    """Room for all lines, and for interval and chance of the last step, within what the measure can be."""
    seen = [row.value for line in lines for row in line.rows if row.value is not None]
    seen += [x for row in last for x in (row.low, row.high) if x is not None]
    if panel.measure.from_chance:
        seen += [x for row in last for x in (row.null, row.null_low, row.null_high) if x is not None]
    low, high, known = min(seen), max(seen), panel.measure
    room = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    low = low - room if known.low is None else max(known.low, low - room)
    high = high + room if known.high is None else min(known.high, high + room)
    return _Frame(left, _RIGHT, low, max(high, low + 1e-9))


def _rules(panel: Panel, frame: _Frame, axis: LayerAxis) -> list[str]:
    """Upright lines at two round values at least, with their numbers below."""
    few = 3 if frame.left > _MIDDLE else 4
    marks = next((m for m in (frame.within(ticks(frame.low, frame.high, n)) for n in range(few, 9)) if len(m) > 1), [])
    return [
        f'<path class="rule" d="M{frame.x(m):.1f} {axis.top:g}V{axis.bottom:.1f}"/>'
        f'<text x="{frame.x(m):.1f}" y="{axis.bottom + 13:.1f}" text-anchor="middle">{escape(panel.spell(m))}</text>'
        for m in marks
    ]


def _runs(rows: Sequence[LayerRow]) -> list[list[LayerRow]]:
    """Stretches of neighbouring layers: a line does not run across a layer that is undefined."""
    runs: list[list[LayerRow]] = []
    for row in rows:
        if runs and runs[-1][-1].layer == row.layer - 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _polyline(line: _Line, frame: _Frame, axis: LayerAxis) -> str:
    return "".join(
        f'<polyline class="line {line.style}" stroke-dasharray="{line.dash}" points="'
        + " ".join(f"{frame.x(row.value or 0.0):.1f},{axis.y(row.layer):.1f}" for row in run)
        + '"/>'
        for run in _runs(line.rows)
    )


def _area(
    rows: Sequence[LayerRow],
    low: Callable[[LayerRow], float | None],
    high: Callable[[LayerRow], float | None],
    style: str,
    frame: _Frame,
    axis: LayerAxis,
) -> str:
    """The area between two ends; a layer without neighbours is a row high, so that it shows too."""
    shapes = []
    for run in _runs([row for row in rows if low(row) is not None and high(row) is not None]):
        sides = (-0.5, 0.5) if len(run) == 1 else (0.0,)
        up = [(frame.x(low(row) or 0.0), axis.y(row.layer + side)) for row in run for side in sides]
        down = [(frame.x(high(row) or 0.0), axis.y(row.layer + side)) for row in run[::-1] for side in sides[::-1]]
        shapes.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in [*up, *down]) + "z")
    return f'<path class="{style}" d="{"".join(shapes)}"/>' if shapes else ""


def _chance(rows: Sequence[LayerRow], frame: _Frame, axis: LayerAxis) -> str:
    """Chance and its band, where they are in the frame."""
    rows = [row for row in rows if row.null is not None and frame.within([row.null])]
    band = _area(rows, lambda row: row.null_low, lambda row: row.null_high, "null-band", frame, axis)
    path = "".join(
        f"M{frame.x(row.null or 0.0):.1f} {axis.y(row.layer - 0.5):.1f}V{axis.y(row.layer + 0.5):.1f}" for row in rows
    )
    return band + (f'<path class="chance" d="{path}"/>' if path else "")


def _marks(panel: Panel, step: int, names: StepNames, frame: _Frame, axis: LayerAxis) -> str:
    """A point to point at in each layer, and a ring with the layer's number at the peak."""
    drawn = [
        f'<circle class="hit" cx="{frame.x(row.value or 0.0):.1f}" cy="{axis.y(row.layer):.1f}" r="4">'
        f"<title>{escape(described(panel, row))}, {escape(names.long(step))}</title></circle>"
        for row in panel.profile(step)
    ]
    peak = panel.peak(step)
    if peak is not None:
        x, y = frame.x(peak.value or 0.0), axis.y(peak.layer)
        rightwards = x < frame.right - 22 if panel.measure.seek == "max" else x < frame.left + 22
        side, anchor = (8, "start") if rightwards else (-8, "end")  # away from the line
        label = "emb" if peak.layer < 0 else peak.layer
        drawn.append(f'<circle class="peak" cx="{x:.1f}" cy="{y:.1f}" r="4.2"/>')
        drawn.append(
            f'<text class="peak-number" x="{x + side:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{label}</text>'
        )
    return "".join(drawn)


def described(panel: Panel, row: LayerRow) -> str:
    """A row in words: layer 11: 83 % (78 % to 87 %), chance 50 %, N 200."""
    words = f"{spoken(row.layer)}: {panel.spell(row.value or 0.0)}"
    if row.low is not None and row.high is not None:
        words += f" ({panel.spell(row.low)} to {panel.spell(row.high)})"
    words += f", {panel.measure.null_word} {panel.spell(row.null)}" if row.null is not None else ""
    return words + (f", N {row.n:,}" if row.n is not None else "") + (f", k {row.k}" if row.k is not None else "")
