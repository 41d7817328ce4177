"""A causal trace as a heat map: layers upwards, tokens to the right; long runs of one kind of token are drawn narrow.

Data flow: ``Trace`` -> ``Column`` (a token, or part of a run) -> rows -> ``Figure`` of the report, or a picture file.

Shapes: L layers x T tokens -> L x C columns; columns are placed in pixels from the left edge of the plot. The sign of a
value decides its color, zero is colorless.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import altair as alt

from lightning_mm.core.errors import UserError
from lightning_mm.core.measure_catalog import TOKEN_CLASSES
from lightning_mm.report.figures import theme
from lightning_mm.report.figures.figure import Figure, layered, printable, text_width, tip, view, without_validation
from lightning_mm.report.figures.heatmap_parts import (
    ColorScale,
    Columns,
    LayerAxis,
    cells,
    color_legend,
    either,
    ring,
    text,
)
from lightning_mm.report.tables.chart_table import ChartTable
from lightning_mm.report.tables.numbers import percent
from lightning_mm.report.tables.panels import TrainedLayers, layer_name
from lightning_mm.report.tables.traces import Trace

WIDTH = 940.0
"""The most that the columns of a trace take, in pixels."""
_LEFT, _RIGHT, _TOP, _HEADING, _LEGEND = 64.0, 16.0, 24.0, 54.0, 176.0
_COLUMN, _WIDEST, _NARROW, _GAP = 10.5, 34.0, 6.0, 5.0
_PARTS, _MOST_PARTS, _RUN, _MOST_CELLS = 16, 48, 4, 9000
_LETTERS, _LETTER = 14, 6.2
_IMAGE = ("image_early", "image_late")


@dataclass(frozen=True)
class Column:
    """What is drawn as one column.

    Args:
        first: Index of its first token.
        end: One past its last.
        kind: What these tokens are.
        run: Number of tokens of the run that it is a part of; 0 for a token by itself.
        x: Its left edge.
        width: Its width.
    """

    first: int
    end: int
    kind: str
    run: int = 0
    x: float = 0.0
    width: float = 0.0

    @property
    def right(self) -> float:
        return self.x + self.width

    def value(self, row: Sequence[float | None]) -> float | None:
        """Of several tokens, the value that is furthest from zero: no effect is averaged away."""
        known = [value for value in row[self.first : self.end] if value is not None]
        return max(known, key=abs) if known else None


def columns(trace: Trace) -> tuple[list[Column], int]:
    """Columns from left to right, and how many tokens have no room; ever more kinds of runs are drawn narrow."""
    most = max(16, _MOST_CELLS // len(trace.layers))
    found: list[Column] = []
    for narrow in (("image",), ("image", "template"), ("image", "template", "question", ""), None):
        found = _divided(trace, narrow)
        if len(found) <= most and _extent(found, _COLUMN) <= WIDTH:
            break
    while len(found) > 1 and (len(found) > most or _extent(found, _COLUMN) > WIDTH):
        found = found[: max(1, min(most, len(found) - max(1, len(found) // 8)))]
    single = sum(not column.run for column in found)
    width = min(_WIDEST, max(_COLUMN, (WIDTH - _extent(found, 0.0)) / single)) if single else 0.0
    return _placed(found, width), len(trace.tokens) - found[-1].end


def _divided(trace: Trace, narrow: Sequence[str] | None) -> list[Column]:
    """Tokens by themselves, and runs of the kinds named (None: of any) in parts that are about equally long."""
    kinds = ["image" if kind in _IMAGE else kind for kind in trace.classes]
    runs = [list(group) for _, group in groupby(range(len(kinds)), key=lambda i: kinds[i])]
    thin = [len(run) > _RUN and (narrow is None or kinds[run[0]] in narrow) for run in runs]
    parts = max(1, min(_PARTS, _MOST_PARTS // max(1, sum(thin))))
    found: list[Column] = []
    for run, is_thin in zip(runs, thin, strict=True):
        count = min(parts, len(run)) if is_thin else len(run)
        cuts = [run[0] + len(run) * i // count for i in range(count + 1)]
        size = sum(trace.sizes[run[0] : run[-1] + 1]) if is_thin else 0
        found += [Column(first, end, kinds[run[0]], size) for first, end in pairwise(cuts)]
    return found


def _extent(found: Sequence[Column], width: float) -> float:
    """How wide columns are together, tokens by themselves being ``width``, with the gaps around runs."""
    gaps = sum(_separated(a, b) for a, b in pairwise(found))
    return sum(_NARROW if column.run else width for column in found) + _GAP * gaps


def _separated(one: Column, other: Column) -> bool:
    """Whether a gap stands between two columns: around runs."""
    return bool(one.run or other.run) and (one.run, one.kind) != (other.run, other.kind)


def _placed(found: Sequence[Column], width: float) -> list[Column]:
    placed: list[Column] = []
    x = 0.0
    for column in found:
        x += _GAP if placed and _separated(placed[-1], column) else 0.0
        placed.append(replace(column, x=x, width=_NARROW if column.run else width))
        x = placed[-1].right
    return placed


@without_validation
def trace_map(trace: Trace, trained: TrainedLayers, *, tips: bool = True, headed: bool = False) -> Figure:
    """The heat map of a trace.

    Args:
        trace: Which.
        trained: Which layers train: they are marked at the side.
        tips: Whether each cell says its value when pointed at.
        headed: With its question above it, for a picture that stands alone.
    """
    axis = LayerAxis.over(trace.layers, trained, first=0)
    found, left_out = columns(trace)
    plot = Columns(0, found[-1].right, found[-1].right)
    scale = ColorScale.symmetric(
        max((abs(v) for row in trace.values for v in row if v is not None), default=0.0) or 1.0
    )
    labels, depth = _token_labels(trace, found)
    below = axis.height + depth
    known, undefined = _cell_rows(trace, found)
    legend, legend_data = color_legend(scale, plot, below + 20, percent, _LEGEND)
    note = f"{left_out:,} further tokens are not drawn" if left_out else ""
    heading = [trace.text[:130], f"{trace.title}: {trace.summary}"[:150]]
    heading.append(f"{probability_drop(trace)}; strongest: {peak_words(trace)}"[:150])
    data: dict[str, list[dict[str, Any]]] = {
        "trained": axis.trained_runs,
        "cells": known,
        "undefined": undefined,
        "tokens": labels,
        "constraint": [{"x": x} for x in _constraint_sides(found)],
        "peak": list(_peak_row(trace, found)),
        "note": [{"text": note, "align": "left"}] if note else [],
        "heading": [
            {"y": 20 + 17 * i - _HEADING - _TOP, "text": printable(line), "align": "left", "strong": i == 0}
            for i, line in enumerate(heading if headed else [])
        ],
        **_brackets(found),
    }
    views = _views(axis, plot, scale, legend, below)
    chart = layered(data | legend_data, views, plot.width, axis.height)
    top = _TOP + _HEADING * headed
    size = (_LEFT + WIDTH + _RIGHT, top + below + 48)
    words, live = f"{trace.title}: {peak_words(trace)}", axis.live(top, kind="cells")
    return Figure(
        chart, data | legend_data, size, (_LEFT, top), words, table=_table(trace, found), live=live, tips=tips
    )


def _table(trace: Trace, found: Sequence[Column]) -> ChartTable:
    """The cells as they are drawn: a column that stands for several tokens holds their strongest value."""
    rows = [
        (layer, *_token(trace, column), column.value(row))
        for layer, row in zip(trace.layers, trace.values, strict=True)
        for column in found
    ]
    merged = any(column.end - column.first > 1 for column in found)
    note = "Of tokens drawn as one column, the strongest; traces.json holds each." if merged else ""
    return ChartTable(("layer", "position", "token", "kind of token", "restored"), rows, note)


def _token(trace: Trace, column: Column) -> tuple[int, str, str]:
    """Position, text and kind of the first token of a column."""
    first = column.first
    return trace.positions[first], printable(trace.tokens[first]), _kind_name(trace.classes[first])


def _views(
    axis: LayerAxis, plot: Columns, scale: ColorScale, legend: Sequence[alt.Chart], below: float
) -> list[alt.Chart]:
    """Cells from the back to what is written around them at the front."""
    x, above = plot.at("x"), alt.YValue(-5)
    ink = {"color": theme.INK, "strokeWidth": 1.2}
    bracket = {"color": either("strong", theme.INK, theme.QUIET), "strokeWidth": 1.5}
    pixels = alt.Y(field="y", type="quantitative", scale=None)
    return [
        axis.trained_bar(),
        *cells(axis, plot, scale, description=tip()),
        *axis.trained_edges(plot.width),
        view("constraint", "constraint", "rule", **ink).encode(x=x, y=above, y2=alt.Y2Value(axis.height + 3)),
        view("brackets", "brackets", "rule", **bracket).encode(**plot.span(), y=above),
        text("kinds", "kinds", x, -11),
        text("tokens", "tokens", x, axis.height + 11, angle=298, aria=True).encode(description=tip()),
        *legend,
        *ring(x, axis.at("layer"), max(5.0, axis.row / 2 + 2)),
        *axis.pointed_at(plot.width),
        text("note", "note", 220, below + 27),
        text("heading", "heading", 0, pixels),
    ]


def peak_words(trace: Trace) -> str:
    """Where most is restored, in words."""
    best = trace.strongest
    if best is None:
        known = any(value is not None for row in trace.values for value in row)
        return "nothing comes back anywhere" if known else "undefined everywhere"
    layer, token = best
    name = trace.tokens[token].strip()[:24]
    where = f"“{name}”" if name else _kind_name(trace.classes[token])
    return f"{percent(trace.values[layer][token] or 0.0)} at {layer_name(trace.layers[layer])}, {where}"


def probability_drop(trace: Trace) -> str:
    """What the corruption does to the answer: “ Paris”: 90 % clean, 10 % corrupt."""
    spelled = ["not told" if p is None else percent(p) for p in (trace.p_clean, trace.p_corrupt)]
    return f"“{trace.target.strip()[:40]}”: {spelled[0]} clean, {spelled[1]} corrupt"


def _cell_rows(trace: Trace, found: Sequence[Column]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Cells with a value, and cells without."""
    known: list[dict[str, Any]] = []
    undefined: list[dict[str, Any]] = []
    names = [printable(_column_name(trace, column)) for column in found]
    for layer, row in zip(trace.layers, trace.values, strict=True):
        for name, column in zip(names, found, strict=True):
            value = column.value(row)
            cell = {"layer": layer, "left": column.x, "right": column.right, "low": layer - 0.5, "high": layer + 0.5}
            words = f"{layer_name(layer)}, {name}: {'undefined' if value is None else percent(value)}"
            (undefined if value is None else known).append(cell | {"value": value, "tip": words})
    return known, undefined


def _column_name(trace: Trace, column: Column) -> str:
    kind, size = _kind_name(trace.classes[column.first]), sum(trace.sizes[column.first : column.end])
    if size > 1:
        several = ", the strongest" if column.end - column.first > 1 else ""
        return f"{size} tokens from {trace.positions[column.first]} ({kind}){several}"
    name = trace.tokens[column.first].strip("\n")[:60]
    return f"token {trace.positions[column.first]} “{name}” ({kind})" if name else f"{kind} token"


def _kind_name(name: str) -> str:
    return TOKEN_CLASSES.get(name, name or "token")


def _token_labels(trace: Trace, found: Sequence[Column]) -> tuple[list[dict[str, Any]], float]:
    """Token texts, to stand turned below their columns, and how far down they reach in pixels."""
    rows: list[dict[str, Any]] = []
    for column in found:
        token = trace.tokens[column.first]
        label = "" if column.run else _shortened(token.strip() or token.replace(" ", "␣"))
        if label:
            words = f"{token[:300]} ({_kind_name(trace.classes[column.first])})" if label != token.strip() else ""
            strong = column.kind in ("constraint", "last")
            middle = {"x": column.x + column.width / 2 + 3, "align": "right"}
            rows.append({**middle, "text": label, "strong": strong, "tip": printable(words)})
    return rows, 6 + 0.88 * _LETTER * max((text_width(row["text"]) for row in rows), default=0)


def _shortened(token: str) -> str:
    """As much of a text as fits beneath a column."""
    token, kept = printable(token.replace("\n", "↵").replace("\t", "⇥")), ""
    for letter in token:
        if text_width(kept + letter) > _LETTERS:
            return kept + "…"
        kept += letter
    return kept


def _runs(found: Sequence[Column]) -> list[list[Column]]:
    return [list(group) for _, group in groupby(found, key=lambda c: (c.kind, bool(c.run), c.run))]


def _constraint_sides(found: Sequence[Column]) -> list[float]:
    """Where upright lines enclose the tokens of the constraint."""
    return [x for run in _runs(found) if run[0].kind == "constraint" for x in (run[0].x, run[-1].right)]


def _brackets(found: Sequence[Column]) -> dict[str, list[dict[str, Any]]]:
    """What the tokens are, above them: the constraint first, then what has room."""
    taken: list[tuple[float, float]] = []
    brackets, names = [], []
    order = {"constraint": 0, "image": 1, "last": 2}
    for run in sorted(_runs(found), key=lambda run: (order.get(run[0].kind, 3), -len(run))):
        kind, size, left, right = run[0].kind, run[0].run, run[0].x, run[-1].right
        strong = kind == "constraint"
        brackets.append({"left": left + 0.6, "right": right - 0.6, "strong": strong})
        name = "picture" if kind == "image" else {"question": "question", "last": "last"}.get(kind, _kind_name(kind))
        for words in (f"{size:,} {name} tokens", f"{size:,} {name}", f"{size:,}") if size else (name,):
            half = _LETTER * len(words) / 2 + 2
            middle = max((left + right) / 2, half - 8)  # to the right of the axis title
            if all(middle + half <= a or middle - half >= b for a, b in taken):
                taken.append((middle - half, middle + half))
                names.append({"x": middle, "text": printable(words), "strong": strong})
                break
    return {"brackets": brackets, "kinds": names}


def _peak_row(trace: Trace, found: Sequence[Column]) -> Iterator[dict[str, Any]]:
    """The cell where most is restored, where it is drawn."""
    best = trace.strongest
    for column in found:
        if best and column.first <= best[1] < column.end:
            yield {"x": column.x + column.width / 2, "layer": trace.layers[best[0]]}


def save_trace(trace: Trace | Mapping[str, Any], path: str | Path, trained: Sequence[int] = ()) -> Path:
    """Save one trace as a picture: layers upwards, tokens to the right, blue to rust by how much is restored.

    Args:
        trace: A trace, or an item of traces.json.
        path: Ends in .svg or .png.
        trained: The layers that train, to be marked.

    Returns:
        The path.

    Raises:
        UserError: If the ending is another, the item is no trace, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise UserError(f"{path.name} is no picture of a trace.", "It must end in .svg or .png.", "Name such a file.")
    try:
        known = trace if isinstance(trace, Trace) else Trace.of(trace)
        figure = trace_map(known, TrainedLayers(tuple(sorted(trained))), headed=True)
        if path.suffix.lower() == ".svg":
            path.write_text(figure.svg(standalone=True), encoding="utf-8", errors="replace")
        else:
            path.write_bytes(figure.png())
    except OSError as error:
        raise UserError(f"{path} cannot be written.", str(error), "Name a file that you may write.") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError("This is no trace.", str(error), "Give an item of traces.json.") from error
    return path
