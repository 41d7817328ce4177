"""Tracks: one value per layer as bars from left to right, so thin that a table can hold one in each row.

Data flow: values by layer -> an SVG without text that stretches to any width; the template sets the words around it.

Shapes: L layers; a drawing is L x 40 units, one column per layer, so that the columns of all rows stand in line.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lightning_mm.report.tables.panels import Panel

_HEIGHT = 40.0


@dataclass(frozen=True)
class Track:
    """One row of bars.

    Args:
        first: The lowest layer, at the left.
        last: The highest.
        trained: The layers that stand on a band of their own.
    """

    first: int
    last: int
    trained: Collection[int]

    def strip(self, chosen: Collection[int]) -> str:
        """Which layers belong: a block for each, filled or not."""
        layers = [(layer, "in" if layer in chosen else "out") for layer in range(max(self.first, 0), self.last + 1)]
        shape = 'y="6" width=".8" height="28"'
        return self._framed(
            "".join(f'<rect class="{style}" x="{layer - self.first + 0.1:g}" {shape}/>' for layer, style in layers)
        )

    def bars(
        self,
        values: Mapping[int, float | None],
        before: Mapping[int, float | None],
        baseline: float,
        peak: int | None,
        null: float | None = None,
        spread: Mapping[int, tuple[float | None, float | None]] | None = None,
    ) -> str:
        """Bars from the baseline, the values before as a line.

        Args:
            values: By layer; None is undefined.
            before: The same at an earlier step; may be empty.
            baseline: What a bar begins at: chance, or no change.
            peak: The layer whose bar is set off.
            null: What chance would give, as a dotted line.
            spread: The interval of each value, as an upright line.
        """
        whiskers = {i: (low, high) for i, (low, high) in (spread or {}).items() if low is not None and high is not None}
        ends = [end for pair in whiskers.values() for end in pair]
        seen = [x for x in [*values.values(), *before.values(), *ends, baseline] if x is not None]
        low, high = min(seen), max(seen)

        def y(value: float) -> float:
            return _HEIGHT - 2 - (_HEIGHT - 4) * ((value - low) / (high - low) if high > low else 0.5)

        drawn = [
            self._bar(layer, None if value is None else y(value), y(baseline), layer == peak)
            for layer, value in sorted(values.items())
        ]
        steps = "".join(
            f"M{layer - self.first:g} {y(value):.1f}h1" for layer, value in sorted(before.items()) if value is not None
        )
        earlier = f'<path class="before" d="{steps}"/>' if steps else ""
        chance = f'<path class="chance" d="M0 {y(null):.1f}H{self.last - self.first + 1}"/>' if null is not None else ""
        reach = "".join(f"M{i - self.first + 0.5:g} {y(a):.1f}V{y(b):.1f}" for i, (a, b) in whiskers.items())
        spans = f'<path class="reach-line" d="{reach}"/>' if reach else ""
        return self._framed("".join(drawn) + chance + earlier + spans)

    def _bar(self, layer: int, y: float | None, floor: float, peak: bool) -> str:
        """From the floor to ``y``; an empty frame where there is no value."""
        place = f'x="{layer - self.first + 0.12:g}" width=".76"'
        if y is None:
            return f'<rect class="void" {place} y="2" height="{_HEIGHT - 4:g}"/>'
        style = "bar-peak" if peak else "bar-value"
        return f'<rect class="{style}" {place} y="{min(y, floor):.1f}" height="{max(abs(y - floor), 0.6):.1f}"/>'

    def _framed(self, body: str) -> str:
        count = self.last - self.first + 1
        bands = "".join(
            f'<rect class="trained-band" x="{layer - self.first}" y="0" width="1.02" height="{_HEIGHT:g}"/>'
            for layer in sorted(self.trained)
            if self.first <= layer <= self.last
        )
        return (
            f'<svg class="track-svg" viewBox="0 0 {count} {_HEIGHT:g}" preserveAspectRatio="none" aria-hidden="true">'
            f"{bands}{body}</svg>"
        )

    def share(self, layer: int) -> float:
        """Where the middle of a layer's column is, in per cent of the width."""
        return 100 * (layer - self.first + 0.5) / (self.last - self.first + 1)


def panel_track(panel: Panel, track: Track) -> str:
    """The track of a panel: its last step as bars, its first as a line."""
    steps = panel.measured
    last = steps[-1]
    measured = {layer: panel.value(last, layer) for layer in panel.layers if (last, layer) in panel.cells}
    earlier = {row.layer: row.value for row in panel.profile(steps[0])} if len(steps) > 1 else {}
    nulls = [row.null for row in panel.profile(last) if row.null is not None and panel.measure.from_chance]
    null = sum(nulls) / len(nulls) if nulls else None
    peak = panel.peak(last)
    seen = [value for value in [*measured.values(), *earlier.values()] if value is not None]
    return track.bars(measured, earlier, baseline(panel, null, seen), peak.layer if peak else None, null)


def baseline(panel: Panel, null: float | None, seen: Sequence[float]) -> float:
    """What bars begin at: for drift the start itself, else chance; for shapes a little below the lowest."""
    if panel.measure.question == "moved":
        return panel.measure.high if panel.measure.high is not None else 0.0
    if null is not None:
        return null
    if not panel.measure.from_chance:
        return min(seen) - 0.15 * (max(seen) - min(seen))
    return panel.measure.low if panel.measure.low is not None else 0.0
