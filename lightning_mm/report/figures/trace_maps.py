"""A causal trace as a heat map: layers upwards, tokens to the right; runs of a picture's tokens are drawn narrow.

Data flow: ``traces.Trace`` -> columns (a token, or part of a run) -> shapes of ``drawing``.

Shapes: L layers x C columns; the sign of a value has its own colour, zero has none.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError
from lightning_mm.core.measure_catalog import TOKEN_CLASSES
from lightning_mm.report.figures import colors
from lightning_mm.report.figures.drawing import Box, Drawing, Ring, Shape, Strokes, Words, hatched, printable, wide
from lightning_mm.report.figures.layer_axis import LayerAxis
from lightning_mm.report.figures.trace_columns import LEFT, WIDTH, Column, columns
from lightning_mm.report.tables.numbers import percent
from lightning_mm.report.tables.panels import Trained, short_name, spoken
from lightning_mm.report.tables.traces import Trace

_TOP, _LETTERS, _LETTER = 24.0, 14, 6.2


def trace_map(trace: Trace, trained: Trained, *, tips: bool = True, headed: bool = False) -> Drawing:
    """Draw a trace.

    Args:
        trace: Which.
        trained: Which layers train: they are marked at the side.
        tips: Whether each cell says its value when pointed at.
        headed: With its question above it, for a picture that stands alone.
    """
    axis = LayerAxis(min(0, *trace.layers), max(trained.total - 1, *trace.layers), trained, _TOP + 54 * headed)
    found, left_out = columns(trace)
    right = found[-1].x + found[-1].width
    labels, depth = _labels(trace, found, axis.bottom + 11)
    reach = max((abs(v) for row in trace.values for v in row if v is not None), default=0.0) or 1.0
    shapes: list[Shape] = [
        *_cells(trace, found, axis, reach, tips),
        *side(axis, LEFT),
        *edges(axis, LEFT, right),
        *_frames(trace, found, axis),
        *_brackets(found, axis.top - 5),
        *labels,
        *_ring(trace, found, axis),
        *legend(LEFT, axis.bottom + depth + 20, reach),
        *(_heading(trace) if headed else ()),
    ]
    if left_out:
        shapes.append(Words(LEFT + 220, axis.bottom + depth + 27, f"{left_out:,} further tokens are not drawn"))
    return Drawing(WIDTH, axis.bottom + depth + 48, f"{trace.title}: {peak_words(trace)}", tuple(shapes))


def peak_words(trace: Trace) -> str:
    """Where most comes back, in words."""
    best = trace.strongest
    if best is None:
        known = any(value is not None for row in trace.values for value in row)
        return "nothing comes back anywhere" if known else "undefined everywhere"
    layer, token = best
    where = f"“{trace.tokens[token].strip()[:24]}”" if trace.tokens[token].strip() else _kind(trace.classes[token])
    return f"{percent(trace.values[layer][token] or 0.0)} at {spoken(trace.layers[layer])}, {where}"


def side(axis: LayerAxis, left: float) -> Iterator[Shape]:
    """The layer numbers, and a bar beside what trains."""
    tip = {"trained": "these layers train", "chosen": "these layers were chosen"}[axis.trained.word]
    for top, bottom in axis.stretches:
        yield Box(left - 9, top, 4, bottom - top, "trained-bar", tip)
    for layer in axis.numbered:
        look = "trained-number" if layer in axis.trained.layers else ""
        yield Words(left - 13, axis.y(layer) + 3.8, short_name(layer), look, "end")


def edges(axis: LayerAxis, left: float, right: float) -> Iterator[Shape]:
    """Lines along both edges of what trains, across the cells."""
    if axis.stretches:
        yield Strokes([(left, y, right, y) for stretch in axis.stretches for y in stretch], "trained-edge")


def legend(left: float, y: float, reach: float) -> Iterator[Shape]:
    """The colours from the strongest harm to the strongest restoring, zero in the middle."""
    width = 176 / len(colors.SIGNED_LIGHT)
    for level in range(len(colors.SIGNED_LIGHT)):
        yield Box(left + level * width, y, width + 0.3, 8, f"d{level}")
    yield Words(left, y + 20, percent(-reach))
    yield Words(left + 88, y + 20, "0", anchor="middle")
    yield Words(left + 176, y + 20, percent(reach), anchor="end")


def _value(row: Sequence[float | None], column: Column) -> float | None:
    """Of several tokens, the value that is furthest from zero: no effect is averaged away."""
    known = [value for value in row[column.first : column.end] if value is not None]
    return max(known, key=abs) if known else None


def _cells(trace: Trace, found: Sequence[Column], axis: LayerAxis, reach: float, tips: bool) -> Iterator[Shape]:
    void = []
    for layer, row in zip(trace.layers, trace.values, strict=True):
        y = axis.y(layer) - axis.row / 2
        for column in found:
            value = _value(row, column)
            if value is None:
                void.append(Box(column.x, y, column.width, axis.row, "none"))
                continue
            look = f"d{colors.signed_level(value / reach)}"
            tip = f"{spoken(layer)}, {_who(trace, column)}: {percent(value)}" if tips else ""
            yield Box(column.x, y, column.width, axis.row, look, tip)
    if void:
        yield from void
        yield hatched(void)


def _who(trace: Trace, column: Column) -> str:
    """A column in words."""
    kind, size = _kind(trace.classes[column.first]), sum(trace.sizes[column.first : column.end])
    if size > 1:
        several = ", the strongest" if column.end - column.first > 1 else ""
        return f"{size} tokens from {trace.positions[column.first]} ({kind}){several}"
    text = trace.tokens[column.first].strip("\n")[:60]
    return f"token {trace.positions[column.first]} “{text}” ({kind})" if text else f"{kind} token"


def _kind(name: str) -> str:
    return TOKEN_CLASSES.get(name, name or "token")


def _labels(trace: Trace, found: Sequence[Column], y: float) -> tuple[list[Shape], float]:
    """Token texts below their columns, and how far down they reach."""
    drawn: list[Shape] = []
    longest = 0
    for column in found:
        if column.run:
            continue
        text = trace.tokens[column.first]
        spelled = _cut(text.strip() or text.replace(" ", "␣"))
        look = "strong" if column.kind in ("constraint", "last") else ""
        if spelled:
            longest = max(longest, wide(spelled))
            x = column.x + column.width / 2 + 3
            tip = f"{text[:300]} ({_kind(trace.classes[column.first])})" if spelled != text.strip() else ""
            drawn.append(Words(x, y, spelled, look, "end", -62, tip))
    return drawn, 6 + 0.88 * _LETTER * longest


def _cut(text: str) -> str:
    """So much of a text as fits beneath a column."""
    text, kept = printable(text.replace("\n", "↵").replace("\t", "⇥")), ""
    for letter in text:
        if wide(kept + letter) > _LETTERS:
            return kept + "…"
        kept += letter
    return kept


def _stretches(found: Sequence[Column]) -> list[list[Column]]:
    return [list(group) for _, group in groupby(found, key=lambda c: (c.kind, bool(c.run), c.run))]


def _frames(trace: Trace, found: Sequence[Column], axis: LayerAxis) -> Iterator[Shape]:
    """Upright lines on both sides of the constraint's tokens."""
    sides = [
        x
        for stretch in _stretches(found)
        if stretch[0].kind == "constraint"
        for x in (stretch[0].x, stretch[-1].x + stretch[-1].width)
    ]
    if sides:
        yield Strokes([(x, axis.top - 5, x, axis.bottom + 3) for x in sides], "frame")


def _brackets(found: Sequence[Column], y: float) -> Iterator[Shape]:
    """What the tokens are, above them: the constraint first, then runs, then what has room."""
    taken: list[tuple[float, float]] = []
    order = {"constraint": 0, "image": 1, "last": 2}
    for stretch in sorted(_stretches(found), key=lambda s: (order.get(s[0].kind, 3), -len(s))):
        kind, run = stretch[0].kind, stretch[0].run
        left, right = stretch[0].x, stretch[-1].x + stretch[-1].width
        look = "frame" if kind == "constraint" else "bracket"
        yield Strokes([(left + 0.6, y, right - 0.6, y)], look)
        name = "picture" if kind == "image" else {"question": "question", "last": "last"}.get(kind, _kind(kind))
        shown = (f"{run:,} {name} tokens", f"{run:,} {name}", f"{run:,}") if run else (name,)
        for words in shown:
            half, middle = _LETTER * len(words) / 2 + 2, max((left + right) / 2, _LETTER * len(words) / 2 + 4)
            if all(middle + half <= a or middle - half >= b for a, b in taken):
                taken.append((middle - half, middle + half))
                yield Words(middle, y - 6, words, "strong" if kind == "constraint" else "", "middle")
                break


def _ring(trace: Trace, found: Sequence[Column], axis: LayerAxis) -> Iterator[Shape]:
    """About the cell where most comes back, where it is drawn."""
    best = trace.strongest
    for column in found:
        if best and column.first <= best[1] < column.end:
            yield Ring(column.x + column.width / 2, axis.y(trace.layers[best[0]]), max(5.0, axis.row / 2 + 2))


def _heading(trace: Trace) -> Iterator[Shape]:
    yield Words(LEFT, 20, trace.text[:130], "strong")
    yield Words(LEFT, 37, f"{trace.title}: {trace.said}"[:150])
    yield Words(LEFT, 54, f"{fall(trace)}; strongest: {peak_words(trace)}"[:150])


def fall(trace: Trace) -> str:
    """What the corruption does to the answer: “ Paris”: 90 % clean, 10 % corrupt."""
    spelled = ["not told" if p is None else percent(p) for p in (trace.p_clean, trace.p_corrupt)]
    return f"“{trace.target.strip()[:40]}”: {spelled[0]} clean, {spelled[1]} corrupt"


def save_trace(trace: Trace | Mapping[str, Any], path: str | Path, trained: Sequence[int] = ()) -> Path:
    """Save one trace as a picture: layers upwards, tokens to the right, blue to rust by how much comes back.

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
        drawing = trace_map(known, Trained(tuple(sorted(trained))), headed=True)
        if path.suffix.lower() == ".svg":
            path.write_text(drawing.svg(alone=True), encoding="utf-8", errors="replace")
        else:
            drawing.image().save(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written.", str(error), "Name a file that you may write.") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError("This is no trace.", str(error), "Give an item of traces.json.") from error
    return path
