"""The figure of a measure over all pairs of layers.

Data flow: a matrix of matrices.json -> rows -> ``Figure``. Undefined cells are hatched; what trains is marked.

Shapes: L layers upwards x L layers to the right.
"""

from collections.abc import Sequence

from lightning_mm.report.figures import theme
from lightning_mm.report.figures.figure import Figure, down, layered, tip, view, without_validation
from lightning_mm.report.figures.heatmap_parts import UNDEFINED, ColorScale, LayerAxis, cells, color_legend
from lightning_mm.report.tables.chart_table import ChartTable
from lightning_mm.report.tables.numbers import short
from lightning_mm.report.tables.panels import TrainedLayers, layer_name

_WIDTH, _LEFT, _TOP = 360.0, 64.0, 20.0


@without_validation
def matrix_figure(
    layers: Sequence[int], values: Sequence[Sequence[float | None]], trained: TrainedLayers, *, tips: bool
) -> Figure:
    """Layers by layers, embeddings at the lower left; what trains is marked on both axes.

    Args:
        layers: (L,) the layers of rows and columns, ascending.
        values: (L, L).
        trained: Which layers train.
        tips: Whether each cell says its value when pointed at.
    """
    axis = LayerAxis.over(layers, trained)
    columns = axis.across()
    rows = [
        {
            "row": a,
            "column": b,
            "left": b - 0.5,
            "right": b + 0.5,
            "low": a - 0.5,
            "high": a + 0.5,
            "value": values[i][j],
            "tip": f"{layer_name(a)} and {layer_name(b)}: {short(values[i][j] or 0.0)}",
        }
        for i, a in enumerate(layers)
        for j, b in enumerate(layers)
    ]
    known = [value for row in values for value in row if value is not None] or [0.0]
    scale = ColorScale(min(0.0, *known), max(1.0, *known))
    legend, legend_data = color_legend(scale, columns, axis.height + 39, short)
    views = [
        axis.trained_bar(),
        *cells(axis, columns, scale, description=tip()),
        *axis.trained_edges(axis.height),
        view("trained", "trained_below", "rect", aria=True, color=theme.TEAL, cornerRadius=1.5).encode(
            **columns.span("low", "high"),
            **down(axis.height + 3, axis.height + 7),
            description=tip(),
        ),
        *(
            view("trained", f"trained_across_{end}", "rule", color=theme.TEAL, strokeWidth=1.4).encode(
                x=columns.at(end), **down(0, axis.height)
            )
            for end in ("low", "high")
        ),
        *axis.pointed_at(axis.height),
        *legend,
    ]
    undefined = [row | {"tip": UNDEFINED} for row in rows if row["value"] is None]
    data = {"cells": [row for row in rows if row["value"] is not None], "undefined": undefined}
    data |= {"trained": axis.trained_runs} | legend_data
    chart = layered(data, views, axis.height, axis.height)
    words = f"layer by layer matrix of {len(layers)} layers"
    table = ChartTable(("layer", "with layer", "value"), [(r["row"], r["column"], r["value"]) for r in rows])
    live = axis.live(_TOP, kind="cells")
    size = (_WIDTH, _TOP + axis.height + 72)
    return Figure(chart, data, size, (_LEFT, _TOP), words, table=table, live=live, tips=tips)
