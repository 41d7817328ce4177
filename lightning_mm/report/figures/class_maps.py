"""What an intervention restores by kind of token, mean over questions: layers upwards, kinds to the right.

Data flow: rows of layers.csv, measure ``trace``, sites ``<site>/<class>`` -> ``ClassMap`` -> ``Figure`` of the report.

Shapes: L layers x K kinds of tokens; cells whose interval includes no effect are pale.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from lightning_mm.core.layer_table import LayerRow
from lightning_mm.core.measure_catalog import MODULE_SITES, TOKEN_CLASSES
from lightning_mm.report.figures import theme
from lightning_mm.report.figures.figure import Figure, layered, printable, tip, without_validation
from lightning_mm.report.figures.heatmap_parts import (
    ColorScale,
    Columns,
    LayerAxis,
    cells,
    color_legend,
    ring,
    text,
)
from lightning_mm.report.tables.chart_table import ChartTable
from lightning_mm.report.tables.numbers import percent
from lightning_mm.report.tables.panels import TrainedLayers, layer_name

_LEFT, _RIGHT, _COLUMN, _TOP, _HEADING, _LEGEND = 42.0, 12.0, 64.0, 20.0, 20.0, 176.0
_MOST_SITES, _MOST_CLASSES = 6, 12


@dataclass(frozen=True)
class ClassMap:
    """One site at one step.

    Args:
        site: What is patched.
        classes: (K,) the kinds of tokens, in reading order.
        rows: By (layer, kind).
        reach: The value of the strongest color.
    """

    site: str
    classes: tuple[str, ...]
    rows: Mapping[tuple[int, str], LayerRow]
    reach: float

    @property
    def title(self) -> str:
        return f"{MODULE_SITES.get(self.site, self.site)} put back"

    @property
    def best(self) -> LayerRow | None:
        """Where most is restored, of what its interval separates from no effect."""
        clear = [r for r in self.rows.values() if r.value is not None and r.value > 0 and not includes_no_effect(r)]
        return max(clear, key=lambda row: row.value or 0.0, default=None)

    @property
    def summary(self) -> str:
        best = self.best
        if best is None:
            return "nothing that its interval tells from no effect"
        return f"most at {layer_name(best.layer)}, {class_name(best)}"

    @without_validation
    def figure(self, trained: TrainedLayers, *, headed: bool = False) -> Figure:
        """The map, with the layers that train marked; ``headed`` with its title above it."""
        axis = LayerAxis.over([layer for layer, _ in self.rows], trained, first=0)
        columns = Columns(0, len(self.classes), _COLUMN * len(self.classes))
        scale, best = ColorScale.symmetric(self.reach), self.best
        known: list[dict[str, Any]] = []
        undefined: list[dict[str, Any]] = []
        for (layer, kind), row in self.rows.items():
            left, opacity = self.classes.index(kind), theme.PALE if includes_no_effect(row) else 1.0
            place = {"left": left, "right": left + 1, "low": layer - 0.5, "high": layer + 0.5}
            cell = {"layer": layer, "kind": kind, **place, "value": row.value, "tip": printable(_tip(row))}
            (undefined if row.value is None else known).append(cell | {"opacity": opacity})
        peak = (
            [] if best is None else [{"x": self.classes.index(best.site.partition("/")[2]) + 0.5, "layer": best.layer}]
        )
        legend, legend_data = color_legend(scale, columns, axis.height + 38, percent, _LEGEND)
        data: dict[str, list[dict[str, Any]]] = {
            "trained": axis.trained_runs,
            "cells": known,
            "undefined": undefined,
            "peak": peak,
            "kinds": list(self._kind_labels()),
            "heading": [{"text": printable(self.title), "align": "left", "strong": True}] if headed else [],
        }
        pale = {"fillOpacity": alt.FillOpacity(field="opacity", type="quantitative", scale=None)}
        below, above = axis.height + 14, 8 - _HEADING
        views = [
            axis.trained_bar(),
            *cells(axis, columns, scale, description=tip(), **pale),
            *axis.trained_edges(columns.width),
            text("kinds", "kinds", columns.at("x"), below, lineHeight=12, fontWeight="normal"),
            *legend,
            *ring(columns.at("x"), axis.at("layer"), max(5.0, axis.row / 2 + 2)),
            *axis.pointed_at(columns.width),
            text("heading", "heading", 0, above),
        ]
        chart = layered(data | legend_data, views, columns.width, axis.height)
        top = _TOP + _HEADING * headed
        size = (max(_LEFT + columns.width + _RIGHT, _LEFT + 200), top + axis.height + 66)
        words, live = f"{self.title}: {self.summary}", axis.live(top, kind="cells")
        return Figure(chart, data | legend_data, size, (_LEFT, top), words, table=self._table(), live=live)

    def _table(self) -> ChartTable:
        columns = ("layer", "kind of token", "restored", "low", "high", "no effect", "N")
        found = sorted(self.rows.items(), key=lambda item: (item[0][0], self.classes.index(item[0][1])))
        return ChartTable(
            columns, [(i, TOKEN_CLASSES.get(k, k), r.value, r.low, r.high, r.null, r.n) for (i, k), r in found]
        )

    def _kind_labels(self) -> Iterator[dict[str, Any]]:
        """The kinds of tokens, in two lines where they have two words."""
        for number, kind in enumerate(self.classes):
            name = TOKEN_CLASSES.get(kind, kind[:9]).replace(",", "").replace("rest of ", "rest_of ")
            lines = [printable(line.replace("_", " ")) for line in name.partition(" ")[::2] if line]
            yield {"x": number + 0.5, "text": lines, "strong": kind == "constraint"}


def class_maps(rows: Sequence[LayerRow]) -> list[ClassMap]:
    """One map per site, of the last step; parts of a layer share one color scale, the residual stream has its own."""
    traced = [row for row in rows if row.measure == "trace" and "/" in row.site]
    last = max((row.step for row in traced), default=0)
    by_site: dict[str, dict[tuple[int, str], LayerRow]] = {}
    for row in traced:
        if row.step == last:
            site, _, kind = row.site.partition("/")
            by_site.setdefault(site[:40], {})[row.layer, kind] = row
    order = list(MODULE_SITES)
    sites = sorted(by_site, key=lambda site: order.index(site) if site in order else len(order))[:_MOST_SITES]
    parts = [row for site in sites if site != "residual" for row in by_site[site].values()]
    return [
        ClassMap(site, _ordered(by_site[site]), _known(by_site[site]), _reach(_own(site, parts, by_site[site])))
        for site in sites
    ]


def includes_no_effect(row: LayerRow) -> bool:
    """Whether the interval of a row includes the value that stands for no effect."""
    null = row.null or 0.0
    return row.low is not None and row.high is not None and row.low <= null <= row.high


def class_name(row: LayerRow) -> str:
    """The kind of token that a row is about."""
    kind = row.site.partition("/")[2]
    return TOKEN_CLASSES.get(kind, kind[:40])


def _own(site: str, parts: Sequence[LayerRow], own: Mapping[tuple[int, str], LayerRow]) -> Sequence[LayerRow]:
    return list(own.values()) if site == "residual" else parts


def _reach(rows: Sequence[LayerRow]) -> float:
    return max((abs(row.value) for row in rows if row.value is not None), default=0.0) or 1.0


def _ordered(rows: Mapping[tuple[int, str], LayerRow]) -> tuple[str, ...]:
    kinds = dict.fromkeys(kind for _, kind in rows)
    known = [kind for kind in TOKEN_CLASSES if kind in kinds]
    return tuple([*known, *(kind for kind in kinds if kind not in TOKEN_CLASSES)][:_MOST_CLASSES])


def _known(rows: Mapping[tuple[int, str], LayerRow]) -> dict[tuple[int, str], LayerRow]:
    kinds = set(_ordered(rows))
    return {(layer, kind): row for (layer, kind), row in rows.items() if kind in kinds}


def _tip(row: LayerRow) -> str:
    where = f"{layer_name(row.layer)}, {class_name(row)}"
    if row.value is None:
        return f"{where}: undefined ({row.undefined[:200]})"
    words = f"{where}: {percent(row.value)}"
    if row.low is not None and row.high is not None:
        words += f" ({percent(row.low)} to {percent(row.high)})"
    words += f", no effect {percent(row.null)}" if row.null is not None else ""
    return words + (f", N {row.n:,}" if row.n is not None else "")
