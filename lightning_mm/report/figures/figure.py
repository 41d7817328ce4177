"""A Vega-Lite chart with its data and its description, rendered without a browser or network.

Data flow: figure functions build an altair chart over named tables of rows -> ``Figure`` -> ``spec`` (self-contained
Vega-Lite JSON), ``svg`` (inline in report.html, or a file), ``png``, or ``live_spec`` (the same chart for a
browser, with empty tables that the report's script fills where the reader points). Texts in the rows may come from a
tokenizer or a damaged file: Vega escapes them, ``printable`` removes what XML forbids.

Shapes: sizes are in CSS pixels; the margins around the plot are fixed, so that text has the same size in every figure.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, wraps
from html import escape
from typing import Any, ParamSpec, TypeVar

import altair as alt
import vl_convert

from lightning_mm.report.figures import theme
from lightning_mm.report.tables.chart_table import ChartTable

Rows = Sequence[Mapping[str, Any]]
P = ParamSpec("P")
R = TypeVar("R")

_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": theme.FONT,
    "view": {"stroke": None},
    "text": {"fontSize": theme.FONT_SIZE, "color": theme.SOFT},
    "axis": {
        "domain": False,
        "ticks": False,
        "grid": False,
        "labelColor": theme.SOFT,
        "labelFontSize": theme.FONT_SIZE,
    },
}
LIVE = frozenset({"brush", "hover", "hover_points"})
"""Names of tables that are empty in a file and filled in a browser: the layers chosen, and what is pointed at."""
AXIS_TITLE = {"titleColor": theme.SOFT, "titleFontSize": theme.FONT_SIZE, "titleFontWeight": "normal"}
_BIDI_CONTROLS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_ROOT = re.compile(r'^<svg [^>]*><g [^>]*transform="translate\([^)]*\)"[^>]*>')
_FRAMES = re.compile(r'<path class="(?:background|foreground)"[^>]*/>')
_TAG = re.compile(r"<[^>]*>")
_ROLES = re.compile(r' (?:role|aria-roledescription|aria-hidden|pointer-events)="[^"]*"')
_AXIS_LABEL = re.compile(r'(<g class="mark-group role-axis"[^>]*) aria-label="[^"]*"')
_TIPPED = re.compile(r'<(path|line) aria-label="([^"]*)"([^>]*)/>')
_TIPPED_TEXT = re.compile(r'<text aria-label="([^"]*)"([^>]*)>([^<]*)</text>')
_PATH_RUN = re.compile(r'(?:<path d="[^"]*"[^>]*/>){2,}')
_PATH = re.compile(r'<path d="([^"]*)"([^>]*)/>')
_DECIMALS = re.compile(r"-?\d+\.\d{3,}")
_GEOMETRY = re.compile(r' (?:d|transform)="[^"]*"')


@dataclass(frozen=True)
class Figure:
    """A chart and what is needed to show it.

    Args:
        chart: A view, or views side by side, over data that is referenced by name.
        data: The rows of each name.
        size: Width and height of the whole drawing, margins included.
        origin: Left and top margin: where the plot begins.
        description: What the figure shows in words, for screen readers.
    """

    chart: alt.LayerChart | alt.HConcatChart
    data: Mapping[str, Rows]
    size: tuple[float, float]
    origin: tuple[float, float]
    description: str
    attributes: str = field(default="", repr=False)
    """Further attributes of the svg element."""
    table: ChartTable | None = field(default=None, repr=False)
    """The numbers that the figure shows."""
    live: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Where its scales are, for the report's script: JSON values by name, see ``figures.live``."""
    tips: bool = True
    """Whether the cells of the SVG say their values when pointed at; those of ``live_spec`` always do."""

    @cached_property
    def _whole(self) -> dict[str, Any]:
        return _unvalidated_dict(self.chart)

    def spec(self) -> dict[str, Any]:
        """The chart as a self-contained Vega-Lite specification."""
        return self._with_data(_still(self._whole, tips=self.tips))

    def live_spec(self) -> dict[str, Any]:
        """The specification for a browser, with the views over ``LIVE`` tables."""
        return self._with_data(self._whole)

    def _with_data(self, spec: dict[str, Any]) -> dict[str, Any]:
        datasets = {name: list(self.data.get(name, ())) for name in dict.fromkeys(_data_names(spec))}
        return spec | {"config": _CONFIG, "datasets": datasets}

    def drawn(self) -> "Figure":
        """The figure itself, rendered: what cannot be drawn fails here and not in the page."""
        self.svg()
        return self

    @property
    def is_drawn(self) -> bool:
        """Whether it was rendered. Of one that was not, a page holds the live chart and the text table only."""
        return "_body" in self.__dict__

    def svg(self, *, standalone: bool = False) -> str:
        """The figure as SVG, for HTML; ``standalone`` it is a file of its own, on white."""
        body = self._body
        width, height = self.size
        root = f'viewBox="0 0 {width:.0f} {height:.0f}"{self.attributes}'
        paper = ""
        if standalone:
            root += f' xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
            paper = f'<rect width="100%" height="100%" fill="{theme.CARD}"/>'
        words = escape(printable(self.description))
        named = f'role="img" aria-label="{words}"><title>{words}</title>' if words else 'aria-hidden="true">'
        place = f"translate({self.origin[0]:g},{self.origin[1]:g})"
        return f'<svg {root} {named}{paper}<g fill="none" stroke-miterlimit="10" transform="{place}">{body}'

    @cached_property
    def _body(self) -> str:
        return _render(json.dumps(self.spec()))

    def png(self, scale: float = 2.0) -> bytes:
        """The figure as PNG, ``scale`` pixels for each CSS pixel."""
        return vl_convert.svg_to_png(self.svg(standalone=True), scale=scale)


def without_validation(build: Callable[P, R]) -> Callable[P, R]:
    """Build charts without checking every part against the JSON schema, which is slow; tests check whole charts."""

    @wraps(build)
    def quick(*args: P.args, **kwargs: P.kwargs) -> R:
        with alt.utils.schemapi.debug_mode(False):
            return build(*args, **kwargs)

    return quick


_SCHEMA = alt.SCHEMA_URL


def _unvalidated_dict(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """What ``chart.to_dict()`` gives for charts over named data, config left out, at a tenth of its cost."""
    return {"$schema": _SCHEMA, **_plain(chart)}


def _plain(value: Any) -> Any:
    """Parts of a chart as dicts, lists and values, without what is undefined."""
    if isinstance(value, alt.SchemaBase):
        if value._args:
            return _plain(value._args[0])
        return {name: _plain(part) for name, part in value._kwds.items() if part is not alt.Undefined}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items() if part is not alt.Undefined}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _still(spec: dict[str, Any], *, tips: bool) -> dict[str, Any]:
    """A specification without the views over ``LIVE`` tables; without ``tips``, cells do not say their values."""
    spec = dict(spec)
    if "hconcat" in spec:
        spec["hconcat"] = [_still(part, tips=tips) for part in spec["hconcat"]]
    if "layer" in spec:
        views = [view for view in spec["layer"] if view["data"]["name"] not in LIVE]
        spec["layer"] = views if tips else [_silent(view) if view.get("name") == "cells" else view for view in views]
    return spec


def _silent(view: dict[str, Any]) -> dict[str, Any]:
    encoding = {channel: value for channel, value in view["encoding"].items() if channel != "description"}
    return view | {"mark": view["mark"] | {"aria": False}, "encoding": encoding}


def _data_names(spec: Any) -> list[str]:
    """The names of the data that a specification refers to."""
    if isinstance(spec, list):
        return [name for part in spec for name in _data_names(part)]
    if not isinstance(spec, dict):
        return []
    inner = [name for key in ("hconcat", "layer") for name in _data_names(spec.get(key))]
    return inner + ([spec["data"]["name"]] if "data" in spec else [])


@lru_cache(maxsize=256)  # a report is written anew after every evaluation, and most of its figures stay as they are
def _render(spec: str) -> str:
    """What Vega draws, from inside its root group to the end, made small: no frames, cells of one color as one path."""
    drawn = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
    drawn, found = _ROOT.subn("", drawn)
    assert found == 1, "the renderer writes an svg element and a root group"
    drawn = _TAG.sub(_plain_tag, _AXIS_LABEL.sub(r"\1", _FRAMES.sub("", drawn)))
    drawn = _TIPPED.sub(r"<\1\3><title>\2</title></\1>", drawn)
    drawn = _TIPPED_TEXT.sub(r"<text\2>\3<title>\1</title></text>", drawn)
    drawn = drawn.replace("<title></title>", "").replace(
        '<g class="mark-rect', '<g shape-rendering="crispEdges" class="mark-rect'
    )
    return _PATH_RUN.sub(_merged, drawn)


def _plain_tag(tag: re.Match[str]) -> str:
    """A tag without roles, which the root element replaces, and with coordinates to a hundredth of a pixel."""
    return _GEOMETRY.sub(lambda match: _DECIMALS.sub(_rounded, match[0]), _ROLES.sub("", tag[0]))


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _merged(paths: re.Match[str]) -> str:
    """Paths that look alike as one path."""
    outlines: dict[str, list[str]] = {}
    for outline, look in _PATH.findall(paths[0]):
        outlines.setdefault(look, []).append(outline)
    return "".join(f'<path d="{"".join(parts)}"{look}/>' for look, parts in outlines.items())


def printable(text: str) -> str:
    """A text without what XML forbids, and without what changes the direction of the text around it."""
    if text.isprintable():
        return text
    return "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI_CONTROLS or ord(c) & 0xFFFE == 0xFFFE else c
        for c in text
    )


def text_width(text: str) -> int:
    """How many ordinary letters a text is as wide as: East Asian characters and emoji count twice."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def view(data: str, name: str, mark: str, **options: Any) -> alt.Chart:
    """Marks over named rows, with the class ``<name>_marks`` in the SVG.

    Properties are given as dicts: altair copies its own objects, with all that is undefined in them, many times over.

    Args:
        data: The name of the rows.
        name: Unique in the figure.
        mark: rect, rule, line, area, point or text.
        options: Properties of the mark; marks with a ``description`` need ``aria=True``.
    """
    return alt.Chart(alt.NamedData(data), name=name, mark={"type": mark, "aria": False, **options})  # type: ignore[arg-type]


class _Layers(alt.LayerChart):
    """Layers without parameters: to merge parameters, altair's own class copies all layers several times."""

    def __init__(self, **kwargs: Any) -> None:
        super(alt.LayerChart, self).__init__(**kwargs)


class _SideBySide(alt.HConcatChart):
    """Views without parameters side by side, like ``_Layers``."""

    def __init__(self, **kwargs: Any) -> None:
        super(alt.HConcatChart, self).__init__(**kwargs)


def layered(data: Mapping[str, Rows], views: Iterable[alt.Chart], width: float, height: float) -> alt.LayerChart:
    """Those of the views that have rows to show, or may have in a browser, from the back to the front."""
    shown = [view for view in views if view.data.name in LIVE or data[view.data.name]]
    return _Layers(layer=shown, width=width, height=height)


def side_by_side(views: Sequence[alt.LayerChart], gap: float) -> alt.HConcatChart:
    """Views from left to right, their plots ``gap`` pixels apart, each with colors of its own."""
    resolve = {"scale": {"color": "independent"}}
    return _SideBySide(hconcat=list(views), spacing=gap, bounds="flush", resolve=resolve)


def number(field: str, **options: Any) -> dict[str, Any]:
    """A quantitative field of an encoding."""
    return {"field": field, "type": "quantitative"} | options


def across(left: float, right: float) -> dict[str, Any]:
    """Encodings of marks that reach from one place to another, in pixels from the left edge."""
    return {"x": alt.XValue(left), "x2": alt.X2Value(right)}


def down(top: float, bottom: float) -> dict[str, Any]:
    """Encodings of marks that reach from one place to another, in pixels from the top."""
    return {"y": alt.YValue(top), "y2": alt.Y2Value(bottom)}


def value_axis(low: float, high: float, *, percent: bool, **options: Any) -> dict[str, Any]:
    """An axis of round values with rules across the plot, labeled as ``tables.numbers`` writes values.

    Args:
        low: Where it begins.
        high: Where it ends; labels have as many digits as tell its ticks apart, and three or more.
        percent: Whether values are fractions, to be written in per cent.
        options: Further properties of the axis.
    """
    size, step = max(abs(low), abs(high)), (high - low) / 5
    finest = math.floor(math.log10(step)) if 0 < step < math.inf else 0
    if percent:
        label = f"format(100 * datum.value, '.{min(max(1, -finest - 2), 9)}~f') + '\u00a0%'"
    else:
        digits = min(max(3, 1 + math.floor(math.log10(size)) - finest), 12) if 0 < step < math.inf else 3
        label = (
            "datum.value == 0 ? '0' : abs(datum.value) < 1e-2 || abs(datum.value) >= 1e9 ? "
            f"format(datum.value, '.{digits - 1}~e') : abs(datum.value) >= 1e4 ? "
            f"format(datum.value, '.{digits}~s') : format(datum.value, '.{digits}~r')"
        )
    rules = {"grid": True, "gridColor": theme.RULE, "gridWidth": 1, "title": None, **AXIS_TITLE}
    return {"labelExpr": label, "labelOverlap": True, **rules, **options}


def nominal(field: str) -> alt.Detail:
    """A field that groups marks."""
    return alt.Detail(field=field, type="nominal")


def line_styles() -> dict[str, Any]:
    """Encodings that draw lines in the style that their rows hold, see ``LineStyle.row``."""
    raw: dict[str, Any] = {"type": "nominal", "scale": None}
    amount: dict[str, Any] = {"type": "quantitative", "scale": None}
    return {
        "color": alt.Color(field="color", **raw),
        "strokeWidth": alt.StrokeWidth(field="width", **amount),
        "opacity": alt.Opacity(field="opacity", **amount),
        "strokeDash": alt.StrokeDash(field="dash", **raw),
    }


def tip() -> alt.Description:
    """What a mark says when pointed at."""
    return alt.Description(field="tip", type="nominal")
