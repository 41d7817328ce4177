"""Line charts of training curves.

Data flow: ``sections.run`` hands over named series of (step, value) -> rows -> ``LineChart``: figure, legend and note.
Lines of many points are thinned to their extremes, which keeps pages small.

Shapes: a figure is 360 x 204 pixels, about a column of the report.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import altair as alt

from lightning_mm.report.figures import theme
from lightning_mm.report.figures.figure import (
    Figure,
    Rows,
    layered,
    line_styles,
    nominal,
    number,
    tip,
    value_axis,
    view,
    without_validation,
)
from lightning_mm.report.figures.theme import LineStyle
from lightning_mm.report.tables.chart_table import ChartTable
from lightning_mm.report.tables.numbers import percent, short

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 360, 204
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 10, 40
_MOST_POINTS, _MOST_DOTS = 240, 24
ACCENT, INK, RAW = LineStyle(theme.TEAL), LineStyle(theme.INK), LineStyle(theme.TEAL, 1.0, 0.42)
"""Line styles of curves; ``RAW`` is for noisy values that another line smooths."""


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend, its (step, value) points in step order, and its look."""

    label: str
    points: Points
    style: LineStyle = ACCENT


@dataclass(frozen=True)
class LegendEntry:
    """One line of a legend: a series and its last finite value, or its peak."""

    label: str
    style: LineStyle
    value: str


@dataclass(frozen=True)
class LineChart:
    """A figure with its title, unit and legend."""

    title: str
    unit: str
    figure: Figure
    legend: tuple[LegendEntry, ...]
    note: str = ""


@without_validation
def line_chart(
    title: str, unit: str, series: Sequence[Series], *, share: bool = False, zero: bool = False
) -> LineChart | None:
    """The series that have data over their steps; None where none has.

    Args:
        title: What is shown.
        unit: The unit of the vertical axis.
        series: The lines, the most important last (it is drawn on top).
        share: The values are fractions: the axis is 0 to 100 %.
        zero: The axis begins at 0, so that noise does not look like change.
    """
    lines = [(s, [(x, y) for x, y in s.points if math.isfinite(y) and math.isfinite(x)]) for s in series]
    lines = [(s, points) for s, points in lines if points]
    if not lines:
        return None
    legend = tuple(
        LegendEntry(s.label, s.style, percent(points[-1][1]) if share else short(points[-1][1])) for s, points in lines
    )
    data = {
        "lines": [row for index, (s, points) in enumerate(lines) for row in _line_rows(index, s, points)],
        "dots": [row for s, points in lines for row in _dot_rows(s, points)],
    }
    scale = _value_scale([y for _, points in lines for _, y in points], zero=zero)
    axis: dict[str, Any] = {"tickCount": 4}
    if share:
        scale, axis = {"domain": [0, 1]}, {"values": [0, 0.25, 0.5, 0.75, 1]}
    words = "; ".join(f"{entry.label} ends at {entry.value}" for entry in legend)
    chart = _chart(data, scale, value_axis(*scale["domain"], percent=share, labelPadding=7, **axis))
    steps = [x for _, points in lines for x, _ in points]
    live = {
        "kind": "steps",
        "span": [min(steps), max(steps)],
        "left": _LEFT,
        "width": _WIDTH - _LEFT - _RIGHT,
        "percent": share,
        "styles": {s.label: s.style.row for s, _ in lines},
    }
    figure = Figure(
        chart, data, (_WIDTH, _HEIGHT), (_LEFT, _TOP), f"{title}: {words}", table=_table(lines, unit), live=live
    )
    return LineChart(title, unit, figure, legend, _not_finite(series))


def _table(lines: Sequence[tuple[Series, Points]], unit: str) -> ChartTable:
    """The points as they are drawn."""
    rows = [(s.label, x, y) for s, points in lines for x, y in thin(points)]
    thinned = any(len(points) > _MOST_POINTS for _, points in lines)
    note = "Long curves are thinned to their extremes; metrics.csv holds every value." if thinned else ""
    return ChartTable(("series", "step", unit or "value"), rows, note)


def _value_scale(values: Sequence[float], *, zero: bool) -> dict[str, Any]:
    """A vertical scale that ends at round values; values that are all alike stand inside it."""
    low, high = min([*values, *([0.0] if zero else [])]), max([*values, *([0.0] if zero else [])])
    size = max(abs(low), abs(high))
    if high - low <= max(1e-12 * size, 1e-100):  # d3 finds no ticks between numbers next to zero
        room = 0.1 * size if size > 1e-100 else 1.0
        low, high = low - room, high + room
    return {"domain": [low, high], "nice": 4}


def _chart(data: Mapping[str, Rows], scale: dict[str, Any], axis: dict[str, Any]) -> alt.LayerChart:
    """Lines in their own styles, and dots to point at."""
    titled = {"title": "step", "titleAnchor": "end", "titlePadding": 4}
    places = [row["x"] for row in data["lines"]]
    steps = value_axis(
        min(places), max(places), percent=False, tickCount=5, grid=False, labelPadding=10, labelFlush=True, **titled
    )
    x = alt.X(**number("x", scale={"nice": False, "zero": False}, axis=steps))
    y = alt.Y(**number("y", scale=scale, axis=axis))
    lines = view("lines", "lines", "line", strokeJoin="round")
    dots = view("dots", "dots", "point", aria=True, filled=True, size=21)
    pointed = view("hover", "hover", "rule", color=theme.INK, strokeWidth=1, opacity=0.45)
    at = view("hover_points", "hover_points", "point", filled=True, size=46, stroke=theme.CARD, strokeWidth=1.5)
    color = alt.Color(field="color", type="nominal", scale=None)
    views = [
        lines.encode(x=x, y=y, **line_styles(), detail=[nominal("line")], order=alt.Order(**number("x"))),
        dots.encode(x=x, y=y, **line_styles(), description=tip()),
        pointed.encode(x=x),
        at.encode(x=x, y=y, color=color),
    ]
    return layered(data, views, _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)


def _line_rows(index: int, series: Series, points: Points) -> list[dict[str, Any]]:
    return [{"line": index, "x": x, "y": y, **series.style.row} for x, y in thin(points)]


def _dot_rows(series: Series, points: Points) -> list[dict[str, Any]]:
    """All points of a short line, and the last one of a long line."""
    shown = points if len(points) <= _MOST_DOTS else points[-1:]
    style = series.style.row | {"opacity": 0.0 if series.style is RAW else 1.0, "dash": []}
    return [{"x": x, "y": y, **style, "tip": f"{series.label}: {short(y)} at step {short(x)}"} for x, y in shown]


def running_mean(points: Points, window: int) -> list[tuple[float, float]]:
    """The mean of the last ``window`` finite values, at each of their steps."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    blocks = [[y for _, y in finite[start : start + window]] for start in range(0, len(finite), window)]
    # A window is the end of one block and the beginning of the next: sums that only add never lose small values to a
    # spike that has left the window, as a sum that subtracts would.
    begun = [total for block in blocks for total in accumulate(block)]
    ended = [total for block in blocks for total in [*accumulate(reversed(block))][::-1]]
    return [
        (x, (begun[i] + (ended[i + 1 - window] if i >= window and (i + 1) % window else 0)) / min(window, i + 1))
        for i, (x, _) in enumerate(finite)
    ]


def thin(points: Points, most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most about ``most`` points, keeping the lowest and the highest of each interval: no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        interval = points[start : start + size]
        ends = {min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])}
        kept.extend(sorted(ends | ({interval[-1]} if start + size >= len(points) else set())))
    return kept


def _not_finite(series: Sequence[Series]) -> str:
    bad = [(x, s.label) for s in series for x, y in s.points if not math.isfinite(y)]
    if not bad:
        return ""
    step, label = min(bad)
    return f"{len(bad)} values are not finite and not drawn; the first is {label} at step {step:.0f}."
