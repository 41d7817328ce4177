"""Draws what the quickstart has shown as bars: python scripts/quickstart_picture.py [JSON] [PNG].

By default from benchmarks/quickstart.json, which ``summary.py --json`` writes, to docs/quickstart.png.

Data flow: JSON -> a bar per question type and model, in two columns -> altair -> PNG, by vl_convert.
"""

import json
import sys
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from lightning_mm.report.figures import theme

ROOT = Path(__file__).parents[1]
BARS = {
    "other": ("another picture", theme.QUIET),
    "before": ("before", "#a3a8ae"),
    "connector": ("connector continued", theme.RUNS[0]),
    "middle": ("middle layers with connector", theme.TEAL),
}
"""Entry of a row -> its name and color; teal: these layers train."""
_WIDTH, _ROW, _BAR = 300, 46, 9


def picture(summary: dict[str, Any]) -> bytes:
    """The bars as PNG."""
    rows = summary["rows"]
    half = (len(rows) + 1) // 2
    sides = [_side(rows[:half]), _side(rows[half:])]
    title = alt.TitleParams(
        "Questions answered exactly right, %: known things, drawn in a style that training never shows",
        subtitle=[
            summary["gain"],
            f"{summary['steps']} steps each from one model. Lines: 95 % intervals. Ticks: the most frequent answer.",
        ],
        anchor="start",
        fontSize=15,
        subtitleFontSize=12,
        offset=10,
    )
    chart = alt.hconcat(*sides, spacing=28).properties(title=title, padding=14).resolve_scale(color="shared")
    settings = {"font": theme.FONT, "view": {"stroke": None}, "background": theme.CARD}
    png: bytes = vl_convert.vegalite_to_png(chart.to_dict() | {"config": settings}, scale=2)
    return png


def _side(rows: list[dict[str, Any]]) -> Any:
    """One column of question types."""
    names = [name for name, _ in BARS.values()]
    colors = alt.Scale(domain=names, range=[color for _, color in BARS.values()])
    legend = alt.Legend(orient="top", title=None, labelFontSize=12, labelLimit=260, symbolType="square")
    kinds = [_label(row) for row in rows]
    y = alt.Y("type:N", sort=kinds, title=None, axis=alt.Axis(ticks=False, domain=False, labelFontSize=12))
    x = alt.X("value:Q", title=None, scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(values=[0, 25, 50, 75, 100]))
    offset = alt.YOffset("name:N", sort=names, scale=alt.Scale(domain=names, paddingInner=0.1))
    bars = alt.Chart(alt.Data(values=[bar for row in rows for bar in _bars(row)])).encode(y=y, yOffset=offset)
    ends = bars.mark_rule(color=theme.INK, strokeWidth=1, opacity=0.55).encode(x="low:Q", x2="high:Q")
    guess = alt.Chart(alt.Data(values=[{"type": _label(row), "value": 100 * row["majority"]} for row in rows]))
    return alt.layer(
        bars.mark_bar(height=_BAR).encode(x=x, color=alt.Color("name:N", scale=colors, legend=legend)),
        ends.transform_filter("isValid(datum.low)"),
        guess.mark_tick(color=theme.INK, thickness=2, size=0.86 * _ROW).encode(x=x, y=y),
    ).properties(width=_WIDTH, height=_ROW * len(rows))


def _bars(row: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for entry, (name, _) in BARS.items():
        given = row[entry] if isinstance(row[entry], dict) else {"value": row[entry]}
        if given["value"] is not None:
            found.append({"type": _label(row), "name": name, **{key: 100 * share for key, share in given.items()}})
    return found


def _label(row: dict[str, Any]) -> str:
    kind = "all types" if row["type"] == "all" else row["type"].replace("_", " ")
    return f"{kind} ({row['n']})"


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    source = given[0] if given else ROOT / "benchmarks/quickstart.json"
    target = given[1] if len(given) > 1 else ROOT / "docs/quickstart.png"
    target.write_bytes(picture(json.loads(source.read_text(encoding="utf-8"))))
    print(target)
