"""Figures of one measure over the layers of a model: heat map and profile.

Data flow: a ``Panel`` of layers.csv -> rows -> ``Figure``. Undefined cells are hatched; chance, the peak and the layers
that train are marked.

Shapes: L layers upwards x S steps to the right; values of a profile to the right, on the same layer axis.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from lightning_mm.core.layer_table import LayerRow
from lightning_mm.report.figures import theme
from lightning_mm.report.figures.curves import LegendEntry
from lightning_mm.report.figures.figure import (
    Figure,
    layered,
    line_styles,
    nominal,
    number,
    printable,
    side_by_side,
    tip,
    value_axis,
    view,
    without_validation,
)
from lightning_mm.report.figures.heatmap_parts import (
    UNDEFINED,
    ColorScale,
    Columns,
    LayerAxis,
    cells,
    color_legend,
    text,
)
from lightning_mm.report.figures.step_axis import StepAxis
from lightning_mm.report.figures.theme import LineStyle
from lightning_mm.report.tables.chart_table import ChartTable
from lightning_mm.report.tables.panels import Panel, StepLabels, TrainedLayers, layer_name, subsample_steps

MOST_COLUMNS = 24
_WIDTH, _LEFT, _RIGHT, _HEAT, _GAP, _TOP = 360.0, 42.0, 10.0, 148.0, 20.0, 20.0
_MOST_CELLS = 2000
_HEAT_ALONE = 180.0
_Data = dict[str, list[dict[str, Any]]]
_STYLES = tuple(
    LineStyle(color, width, opacity, dash)
    for color, width, opacity, dash in (
        (theme.SOFT, 1.3, 0.75, theme.DASHES[1]),
        (theme.SOFT, 1.3, 0.75, ()),
        (theme.INK, 1.8, 1.0, ()),
    )
)
_WITHHELD = LineStyle(theme.WITHHELD, 1.5, 1.0, theme.DOTTED)
_BOLD = {"color": theme.INK, "fontWeight": "bold"}
_HALO = {
    "stroke": theme.CARD,
    "strokeWidth": 3,
    "strokeJoin": "round",
}  # below the number: not all renderers order paint


@dataclass(frozen=True)
class PanelFigure:
    """Heat map and profile of one panel, and the legend of its lines."""

    figure: Figure
    legend: tuple[LegendEntry, ...]
    note: str = ""


@dataclass(frozen=True)
class _Line:
    """One line of a profile."""

    label: str
    rows: Sequence[LayerRow]
    style: LineStyle
    peak: str


@without_validation
def panel_figure(
    panel: Panel,
    trained: TrainedLayers,
    names: StepLabels,
    withheld: Panel | None = None,
    *,
    columns: int = MOST_COLUMNS,
) -> PanelFigure:
    """A heat map where a panel has several steps, and its profile at the first, a middle and the last one.

    Args:
        panel: What was measured; some of it is defined.
        trained: Which layers train.
        names: What the steps are called.
        withheld: The same measure with the image withheld, drawn as a further line; None draws none.
        columns: The most steps that the heat map shows; below ``MOST_COLUMNS`` its cells carry no tips.
    """
    axis = LayerAxis.over(panel.layers, trained)
    steps = subsample_steps(panel.steps, max(2, min(columns, _MOST_CELLS // len(panel.layers))))
    alone, last = len(steps) == 1, panel.measured[-1]
    lines = _profile_lines(panel, names, withheld)
    chart, data = profile(panel, axis, lines, names, width=_WIDTH - _LEFT - _RIGHT - (0 if alone else _HEAT + _GAP))
    shown: alt.LayerChart | alt.HConcatChart = chart
    plots: dict[str, dict[str, Any]] = {"profile": _live_profile(panel, lines, _LEFT + (0 if alone else _HEAT + _GAP))}
    if not alone:
        heat, cell_data = heat_map(panel, axis, steps, names)
        shown, data = side_by_side([heat, chart], _GAP), data | cell_data
        plots["heat"] = {"left": _LEFT, "width": _HEAT, "edges": StepAxis(steps, names, _HEAT).edges}
    left_out = len(panel.steps) - len(steps)
    kept = sorted({*steps, *subsample_steps(panel.measured, 3)})
    figure = Figure(
        shown,
        data,
        (_WIDTH, _TOP + axis.height + (34 if alone else 58)),
        (_LEFT, _TOP),
        f"{panel.measure.title}, {panel.place}: by layer; {peak_words(panel, last)}",
        table=_table(panel, kept),
        live=axis.live(_TOP, kind="panel", steps=list(steps), last_step=last, **_words(panel, names, kept), **plots),
        tips=columns >= MOST_COLUMNS,
    )
    return PanelFigure(
        figure,
        tuple(LegendEntry(line.label, line.style, line.peak) for line in lines),
        f"{left_out} steps in between are left out of the drawing." if left_out else "",
    )


def _table(panel: Panel, steps: Sequence[int]) -> ChartTable:
    """All rows of these steps; the short text table is that of the last step."""
    rows = [panel.cells[step, layer] for step in steps for layer in panel.layers if (step, layer) in panel.cells]
    columns = ("step", "layer", "value", "low", "high", panel.measure.null_word, "null_low", "null_high", "N", "k")
    values = [(r.step, r.layer, r.value, r.low, r.high, r.null, r.null_low, r.null_high, r.n, r.k) for r in rows]
    last = panel.measured[-1]
    newest = next((i for i, row in enumerate(rows) if row.step == last), 0)
    left_out = len(panel.steps) - len(steps)
    note = f"{left_out} further steps stand in layers.csv." if left_out else ""
    return ChartTable(columns, values, note, newest)


def _words(panel: Panel, names: StepLabels, steps: Sequence[int]) -> dict[str, Any]:
    """How values and steps are written, and which extreme counts."""
    known = panel.measure
    said = {"percent": known.in_percent, "seek": known.seek, "null_word": known.null_word}
    return said | {"names": {str(step): names.long(step) for step in steps}}


def _live_profile(panel: Panel, lines: Sequence[_Line], left: float) -> dict[str, float]:
    low, high = _domain(panel, lines, panel.profile(panel.measured[-1]))
    return {"left": left, "low": low, "high": high}


def heat_map(
    panel: Panel, axis: LayerAxis, steps: Sequence[int], names: StepLabels, *, width: float = _HEAT
) -> tuple[alt.LayerChart, _Data]:
    """Layers by steps, and the rows of its data; columns stand at their steps, see ``StepAxis``."""
    across = StepAxis(steps, names, width)
    columns, scale = across.columns, ColorScale.of(panel, steps)
    shown = {step: across.span(step) for step in steps}
    rows = [
        {
            "step": step,
            "layer": layer,
            **shown[step],
            **_row(layer),
            "value": row.value,
            "tip": f"{layer_name(layer)}, {names.long(step)}: {'' if row.value is None else panel.spell(row.value)}",
        }
        for (step, layer), row in panel.cells.items()
        if step in shown
    ]
    data = _cell_data(rows) | {"trained": axis.trained_runs, "steps": across.ticks()}
    data["step_title"] = [] if any(step in names.labels for step in steps) else [{"text": "step", "align": "right"}]
    legend, legend_data = color_legend(scale, columns, axis.height + 37, panel.spell)
    views = [
        axis.trained_band("heat_band", -10, 0),
        axis.trained_bar(),
        *cells(axis, columns, scale, description=tip()),
        *axis.trained_edges(width),
        *axis.pointed_at(width),
        text("steps", "steps", columns.at("x"), axis.height + 13),
        text("step_title", "step_title", width, axis.height + 27),
        *legend,
    ]
    return layered(data | legend_data, views, width, axis.height), data | legend_data


@without_validation
def heat_map_figure(panel: Panel, beside: Sequence[Panel], trained: TrainedLayers) -> Figure:
    """The heat map of a panel as a picture of its own, headed by its site.

    Args:
        panel: Some of it is defined.
        beside: The panels that the picture stands among: all have the same layer axis.
        trained: Which layers train.
    """
    axis = LayerAxis.over(sorted({layer for other in beside for layer in other.layers}), trained)
    steps = subsample_steps(panel.steps, MOST_COLUMNS)
    chart, data = heat_map(panel, axis, steps, StepLabels({}), width=_HEAT_ALONE)
    heading = {"text": printable(panel.place or panel.measure.title), "align": "left", "strong": True}
    chart.layer.append(text("heading", "heading", 0, -20))
    top = _TOP + 20
    size = (_LEFT + _HEAT_ALONE + _RIGHT, top + axis.height + 58)
    return Figure(chart, data | {"heading": [heading]}, size, (_LEFT, top), panel.measure.title, tips=False)


def _row(layer: float) -> dict[str, float]:
    """Where the row of a layer is."""
    return {"low": layer - 0.5, "high": layer + 0.5}


def _cell_data(rows: list[dict[str, Any]]) -> _Data:
    """Rows with a value, and rows without."""
    undefined = [row | {"tip": UNDEFINED} for row in rows if row["value"] is None]
    known = [row for row in rows if row["value"] is not None]
    return {"cells": known, "undefined": undefined}


def profile(
    panel: Panel, axis: LayerAxis, lines: Sequence[_Line], names: StepLabels, width: float
) -> tuple[alt.LayerChart, _Data]:
    """Values to the right over layers upwards, with interval, chance and peak of the last step, and its data's rows."""
    beside = width < _WIDTH / 2
    axis = LayerAxis(axis.first, axis.last, axis.trained, labels=not beside)
    last, last_rows = panel.measured[-1], panel.profile(panel.measured[-1])
    low, high = _domain(panel, lines, last_rows)
    titled = {"title": panel.measure.unit or "value", "titleAnchor": "end", "titlePadding": 4}
    numbers = value_axis(low, high, percent=panel.measure.in_percent, tickCount=3, labelPadding=5, **titled)
    values = Columns(low, high, width, numbers)
    nulls = [row for row in last_rows if row.null is not None and low <= row.null <= high]
    peak = panel.peak(last)
    data: _Data = {
        "trained": axis.trained_runs,
        "null_band": list(area_rows(nulls, "null_low", "null_high")),
        "null": [{**_row(row.layer), "x": row.null} for row in nulls],
        "interval": list(area_rows(last_rows, "low", "high")),
        "lines": [row for index, line in enumerate(lines) for row in line_rows(index, line.rows, line.style)],
        "points": [
            {"x": row.value, "layer": row.layer, "tip": f"{described(panel, row)}, {names.long(last)}"}
            for row in last_rows
        ],
        "peak": [] if peak is None else [{"x": peak.value, "layer": peak.layer, "text": _number_of(peak.layer)}],
    }
    x, y = values.at("x"), axis.at("layer")
    # the number of the peak stands on the side that the line does not take
    place = 0.0 if peak is None or peak.value is None else (peak.value - low) / values.pixel
    rightwards = place < width - 22 if panel.measure.seek == "max" else place < 22
    beside_peak = {"align": "left" if rightwards else "right", "dx": 8 if rightwards else -8, "dy": 4}
    views = [
        axis.trained_band("profile_band", -_GAP if beside else -10, width + 6),
        *([] if beside else [axis.trained_bar()]),
        _area("null_band", values, axis, theme.SOFT, 0.2),
        view("null", "null", "rule", color=theme.INK, strokeWidth=1.4, strokeDash=[2, 2.5]).encode(x=x, **axis.rows()),
        _area("interval", values, axis, theme.INK, 0.13),
        view("lines", "lines", "line", strokeJoin="round").encode(
            x=x,
            y=y,
            **line_styles(),
            detail=[nominal("line"), nominal("run")],
            order=alt.Order(**number("layer")),
        ),
        view("points", "points", "point", aria=True, filled=True, size=50, opacity=0).encode(
            x=x, y=y, description=tip()
        ),
        view("peak", "peak", "point", size=55, fill=theme.CARD, stroke=theme.INK, strokeWidth=1.8, opacity=1).encode(
            x=x, y=y
        ),
        text("peak", "peak_halo", x, y, **beside_peak, **_BOLD, **_HALO),
        text("peak", "peak_number", x, y, **beside_peak, **_BOLD),
        *axis.pointed_at(width),
    ]
    return layered(data, views, width, axis.height), data


def _profile_lines(panel: Panel, names: StepLabels, withheld: Panel | None) -> list[_Line]:
    """At most three steps, the last drawn strongest, and the line without the image."""
    steps = subsample_steps(panel.measured, 3)
    styles = _STYLES[-len(steps) :] if len(steps) != 2 else (_STYLES[0], _STYLES[2])
    lines = [
        _Line(names.in_legend(step), panel.profile(step), style, peak_words(panel, step))
        for step, style in zip(steps, styles, strict=True)
    ]
    rows = withheld.profile(withheld.steps[-1]) if withheld else []
    return lines + ([_Line("without the picture", rows, _WITHHELD, "")] if rows else [])


def peak_words(panel: Panel, step: int) -> str:
    """The value of the peak and its layer; empty where all layers are alike."""
    row = panel.peak(step)
    return "" if row is None or row.value is None else f"{panel.spell(row.value)} at {layer_name(row.layer)}"


def _number_of(layer: int) -> str:
    return "emb" if layer < 0 else str(layer)


def _domain(panel: Panel, lines: Sequence[_Line], last: Sequence[LayerRow]) -> tuple[float, float]:
    """Room for all lines, and for interval and chance of the last step, within what the measure can be."""
    seen = [row.value for line in lines for row in line.rows if row.value is not None]
    seen += [x for row in last for x in (row.low, row.high) if x is not None]
    if panel.measure.from_chance:
        seen += [x for row in last for x in (row.null, row.null_low, row.null_high) if x is not None]
    low, high, known = min(seen), max(seen), panel.measure
    room = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    low = low - room if known.low is None else max(known.low, low - room)
    high = high + room if known.high is None else min(known.high, high + room)
    return low, max(high, low + 1e-9, low + 1e-9 * abs(low))


def _runs(rows: Sequence[LayerRow]) -> list[list[LayerRow]]:
    """Runs of neighboring layers: a line does not cross a layer that is undefined."""
    runs: list[list[LayerRow]] = []
    for row in rows:
        if runs and runs[-1][-1].layer == row.layer - 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def line_rows(index: int, found: Sequence[LayerRow], style: LineStyle) -> Iterator[dict[str, Any]]:
    """The corners of a line, broken where a layer is undefined."""
    for run, rows in enumerate(_runs(found)):
        for row in rows:
            yield {"line": index, "run": run, "x": row.value, "layer": row.layer, **style.row}


def area_rows(rows: Sequence[LayerRow], low: str, high: str) -> Iterator[dict[str, Any]]:
    """Both ends of an area over the layers; a layer without neighbors is a row high, so that it shows too."""
    known = [row for row in rows if getattr(row, low) is not None and getattr(row, high) is not None]
    for index, run in enumerate(_runs(known)):
        for row in run:
            for side in (-0.5, 0.5) if len(run) == 1 else (0.0,):
                yield {"run": index, "layer": row.layer + side, "left": getattr(row, low), "right": getattr(row, high)}


def _area(name: str, values: Columns, axis: LayerAxis, color: str, opacity: float) -> alt.Chart:
    return view(name, name, "area", orient="horizontal", color=color, opacity=opacity).encode(
        **values.span(), y=axis.at("layer"), detail=[nominal("run")]
    )


def described(panel: Panel, row: LayerRow) -> str:
    """A row in words: layer 11: 83 % (78 % to 87 %), chance 50 %, N 200."""
    words = f"{layer_name(row.layer)}: {panel.spell(row.value or 0.0)}"
    if row.low is not None and row.high is not None:
        words += f" ({panel.spell(row.low)} to {panel.spell(row.high)})"
    words += f", {panel.measure.null_word} {panel.spell(row.null)}" if row.null is not None else ""
    return words + (f", N {row.n:,}" if row.n is not None else "") + (f", k {row.k}" if row.k is not None else "")
