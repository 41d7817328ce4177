"""The numbers behind a chart: what its CSV file and its text table hold.

Data flow: figure functions state columns and rows -> ``ChartTable`` -> report.html: a text table where JavaScript is
off, and columns for the script, which writes CSV and sorts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | float | int | None

MOST_WRITTEN = 40
"""Rows of the text table that a browser without JavaScript shows."""


@dataclass(frozen=True)
class ChartTable:
    """A table of numbers.

    Args:
        columns: (C,) their names.
        rows: (R, C) text, numbers, or None where a value is undefined.
        note: What the table leaves out; empty if nothing.
        newest: The rows that the short text table shows begin at this one.
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    note: str = ""
    newest: int = 0

    def by_column(self) -> list[list[Cell]]:
        """(C, R) the values, numbers with six significant digits."""
        return [[_rounded(value) for value in column] for column in zip(*self.rows, strict=True)]

    def written(self) -> list[list[str]]:
        """The rows of the short text table, as text."""
        shown = self.rows[self.newest : self.newest + MOST_WRITTEN]
        return [["–" if value is None else str(_rounded(value)) for value in row] for row in shown]


def _rounded(value: Cell) -> Cell:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
