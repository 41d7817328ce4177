"""Bars of one value per layer from left to right, so low that a table holds them in each of its rows.

Data flow: values by layer -> rows -> ``Figure`` without text, stretched to the width of its table column by CSS.

Shapes: L layers, one column each, so that the columns of all rows of a table stand in line.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from lightning_mm.report.figures import theme
from lightning_mm.report.figures.figure import Figure, down, layered, number, view, without_validation
from lightning_mm.report.figures.heatmap_parts import either
from lightning_mm.report.tables.panels import Panel

_HEIGHT, _COLUMN = 40.0, 10.0
_STRETCHED = ' class="track-svg" preserveAspectRatio="none"'


@dataclass(frozen=True)
class Track:
    """One row of bars.

    Args:
        first: The lowest layer, at the left.
        last: The highest.
        trained: The layers that stand on a colored band.
    """

    first: int
    last: int
    trained: Collection[int]

    @without_validation
    def membership(self, members: Collection[int], color: str = theme.TEAL) -> Figure:
        """Which layers belong to a range: a filled block for each that does, a pale one for the others."""
        layers = range(max(self.first, 0), self.last + 1)
        rows = [{"layer": i, **self._column(i, 0.4), "member": i in members} for i in layers]
        look = {"color": either("member", color, theme.QUIET), "opacity": either("member", 1, 0.55)}
        marks = view("layers", "layers", "rect", **look)
        return self._figure([marks.encode(**self._across(), **down(6, 34))], {"layers": rows})

    @without_validation
    def bars(
        self,
        values: Mapping[int, float | None],
        before: Mapping[int, float | None],
        baseline: float,
        peak: int | None,
        null: float | None = None,
        spread: Mapping[int, tuple[float | None, float | None]] | None = None,
    ) -> Figure:
        """Bars that begin at the baseline, the values before as a line in each column.

        Args:
            values: By layer; None is undefined, and drawn as an empty frame.
            before: Values at an earlier step; may be empty.
            baseline: Where a bar begins: chance, or no change.
            peak: The layer whose bar has the strong color; None where there is none.
            null: Expected value under chance, as a dotted line; None draws none.
            spread: Interval of each value, as an upright line; None draws none.
        """
        ends = {i: (a, b) for i, (a, b) in (spread or {}).items() if a is not None and b is not None}
        known = {i: value for i, value in values.items() if value is not None}
        earlier = {i: value for i, value in before.items() if value is not None}
        seen = [*known.values(), *earlier.values(), *(end for pair in ends.values() for end in pair), baseline]
        low, high = (min(seen), max(seen)) if max(seen) > min(seen) else (baseline - 0.5, baseline + 0.5)
        least = 0.6 * (high - low) / (_HEIGHT - 4)  # a value at the baseline still shows as a thin line

        def bar(layer: int, value: float) -> dict[str, Any]:
            end = value if abs(value - baseline) >= least else baseline - least
            return {"layer": layer, "value": value, **self._column(layer, 0.38), "low": baseline, "high": end}

        data: dict[str, list[dict[str, Any]]] = {
            "bars": [bar(layer, value) | {"peak": layer == peak} for layer, value in sorted(known.items())],
            "undefined": [{"layer": i, **self._column(i, 0.38)} for i, value in values.items() if value is None],
            "null": [] if null is None else [{"y": null}],
            "before": [{"layer": i, **self._column(i, 0.5), "y": value} for i, value in sorted(earlier.items())],
            "spread": [{"layer": i, "x": i, "low": a, "high": b} for i, (a, b) in ends.items()],
        }
        scale = {"domain": [low, high], "range": [_HEIGHT - 2, 2], "nice": False, "zero": False}
        at = {end: alt.Y(**number(end, scale=scale, axis=None)) for end in ("low", "y")}
        color = either("peak", theme.BAR_PEAK, theme.BAR)
        line = {"color": theme.INK, "strokeWidth": 1.3}
        frame = {"stroke": theme.QUIET, "strokeWidth": 1, "strokeDash": [2, 2]}
        framed = view("undefined", "undefined", "rect", filled=False, **frame)
        marks = [
            view("bars", "bars", "rect", color=color).encode(**self._across(), y=at["low"], y2=alt.Y2(field="high")),
            framed.encode(**self._across(), **down(2, _HEIGHT - 2)),
            view("null", "null", "rule", **line, strokeDash=[2, 2.5]).encode(y=at["y"]),
            view("before", "before", "rule", **line).encode(**self._across(), y=at["y"]),
            view("spread", "spread", "rule", **line).encode(x=self._at("x"), y=at["low"], y2=alt.Y2(field="high")),
        ]
        return self._figure(marks, data)

    def share(self, layer: int) -> float:
        """Where the middle of a layer's column is, in per cent of the width."""
        return 100 * (layer - self.first + 0.5) / (self.last - self.first + 1)

    def _column(self, layer: int, half: float) -> dict[str, float]:
        return {"left": layer - half, "right": layer + half}

    def _at(self, field: str) -> alt.X:
        scale = {"domain": [self.first - 0.5, self.last + 0.5], "nice": False, "zero": False}
        return alt.X(**number(field, scale=scale, axis=None))

    def _across(self) -> dict[str, Any]:
        return {"x": self._at("left"), "x2": alt.X2(field="right")}

    def _figure(self, marks: list[alt.Chart], data: dict[str, list[dict[str, Any]]]) -> Figure:
        width = _COLUMN * (self.last - self.first + 1)
        inside = [layer for layer in sorted(self.trained) if self.first <= layer <= self.last]
        bands = view("trained", "trained", "rect", color=theme.WASH)
        band = bands.encode(**self._across(), **down(0, _HEIGHT))
        data = data | {"trained": [{"layer": layer, **self._column(layer, 0.51)} for layer in inside]}
        chart = layered(data, [band, *marks], width, _HEIGHT)
        return Figure(chart, data, (width, _HEIGHT), (0, 0), "", _STRETCHED)


def panel_track(panel: Panel, track: Track) -> Figure:
    """The track of a panel: its last step as bars, its first as lines."""
    steps = panel.measured
    last = steps[-1]
    measured = {layer: panel.value(last, layer) for layer in panel.layers if (last, layer) in panel.cells}
    earlier = {row.layer: row.value for row in panel.profile(steps[0])} if len(steps) > 1 else {}
    nulls = [row.null for row in panel.profile(last) if row.null is not None and panel.measure.from_chance]
    null = sum(nulls) / len(nulls) if nulls else None
    peak = panel.peak(last)
    seen = [value for value in [*measured.values(), *earlier.values()] if value is not None]
    return track.bars(measured, earlier, _baseline(panel, null, seen), peak.layer if peak else None, null)


def _baseline(panel: Panel, null: float | None, seen: Sequence[float]) -> float:
    """Where bars begin: for drift at no change, else at chance; for shapes a little below the lowest."""
    if panel.measure.question == "moved":
        return panel.measure.high if panel.measure.high is not None else 0.0
    if null is not None:
        return null
    if not panel.measure.from_chance:
        return min(seen) - 0.15 * (max(seen) - min(seen))
    return panel.measure.low if panel.measure.low is not None else 0.0
