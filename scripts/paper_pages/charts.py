"""Charts of the pages, as SVG: profiles by layer with intervals and chance, and layer by layer matrices.

Data flow: ``Profile``s or a matrix -> altair -> SVG, by vl_convert, without a browser.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt
import vl_convert

from paper_pages.items import Profile

COLORS = ("#1f5fa8", "#b85c00", "#7a3f98", "#b3245e", "#3d7a4c", "#3d4a5c")
WIDTH, HEIGHT = 400, 220


def lines(profiles: Sequence[Profile], unit: str, *, chance: bool = True) -> str:
    """Profiles over layers, with their 95 % intervals; dashed: what chance, or no effect, gives.

    Args:
        profiles: Those that are empty are left out.
        unit: Title of the vertical axis.
        chance: Whether to draw the nulls.
    """
    shown = [profile for profile in profiles if profile]
    data = [
        {"layer": layer, "value": row.value, "low": row.low, "high": row.high, "null": row.null, "name": profile.label}
        for profile in shown
        for layer, row in sorted(profile.rows.items())
    ]
    names = [profile.label for profile in shown]
    color = alt.Color("name:N", scale=alt.Scale(domain=names, range=list(COLORS[: len(names)])), title=None)
    color = color.legend(orient="top", columns=2, labelLimit=320, symbolOpacity=1)
    across = alt.X("layer:Q", title="layer (−1: embeddings)", axis=alt.Axis(tickMinStep=1))
    base = alt.Chart(alt.Data(values=data)).encode(x=across, color=color)
    up = alt.Y("value:Q", title=unit, scale=alt.Scale(zero=False))
    layers = [
        base.mark_area(opacity=0.16).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=1.8).encode(y=up),
        base.mark_point(size=12, filled=True).encode(y=up),
    ]
    if chance and any(row["null"] is not None for row in data):
        layers.append(base.mark_line(strokeWidth=1, strokeDash=[4, 3], opacity=0.8).encode(y=alt.Y("null:Q")))
    return _svg(alt.layer(*layers).properties(width=WIDTH, height=HEIGHT))


def matrix(found: dict[str, Any], rows: str, columns: str) -> str:
    """A matrix of layers by layers; undefined cells are left white.

    Args:
        found: An entry of matrices.json.
        rows: What the vertical axis is of.
        columns: What the horizontal axis is of.
    """
    data = [
        {"row": one, "column": other, "value": value}
        for one, line in zip(found["layers"], found["values"], strict=True)
        for other, value in zip(found["layers"], line, strict=True)
        if value is not None and value == value
    ]
    chart = (
        alt.Chart(alt.Data(values=data))
        .mark_rect()
        .encode(
            x=alt.X("column:O", title=columns, axis=alt.Axis(labelOverlap=True)),
            y=alt.Y("row:O", title=rows, sort="descending", axis=alt.Axis(labelOverlap=True)),
            color=alt.Color("value:Q", title=None, scale=alt.Scale(scheme="viridis")),
        )
    )
    return _svg(chart.properties(width=300, height=300))


def _svg(chart: Any) -> str:
    settings = {"font": "system-ui, DejaVu Sans, sans-serif", "view": {"stroke": None}, "background": "white"}
    svg: str = vl_convert.vegalite_to_svg(chart.to_dict() | {"config": settings})
    return svg
