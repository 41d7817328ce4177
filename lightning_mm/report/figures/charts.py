"""Line charts as inline SVG: text stays text, colours are the page's, and each chart says itself in words.

Data flow: ``sections`` hands over named series of (step, value); a ``Chart`` holds the drawing, its legend, its notes.

Shapes: a drawing is 360 x 190 units, about the pixels of a column of the report, so that its text has its true size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Literal

from lightning_mm.report.tables.numbers import percent, short

Points = Sequence[tuple[float, float]]
Style = Literal["accent", "ink", "faint", "blind"]

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 10, 26
_MAX_POINTS, _MAX_DOTS = 240, 24


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend, its (step, value) points in step order, and its look."""

    label: str
    points: Points
    style: Style = "accent"
    dash: int = 0
    """0 draws a solid line; 1, 2, ... ever shorter dashes, so that lines are told apart without colour."""


@dataclass(frozen=True)
class Key:
    """One legend entry: a series and its last finite value."""

    label: str
    style: Style
    dash: str
    last: str


@dataclass(frozen=True)
class Chart:
    """A drawing and what stands around it."""

    title: str
    unit: str
    svg: str
    keys: tuple[Key, ...]
    note: str = ""


def line_chart(
    title: str, unit: str, series: Sequence[Series], *, share: bool = False, zero: bool = False
) -> Chart | None:
    """Draw the series that have data, or nothing where none has.

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
    ys = [y for _, points in lines for _, y in points]
    xs = [x for _, points in lines for x, _ in points]
    y_ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if share else ticks(min(0.0, *ys) if zero else min(ys), max(ys))
    x_ticks = [x for x in ticks(min(xs), max(xs), 5) if min(xs) <= x <= max(xs)] or [min(xs)]
    frame = _Frame(min(xs), max(xs), min(*ys, y_ticks[0]), max(*ys, y_ticks[-1]))
    body = "".join(
        [
            *(_rule(frame, y, percent(y) if share else short(y)) for y in y_ticks),
            *(_mark(frame, x) for x in x_ticks),
            *(_line(frame, s, points) for s, points in lines),
        ]
    )
    keys = tuple(
        Key(s.label, s.style, dash(s.dash), percent(points[-1][1]) if share else short(points[-1][1]))
        for s, points in lines
    )
    words = "; ".join(f"{key.label} ends at {key.last}" for key in keys)
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}: {escape(words)}">'
        f"<title>{escape(title)}: {escape(words)}</title>{body}</svg>"
    )
    return Chart(title, unit, svg, keys, _not_finite(series))


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


def thin(points: Points, most: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """At most about ``most`` points, keeping the lowest and the highest of each stretch: no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept.extend(sorted(ends | ({stretch[-1]} if start + size >= len(points) else set())))
    return kept


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten) that enclose ``low`` and ``high``."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def dash(kind: int) -> str:
    """The SVG dash pattern of a line; empty for a solid one."""
    return ("", "7 3", "2 3", "8 3 2 3", "1 5")[kind % 5]


@dataclass(frozen=True)
class _Frame:
    """From data to drawing units."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return _LEFT + _ratio(value, self.x0, self.x1) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - _ratio(value, self.y0, self.y1) * (_HEIGHT - _TOP - _BOTTOM)


def _ratio(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _rule(frame: _Frame, value: float, text: str) -> str:
    y = frame.y(value)
    return (
        f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _mark(frame: _Frame, value: float) -> str:
    x = min(max(frame.x(value), _LEFT + 4), _WIDTH - _RIGHT - 8)
    return f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(short(value))}</text>'


def _line(frame: _Frame, series: Series, points: Points) -> str:
    drawn = thin(points)
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in drawn)
    dots = drawn if len(points) <= _MAX_DOTS else drawn[-1:]
    circles = "".join(
        f'<circle class="dot {series.style}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6">'
        f"<title>{escape(series.label)}: {short(y)} at step {short(x)}</title></circle>"
        for x, y in dots
    )
    return f'<polyline class="line {series.style}" stroke-dasharray="{dash(series.dash)}" points="{path}"/>{circles}'


def _not_finite(series: Sequence[Series]) -> str:
    bad = [(x, s.label) for s in series for x, y in s.points if not math.isfinite(y)]
    if not bad:
        return ""
    step, label = min(bad)
    return f"{len(bad)} values are not finite and not drawn; the first is {label} at step {step:.0f}."
