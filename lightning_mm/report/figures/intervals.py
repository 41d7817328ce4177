"""Figures of a study: values with intervals, one under the other; and what is gained against what it costs.

Data flow: rows with a value and an interval -> ``Figure``. A row that its interval separates from zero is dark.

Shapes: rows downwards, values to the right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from lightning_mm.report.figures import theme
from lightning_mm.report.figures.figure import (
    Figure,
    layered,
    number,
    printable,
    tip,
    value_axis,
    view,
    without_validation,
)
from lightning_mm.report.figures.heatmap_parts import text
from lightning_mm.report.tables.chart_table import ChartTable
from lightning_mm.report.tables.numbers import short

_WIDTH, _NAMES, _RIGHT, _TOP, _BOTTOM, _LINE = 360.0, 92.0, 14.0, 8.0, 40.0, 22.0
_SIDE = 236.0
_Data = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class IntervalRow:
    """One value with its interval.

    Args:
        label: What it is of.
        value: The value.
        low: Lower end.
        high: Upper end.
        parts: Further values, such as those of single seeds, as ticks.
    """

    label: str
    value: float
    low: float
    high: float
    parts: tuple[float, ...] = ()

    @property
    def is_apart(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class TradeRow:
    """What one arm gains and what it costs, each with its interval."""

    label: str
    cost: float
    cost_low: float
    cost_high: float
    gain: float
    gain_low: float
    gain_high: float


@without_validation
def interval_rows(rows: Sequence[IntervalRow], unit: str, described: str) -> Figure:
    """Differences from zero with their intervals, a row each, and a tick for each seed.

    Args:
        rows: From the top.
        unit: Of the values.
        described: What the figure shows, for screen readers.
    """
    width, height = _WIDTH - _NAMES - _RIGHT, len(rows) * _LINE
    ends = [x for row in rows for x in (row.low, row.high, *row.parts)] + [0.0]
    room = 0.05 * (max(ends) - min(ends)) or 0.5
    low, high = min(ends) - room, max(ends) + room
    axis = value_axis(low, high, percent=False, tickCount=5, labelPadding=5, title=unit, titleAnchor="end")
    x = {
        field: alt.X(**number(field, scale={"domain": [low, high], "nice": False}, axis=axis))
        for field in ("x", "low", "part")
    }
    y = alt.Y(**number("y", scale={"domain": [0, height], "range": [0, height], "nice": False}, axis=None))
    middles = [(place + 0.5) * _LINE for place in range(len(rows))]
    data: _Data = {
        "zero": [{"x": 0.0}],
        "rows": [
            {
                "x": row.value,
                "low": row.low,
                "high": row.high,
                "y": middle,
                "color": theme.INK if row.is_apart else theme.SOFT,
                "opacity": 1.0 if row.is_apart else 0.55,
                "tip": printable(f"{row.label}: {short(row.value)} ({short(row.low)} to {short(row.high)})"),
            }
            for row, middle in zip(rows, middles, strict=True)
        ],
        "parts": [{"part": part, "y": y} for row, y in zip(rows, middles, strict=True) for part in row.parts],
        "labels": [
            {"y": y + 4, "text": printable(row.label[:18]), "align": "right", "strong": row.is_apart}
            for row, y in zip(rows, middles, strict=True)
        ],
    }
    own = alt.Color(field="color", type="nominal", scale=None)
    faint = alt.Opacity(**number("opacity", scale=None))
    views = [
        view("zero", "zero", "rule", color=theme.INK, strokeWidth=1.2, strokeDash=[2, 2.5]).encode(x=x["x"]),
        view("rows", "reach", "rule", strokeWidth=2.4).encode(
            x=x["low"], x2=alt.X2(field="high"), y=y, color=own, opacity=faint
        ),
        view("parts", "parts", "tick", orient="vertical", size=7, thickness=1, color=theme.SOFT).encode(
            x=x["part"], y=y
        ),
        view("rows", "values", "point", aria=True, filled=True, size=70).encode(
            x=x["x"], y=y, color=own, opacity=faint, description=tip()
        ),
        text("labels", "labels", -8, y),
    ]
    table = ChartTable(
        ("what", "value", "low", "high"), [(printable(row.label), row.value, row.low, row.high) for row in rows]
    )
    size = (_WIDTH, height + _TOP + _BOTTOM)
    chart = layered(data, views, width, height)
    return Figure(chart, data, size, (_NAMES, _TOP), described, table=table, live={"kind": "cells"})


@without_validation
def trade_chart(rows: Sequence[TradeRow], cost: str, gain: str, described: str) -> Figure:
    """Gain against cost, each arm a point with both intervals; up and to the left is better.

    Args:
        rows: The arms.
        cost: Title of the horizontal axis.
        gain: Title of the vertical axis.
        described: What the figure shows, for screen readers.
    """
    left, width = 46.0, _WIDTH - 46.0 - 60.0
    spans = []
    for ends in (
        [e for r in rows for e in (r.cost_low, r.cost_high)],
        [e for r in rows for e in (r.gain_low, r.gain_high)],
    ):
        low, high = min([*ends, 0.0]), max([*ends, 0.0])
        room = 0.06 * (high - low) or 0.5
        spans.append((low - room, high + room))
    (x_low, x_high), (y_low, y_high) = spans
    titled = {"tickCount": 5, "labelPadding": 5}
    x_axis = value_axis(x_low, x_high, percent=False, title=cost, titleAnchor="end", **titled)
    y_axis = value_axis(y_low, y_high, percent=False, title=gain, titleAnchor="end", **titled)
    x = {f: alt.X(**number(f, scale={"domain": [x_low, x_high], "nice": False}, axis=x_axis)) for f in ("x", "x_low")}
    y = {f: alt.Y(**number(f, scale={"domain": [y_low, y_high], "nice": False}, axis=y_axis)) for f in ("y", "y_low")}
    data: _Data = {
        "zero": [{"y": 0.0}],
        "rows": [
            {
                "x": row.cost,
                "x_low": row.cost_low,
                "x_high": row.cost_high,
                "y": row.gain,
                "y_low": row.gain_low,
                "y_high": row.gain_high,
                "text": printable(row.label[:14]),
                "align": "left",
                "strong": row.gain_low > 0,
                "tip": printable(f"{row.label}: {gain} {short(row.gain)}, {cost} {short(row.cost)}"),
            }
            for row in rows
        ],
    }
    thin = {"strokeWidth": 1.3, "color": theme.SOFT, "opacity": 0.5}
    views = [
        view("zero", "zero", "rule", color=theme.INK, strokeWidth=1.2, strokeDash=[2, 2.5]).encode(y=y["y"]),
        view("rows", "costs", "rule", **thin).encode(x=x["x_low"], x2=alt.X2(field="x_high"), y=y["y"]),
        view("rows", "gains", "rule", **thin).encode(x=x["x"], y=y["y_low"], y2=alt.Y2(field="y_high")),
        view("rows", "points", "point", aria=True, filled=True, size=60, color=theme.INK, opacity=1).encode(
            x=x["x"], y=y["y"], description=tip()
        ),
        text("rows", "names", x["x"], y["y"], dx=7, dy=-5),
    ]
    columns = ("arm", cost, "low", "high", gain, "gain low", "gain high")
    table = ChartTable(
        columns,
        [(printable(r.label), r.cost, r.cost_low, r.cost_high, r.gain, r.gain_low, r.gain_high) for r in rows],
    )
    chart = layered(data, views, width, _SIDE)
    size = (_WIDTH, _SIDE + _TOP + _BOTTOM)
    return Figure(chart, data, size, (left, _TOP), described, table=table, live={"kind": "cells"})
