"""Inspections of a short training run: a schedule, a callback that keeps what it was given, rows that were written."""

from pathlib import Path

from lightning_mm.analysis.findings import Findings
from lightning_mm.callbacks import Schedule
from lightning_mm.callbacks.base import LayerCallback
from lightning_mm.callbacks.runner import InspectionInput
from lightning_mm.core.layer_table import LayerRow, read_layers

EVERY = Schedule(every=1, budget=None)
"""At every step, whatever it costs."""


class RecordingCallback(LayerCallback):
    """Keeps every reading."""

    def __init__(self, schedule: Schedule = EVERY) -> None:
        super().__init__(schedule)
        self.looks: list[InspectionInput] = []

    def analyze(self, data: InspectionInput) -> Findings:
        self.looks.append(data)
        return Findings(data.step)


def rows_of(folder: Path) -> list[LayerRow]:
    """The rows of ``layers.csv``, all of them readable."""
    rows, bad = read_layers(folder / "layers.csv")
    assert not bad
    return rows
