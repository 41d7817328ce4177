"""The vertical axis that heat maps and profiles share: embeddings at the bottom, the top layer above.

Data flow: the layers of a model and which of them train -> places, labels and bands in drawing units.

Shapes: L layers; SVG's vertical axis points down, so higher layers have smaller y.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning_mm.report.tables.panels import EMBEDDINGS, Trained, short_name

_ROW, _TALLEST, _APART = 14.0, 240.0, 13.0


@dataclass(frozen=True)
class LayerAxis:
    """Where each layer stands.

    Args:
        first: The lowest layer, at the bottom.
        last: The highest.
        trained: Which layers train.
        top: Where the axis begins.
    """

    first: int
    last: int
    trained: Trained
    top: float = 10.0

    @classmethod
    def over(cls, layers: Sequence[int], trained: Trained, top: float = 10.0) -> "LayerAxis":
        """An axis that holds the measured layers and all layers of the model."""
        return cls(min(EMBEDDINGS, *layers), max(trained.total - 1, *layers, 0), trained, top)

    @property
    def row(self) -> float:
        return min(_ROW, _TALLEST / (self.last - self.first + 1))

    @property
    def bottom(self) -> float:
        return self.top + self.row * (self.last - self.first + 1)

    def y(self, layer: float) -> float:
        """The middle of a layer's row."""
        return self.bottom - (layer - self.first + 0.5) * self.row

    @cached_property
    def stretches(self) -> list[tuple[float, float]]:
        """Top and bottom of each run of trained layers."""
        inside = [layer for layer in self.trained.layers if self.first <= layer <= self.last]
        starts = [layer for layer in inside if layer - 1 not in inside]
        ends = [layer for layer in inside if layer + 1 not in inside]
        half = self.row / 2
        return [(self.y(end) - half, self.y(start) + half) for start, end in zip(starts, ends, strict=True)]

    def bands(self, left: float, right: float) -> str:
        """A light band behind the drawing, over each run of trained layers."""
        return "".join(
            f'<rect class="trained-band" x="{left:g}" y="{top:.1f}" '
            f'width="{right - left:g}" height="{bottom - top:.1f}"/>'
            for top, bottom in self.stretches
        )

    def edges(self, left: float, right: float) -> str:
        """Lines along both edges of each run, where something covers the band."""
        ends = [y for stretch in self.stretches for y in stretch]
        return "".join(f'<path class="trained-edge" d="M{left:g} {y:.1f}H{right:g}"/>' for y in ends)

    def bars(self, x: float) -> str:
        """A solid bar beside each run."""
        tip = {"trained": "these layers train", "chosen": "these layers were chosen"}[self.trained.word]
        return "".join(
            f'<rect class="trained-bar" x="{x:g}" y="{top:.1f}" width="4" height="{bottom - top:.1f}" rx="1.5">'
            f"<title>{tip}</title></rect>"
            for top, bottom in self.stretches
        )

    @cached_property
    def numbered(self) -> tuple[int, ...]:
        """The layers whose numbers are printed: ends of what trains, then both ends, then round ones between."""
        wanted = [*self.trained.ends, self.last, self.first, *range(0, self.last, 10), *range(5, self.last, 10)]
        kept: list[int] = []
        for layer in wanted:
            if all(abs(self.y(layer) - self.y(other)) >= _APART for other in kept) and self.first <= layer <= self.last:
                kept.append(layer)
        return tuple(sorted(kept))

    def numbers(self, right: float) -> str:
        """The layer numbers, ending at ``right``."""
        return "".join(
            f'<text class="{"trained-number" if layer in self.trained.layers else ""}" x="{right:g}" '
            f'y="{self.y(layer) + 3.8:.1f}" text-anchor="end">{short_name(layer)}</text>'
            for layer in self.numbered
        )
