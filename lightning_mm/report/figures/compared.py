"""Figures that hold several runs against each other: profiles over layers, and accuracies with their intervals.

Data flow: the last inspected step of one measure in each run, or shares by question type -> rows -> ``Figure``. Runs
differ in color and in dashes.

Shapes: L layers upwards; values to the right. Or T question types downwards; shares to the right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from lightning_mm.report.figures import theme
from lightning_mm.report.figures.curves import LegendEntry
from lightning_mm.report.figures.figure import (
    Figure,
    layered,
    line_styles,
    nominal,
    number,
    printable,
    tip,
    value_axis,
    view,
    without_validation,
)
from lightning_mm.report.figures.heatmap_parts import Columns, LayerAxis, text
from lightning_mm.report.figures.layers import area_rows, described, line_rows, peak_words
from lightning_mm.report.figures.theme import LineStyle
from lightning_mm.report.tables.chart_table import ChartTable
from lightning_mm.report.tables.numbers import percent
from lightning_mm.report.tables.panels import Panel, TrainedLayers

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 360.0, 42.0, 10.0, 20.0, 34.0
_NAMES, _LINE, _GAP = 84.0, 15.0, 16.0
_Data = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class RunPanel:
    """One measure of one run.

    Args:
        name: The run's.
        style: How its line is drawn.
        panel: Its values; the last inspected step is shown.
    """

    name: str
    style: LineStyle
    panel: Panel


def run_style(index: int) -> LineStyle:
    """The look of a run, by its place in the comparison."""
    return LineStyle(theme.RUNS[index % len(theme.RUNS)], 1.9, dash=theme.DASHES[index % len(theme.DASHES)])


@without_validation
def compared_profiles(runs: Sequence[RunPanel]) -> tuple[Figure, tuple[LegendEntry, ...]]:
    """The profiles of a measure in several runs, with 95 % intervals, and the legend of their lines.

    Args:
        runs: Each has a value at its last step; all of one measure and site.
    """
    first = runs[0].panel
    rows = {run.name: run.panel.profile(run.panel.measured[-1]) for run in runs}
    axis = LayerAxis.over(sorted({row.layer for found in rows.values() for row in found}), TrainedLayers())
    seen = [x for found in rows.values() for row in found for x in (row.value, row.low, row.high) if x is not None]
    nulls = [row.null for found in rows.values() for row in found if row.null is not None and first.measure.from_chance]
    null = sum(nulls) / len(nulls) if nulls else None
    low, high = min([*seen, *nulls]), max([*seen, *nulls])
    room = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    titled = {"title": first.measure.unit or "value", "titleAnchor": "end", "titlePadding": 4}
    numbers = value_axis(
        low - room, high + room, percent=first.measure.in_percent, tickCount=5, labelPadding=5, **titled
    )
    width = _WIDTH - _LEFT - _RIGHT
    values = Columns(low - room, high + room, width, numbers)
    data: _Data = {"null": [] if null is None else [{"x": null}], "interval": [], "lines": [], "points": [], "peak": []}
    for index, run in enumerate(runs):
        found, color = rows[run.name], {"color": run.style.color}
        data["interval"] += [row | color | {"of": index} for row in area_rows(found, "low", "high")]
        data["lines"] += line_rows(index, found, run.style)
        data["points"] += [
            {"x": row.value, "layer": row.layer, "tip": printable(f"{run.name}, {described(run.panel, row)}")}
            for row in found
        ]
        best = run.panel.peak(run.panel.measured[-1])
        data["peak"] += [{"x": best.value, "layer": best.layer, **color}] if best else []
    chart = layered(data, _profile_views(values, axis, width), width, axis.height)
    legend = tuple(LegendEntry(run.name, run.style, peak_words(run.panel, run.panel.measured[-1])) for run in runs)
    words = "; ".join(f"{entry.label} {entry.value}" for entry in legend)
    figure = Figure(
        chart,
        data,
        (_WIDTH, _TOP + axis.height + _BOTTOM),
        (_LEFT, _TOP),
        f"{first.measure.title}, {first.place}, by layer: {words}",
        table=_table(runs),
        live=axis.live(_TOP, kind="compared", percent=first.measure.in_percent, null_word=first.measure.null_word),
    )
    return figure, legend


def _profile_views(values: Columns, axis: LayerAxis, width: float) -> list[alt.Chart]:
    x, y = values.at("x"), axis.at("layer")
    own = alt.Color(field="color", type="nominal", scale=None)
    area = view("interval", "interval", "area", orient="horizontal", opacity=0.11)
    ring = view("peak", "peak", "point", size=48, fill=theme.CARD, strokeWidth=1.8, opacity=1)
    return [
        view("null", "null", "rule", color=theme.INK, strokeWidth=1.4, strokeDash=[2, 2.5]).encode(x=x),
        area.encode(**values.span(), y=y, color=own, detail=[nominal("run"), nominal("of")]),
        view("lines", "lines", "line", strokeJoin="round").encode(
            x=x, y=y, **line_styles(), detail=[nominal("line"), nominal("run")], order=alt.Order(**number("layer"))
        ),
        view("points", "points", "point", aria=True, filled=True, size=40, opacity=0).encode(
            x=x, y=y, description=tip()
        ),
        ring.encode(x=x, y=y, stroke=alt.Stroke(field="color", type="nominal", scale=None)),
        *axis.pointed_at(width),
    ]


def _table(runs: Sequence[RunPanel]) -> ChartTable:
    columns = ("run", "layer", "value", "low", "high", runs[0].panel.measure.null_word, "N", "step")
    rows = [
        (printable(run.name), row.layer, row.value, row.low, row.high, row.null, row.n, row.step)
        for run in runs
        for row in run.panel.profile(run.panel.measured[-1])
    ]
    return ChartTable(columns, rows)


@dataclass(frozen=True)
class RunShare:
    """The accuracy of a run on one question type, with its 95 % interval."""

    share: float
    low: float
    high: float
    n: int


@without_validation
def compared_shares(kinds: Sequence[str], runs: Mapping[str, Mapping[str, RunShare]]) -> Figure:
    """Accuracies by question type: a dot and its interval for each run.

    Args:
        kinds: (T,) the question types, from the top.
        runs: By name of the run, then by question type; a type without a test is left out.
    """
    block = len(runs) * _LINE + _GAP
    height, width = len(kinds) * block, _WIDTH - _NAMES - 22
    middles = [place * block + block / 2 + 4 for place in range(len(kinds))]
    labels = [
        {"y": y, "text": printable(kind[:14]), "align": "right", "strong": kind == "all"}
        for kind, y in zip(kinds, middles, strict=True)
    ]
    cells = [
        (name, index, kind, place, shares[kind])
        for place, kind in enumerate(kinds)
        for index, (name, shares) in enumerate(runs.items())
        if kind in shares
    ]
    rows = [
        {
            "x": share.share,
            "low": share.low,
            "high": share.high,
            "y": place * block + _GAP / 2 + (index + 0.5) * _LINE,
            "color": run_style(index).color,
            "tip": printable(f"{name}, {kind}: {_spelled(share)}"),
        }
        for name, index, kind, place, share in cells
    ]
    own = alt.Color(field="color", type="nominal", scale=None)
    titled = {"title": "exact match", "titleAnchor": "end"}
    axis = value_axis(0.0, 1.0, percent=True, values=[0, 0.25, 0.5, 0.75, 1], labelPadding=6, **titled)
    x = {end: alt.X(**number(end, scale={"domain": [0, 1], "nice": False}, axis=axis)) for end in ("low", "x")}
    y = alt.Y(**number("y", scale={"domain": [0, height], "range": [0, height], "nice": False}, axis=None))
    reach = view("shares", "reach", "rule", strokeWidth=2.2)
    dots = view("shares", "shares", "point", aria=True, filled=True, size=74, opacity=1)
    views = [
        reach.encode(x=x["low"], x2=alt.X2(field="high"), y=y, color=own),
        dots.encode(x=x["x"], y=y, color=own, description=tip()),
        text("kinds", "kinds", -10, y),
    ]
    data: _Data = {"shares": rows, "kinds": labels}
    columns = ("run", "question type", "exact match", "low", "high", "n")
    table = ChartTable(
        columns, [(printable(name), printable(kind), s.share, s.low, s.high, s.n) for name, _, kind, _, s in cells]
    )
    chart, words = layered(data, views, width, height), "Exact match by question type and run"
    return Figure(chart, data, (_WIDTH, height + 54), (_NAMES, 10), words, table=table, live={"kind": "cells"})


def _spelled(share: RunShare) -> str:
    return f"{percent(share.share)} ({percent(share.low)} to {percent(share.high)}), n {share.n:,}"
