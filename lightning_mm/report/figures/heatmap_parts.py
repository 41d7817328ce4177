"""Parts that the figures over layers share: the layer axis, color scales with their legend, cells, and hatching.

Data flow: figure functions ask for views over named rows here, and layer them.

Shapes: L layers upwards; sizes in CSS pixels, positions to the right in the units of the figure's horizontal scale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import altair as alt

from lightning_mm.report.figures import theme
from lightning_mm.report.figures.figure import AXIS_TITLE, across, down, number, tip, view
from lightning_mm.report.tables.panels import EMBEDDINGS, Panel, TrainedLayers

UNDEFINED = "undefined: the reason stands below"
"""What a cell without a value says."""
_ROW, _TALLEST, _LABEL_GAP = 14.0, 240.0, 13.0


@dataclass(frozen=True)
class LayerAxis:
    """The vertical axis of a figure: embeddings at the bottom, the last layer at the top.

    Args:
        first: The lowest layer.
        last: The highest.
        trained: Which layers train.
        labels: Whether the layer numbers stand to the left of the view.
    """

    first: int
    last: int
    trained: TrainedLayers
    labels: bool = True

    @classmethod
    def over(cls, layers: Sequence[int], trained: TrainedLayers, first: int = EMBEDDINGS) -> "LayerAxis":
        """An axis that holds the measured layers and all layers of the model, from ``first`` or lower."""
        return cls(min(first, *layers), max(trained.total - 1, *layers, 0), trained)

    @property
    def row(self) -> float:
        """Height of one layer in pixels."""
        return min(_ROW, _TALLEST / (self.last - self.first + 1))

    @property
    def height(self) -> float:
        return self.row * (self.last - self.first + 1)

    @property
    def scale(self) -> dict[str, Any]:
        return {"domain": [self.first - 0.5, self.last + 0.5], "nice": False, "zero": False}

    def y(self, layer: float) -> float:
        """The middle of a layer's row, in pixels from the top."""
        return self.height - (layer - self.first + 0.5) * self.row

    def rows(self, low: str = "low", high: str = "high") -> dict[str, Any]:
        """Encodings of marks that reach from one field to another on this axis."""
        return {"y": self.at(low), "y2": alt.Y2(field=high)}

    def at(self, field: str) -> alt.Y:
        """Encoding of a field on this axis."""
        return alt.Y(**number(field, scale=self.scale, axis=self._numbers() if self.labels else None))

    def across(self) -> "Columns":
        """The same layers on a horizontal axis of the same length, its numbers below."""
        placed = {"labelPadding": 8, "orient": "bottom", "titleX": self.height, "titleY": 30}
        axis = self._numbers(**placed, titleBaseline="alphabetic")
        return Columns(self.first - 0.5, self.last + 0.5, self.height, axis)

    def _numbers(self, **options: Any) -> dict[str, Any]:
        """The layer numbers, those of trained layers in bold teal."""
        trained = f"indexof({[layer for layer in self.numbered if layer in self.trained.layers]}, datum.value) >= 0"
        return {
            "values": list(self.numbered),
            **AXIS_TITLE,
            "title": "layer",
            "titleAngle": 0,
            "titleAnchor": "end",
            "titleAlign": "right",
            "titleBaseline": "bottom",
            "titleX": -13,
            "titleY": -4,
            "labelExpr": "datum.value < 0 ? 'emb' : format(datum.value, 'd')",
            "labelOverlap": False,
            "labelColor": {"condition": {"test": trained, "value": theme.TEAL}, "value": theme.SOFT},
            "labelFontWeight": {"condition": {"test": trained, "value": "bold"}, "value": "normal"},
            "labelPadding": 13,
            **options,
        }

    @cached_property
    def trained_runs(self) -> list[dict[str, Any]]:
        """One row for each run of neighboring trained layers."""
        inside = [layer for layer in self.trained.layers if self.first <= layer <= self.last]
        starts = [layer for layer in inside if layer - 1 not in inside]
        ends = [layer for layer in inside if layer + 1 not in inside]
        words = {"trained": "these layers train", "chosen": "these layers were chosen"}[self.trained.word]
        return [{"low": a - 0.5, "high": b + 0.5, "tip": words} for a, b in zip(starts, ends, strict=True)]

    @cached_property
    def numbered(self) -> tuple[int, ...]:
        """The layers whose numbers are printed: ends of what trains, then both ends, then round ones between."""
        wanted = [*self.trained.ends, self.last, self.first, *range(0, self.last, 10), *range(5, self.last, 10)]
        kept: list[int] = []
        for layer in wanted:
            apart = all(abs(self.y(layer) - self.y(other)) >= _LABEL_GAP for other in kept)
            if apart and self.first <= layer <= self.last:
                kept.append(layer)
        return tuple(sorted(kept))

    def live(self, top: float, **further: Any) -> dict[str, Any]:
        """Where the layers are in a figure, ``top`` pixels below its upper edge, for the report's script."""
        return dict(first=self.first, last=self.last, top=top, row=self.row, **further)

    def pointed_at(self, width: float) -> list[alt.Chart]:
        """In a browser: a band over the layers chosen there, and a frame around the layer that is pointed at."""
        frame = {"filled": False, "stroke": theme.INK, "strokeWidth": 1.1, "opacity": 0.75}
        return [
            view("brush", "brush", "rect", color=theme.INK, opacity=0.09).encode(**across(0, width), **self.rows()),
            view("hover", "hover", "rect", **frame).encode(**across(0, width), **self.rows()),
        ]

    def trained_band(self, name: str, left: float, right: float) -> alt.Chart:
        """A light band over the rows that train, from ``left`` to ``right`` in pixels."""
        return view("trained", name, "rect", color=theme.WASH).encode(**across(left, right), **self.rows())

    def trained_bar(self) -> alt.Chart:
        """A solid bar beside the rows that train."""
        marked = view("trained", "trained_bar", "rect", aria=True, color=theme.TEAL, cornerRadius=1.5)
        return marked.encode(**across(-10, -6), **self.rows(), description=tip())

    def trained_edges(self, right: float) -> list[alt.Chart]:
        """Lines along both edges of what trains, over cells that cover its band."""
        return [
            view("trained", f"trained_{end}", "rule", color=theme.TEAL, strokeWidth=1.4).encode(
                **across(0, right), y=self.at(end)
            )
            for end in ("low", "high")
        ]


@dataclass(frozen=True)
class ColorScale:
    """The values that a palette stands for.

    Args:
        low: The lowest value it shows.
        high: The highest.
        null: Expected value under chance; None where that is not known.
        reverse: The lowest value has the strongest color, since it is the one that counts.
        null_word: What ``null`` is called.
        signed: Colors differ by sign, and zero is colorless.
    """

    low: float
    high: float
    null: float | None = None
    reverse: bool = False
    null_word: str = "chance"
    signed: bool = False

    @classmethod
    def of(cls, panel: Panel, steps: Sequence[int]) -> "ColorScale":
        """From the values shown and chance; no narrower than an interval, so that noise does not look like change."""
        rows = [row for step in steps for row in panel.profile(step)]
        nulls = [row.null for row in rows if row.null is not None and panel.measure.from_chance]
        values = [row.value for row in rows if row.value is not None] or [0.0]
        null = sum(nulls) / len(nulls) if nulls else None
        low, high = min([*values, *nulls]), max([*values, *nulls])
        widths = sorted(row.high - row.low for row in rows if row.high is not None and row.low is not None)
        least = widths[len(widths) // 2] if widths else 0.0
        spare = max(0.0, max(least, 1e-3 * max(abs(low), abs(high)), 1e-9) - (high - low)) / 2
        return cls(low - spare, high + spare, null, panel.measure.seek == "min", panel.measure.null_word)

    @classmethod
    def symmetric(cls, reach: float) -> "ColorScale":
        """For signed values of at most ``reach`` either way; the middle color is for values that round to zero."""
        wide = reach * (theme.ARM + 0.5) / theme.ARM
        return cls(-wide, wide, signed=True)

    @property
    def palette(self) -> list[str]:
        """From the color of the lowest value to that of the highest."""
        colors = theme.SIGNED if self.signed else theme.SEQUENTIAL
        return colors[::-1] if self.reverse else colors

    def encoding(self, field: str = "value") -> alt.Color:
        scale = {"type": "quantize", "domain": [self.low, self.high], "range": self.palette}
        return alt.Color(**number(field, scale=scale, legend=None))

    def share(self, value: float) -> float:
        """How far along the legend a value is, 0 at its left end."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return 1 - share if self.reverse else share

    @property
    def ends(self) -> tuple[float, float]:
        """The values at the left and at the right end of the legend."""
        return (self.high, self.low) if self.reverse else (self.low, self.high)

    def rounded(self, value: float) -> float:
        """A value without the digits that the scale does not resolve."""
        return round(value, 1 - math.floor(math.log10(self.high - self.low))) + 0.0 if self.high > self.low else value


@dataclass(frozen=True)
class Columns:
    """The horizontal scale of a figure.

    Args:
        first: Where it begins, in its own units.
        last: Where it ends.
        width: In pixels.
        axis: Its numbers and rules; None draws none.
    """

    first: float
    last: float
    width: float
    axis: dict[str, Any] | None = None

    @property
    def scale(self) -> dict[str, Any]:
        return {"domain": [self.first, self.last], "nice": False, "zero": False, "clamp": True}

    def at(self, field: str) -> alt.X:
        """Encoding of a field on this scale."""
        return alt.X(**number(field, scale=self.scale, axis=self.axis))

    def span(self, left: str = "left", right: str = "right") -> dict[str, Any]:
        """Encodings of marks that reach from one field to another on this scale."""
        return {"x": self.at(left), "x2": alt.X2(field=right)}

    def share(self, share: float) -> float:
        """The position of a share of the width."""
        return self.first + share * (self.last - self.first)

    @property
    def pixel(self) -> float:
        """How much of the scale one pixel is."""
        return (self.last - self.first) / self.width


def cells(axis: LayerAxis, columns: Columns, scale: ColorScale, **encodings: Any) -> list[alt.Chart]:
    """Cells of the rows ``cells`` in the colors of their values, and those of ``undefined`` hatched."""
    place = columns.span() | axis.rows()
    return [
        view("cells", "cells", "rect", aria=bool(encodings.get("description"))).encode(
            **place, color=scale.encoding(), **encodings
        ),
        view("undefined", "undefined", "rect", aria=True, color=theme.PAPER).encode(**place, description=tip()),
        view("undefined", "hatch", "rule", color=theme.QUIET, strokeWidth=1).encode(**place),
    ]


def color_legend(
    scale: ColorScale, columns: Columns, y: float, spell: Callable[[float], str], width: float | None = None
) -> tuple[list[alt.Chart], dict[str, list[dict[str, Any]]]]:
    """A strip of the palette below a heat map with the values at its ends, and chance marked on it.

    Args:
        scale: What the colors stand for.
        columns: The horizontal scale of the heat map.
        y: Upper edge of the strip, in pixels from the top of the heat map.
        spell: How values are written.
        width: Of the strip in pixels; None is as wide as the heat map.

    Returns:
        The views, and the rows of their data.
    """
    count, (left, right) = len(scale.palette), scale.ends
    whole = 1.0 if width is None else width / columns.width
    at = [columns.share(whole * level / count) for level in range(count + 1)]
    overlap = 0.3 * columns.pixel  # hides the seams between blocks
    strip = [
        {"left": at[i], "right": at[i + 1] + overlap, "value": left + (right - left) * ((i + 0.5) / count)}
        for i in range(count)
    ]
    ends = [
        {"x": at[0], "text": spell(scale.rounded(left)), "align": "left"},
        {"x": at[-1], "text": spell(scale.rounded(right)), "align": "right"},
    ]
    if scale.signed:
        ends.insert(1, {"x": (at[0] + at[-1]) / 2, "text": "0", "align": "center"})
    null = []
    if scale.null is not None:
        words = f"{scale.null_word}: {spell(scale.null)}"
        null = [{"x": columns.share(whole * scale.share(scale.null)), "tip": words}]
    views = [
        view("scale", "scale", "rect").encode(**columns.span(), **down(y, y + 7), color=scale.encoding()),
        text("scale_ends", "scale_ends", columns.at("x"), y + 19),
        view(
            "scale_null", "scale_null", "rule", aria=True, color=theme.INK, strokeWidth=1.4, strokeDash=[2, 2.5]
        ).encode(x=columns.at("x"), **down(y - 3, y + 7), description=tip()),
    ]
    return views, {"scale": strip, "scale_ends": ends, "scale_null": null}


def text(data: str, name: str, x: alt.X | float, y: alt.Y | float, **options: Any) -> alt.Chart:
    """The texts of rows at their baseline: aligned as their field ``align`` says, dark and bold where ``strong``.

    Args:
        data: The rows.
        name: The name of the view.
        x: A field, or pixels from the left edge.
        y: A field, or pixels from the top.
        options: Further properties of the mark.
    """
    by_row = {"color": either("strong", theme.INK, theme.SOFT), "fontWeight": either("strong", "bold", "normal")}
    mark = {"baseline": "alphabetic", "align": {"expr": "datum.align || 'center'"}, **by_row, **options}
    return view(data, name, "text", **mark).encode(
        x=x if isinstance(x, alt.X) else alt.XValue(x),
        y=y if isinstance(y, alt.Y) else alt.YValue(y),
        text=alt.Text(field="text", type="nominal"),
    )


def either(field: str, yes: str | float, no: str | float) -> dict[str, str]:
    """A property of a mark that has one value where a field of its row is true, and another where it is not."""
    return {"expr": f"datum.{field} ? {yes!r} : {no!r}"}


def ring(x: alt.X, y: alt.Y, radius: float) -> list[alt.Chart]:
    """A circle around the cell of the row ``peak``, with a pale border that sets it off from any color."""
    size = math.pi * radius**2
    styles = (("peak_halo", theme.CARD, 4.4), ("peak", theme.INK, 1.8))
    return [
        view(
            "peak", name, "point", shape="circle", size=size, filled=False, color=color, strokeWidth=width, opacity=1
        ).encode(x=x, y=y)
        for name, color, width in styles
    ]
