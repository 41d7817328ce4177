"""The result of an analysis: a table with one row per layer and measure, matrices, and the few numbers that sum it up.

Data flow: lists of ``Estimate`` by slice -> ``Findings`` -> layers.csv, matrices.json, the metrics of the run.
Slice 0 of a reading is called layer -1 (the embeddings), slice i + 1 layer i (the output of block i).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_mm.dashboards.layers_file import LayerRow
from lightning_mm.estimate import Estimate


@dataclass(frozen=True)
class Matrix:
    """One number for every pair of layers.

    Args:
        measure: Its name.
        site: Where the rows, and the columns, were read.
        values: (T, T); NaN where undefined.
    """

    measure: str
    site: str
    values: Tensor


@dataclass
class Findings:
    """What one inspection found.

    Args:
        step: Optimizer steps done.
        rows: One per layer, measure and site.
        matrices: One per measure over pairs of layers.
        problems: What could not be analysed at all, and why.
    """

    step: int
    rows: list[LayerRow] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, analysis: str, measure: str, site: str, estimates: Sequence[Estimate], first: int = -1) -> None:
        """Put down one measure of all slices, or of the layers from ``first`` on."""
        self.rows += [_row(self.step, analysis, measure, site, layer, e) for layer, e in enumerate(estimates, first)]

    def take(self, part: "Findings") -> None:
        """Add what another analysis of the same step found."""
        self.rows += part.rows
        self.matrices += part.matrices
        self.problems += part.problems

    def profile(self, measure: str, site: str) -> dict[int, LayerRow]:
        """One measure by layer; empty where it was not made."""
        return {row.layer: row for row in self.rows if (row.measure, row.site) == (measure, site)}


def _row(step: int, analysis: str, measure: str, site: str, layer: int, e: Estimate) -> LayerRow:
    return LayerRow(
        step=step,
        analysis=analysis,
        measure=measure,
        site=site,
        layer=layer,
        value=e.value,
        low=e.low,
        high=e.high,
        null=e.null,
        null_low=e.null_low,
        null_high=e.null_high,
        n=e.n,
        k=e.k,
        undefined=e.undefined,
        notes="; ".join(note.replace("; ", ", ") for note in e.notes),
    )
