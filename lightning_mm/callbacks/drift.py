"""DriftCallback: what training has moved, layer by layer, in pictures and in text.

Data flow: a look -> the first look's reading and this one -> ``analysis.drift`` -> similarities by layer.
"""

from lightning_mm.analysis.drift import measure_drift
from lightning_mm.analysis.findings import Findings
from lightning_mm.callbacks.base import InspectingCallback
from lightning_mm.callbacks.runner import Look
from lightning_mm.callbacks.schedule import Schedule


class DriftCallback(InspectingCallback):
    """Similarity of every layer to itself before the first step.

    Args:
        schedule: When to look, and how much time that may take; the look before the first step is always made.
        neighbours: k of the neighbourhood overlap; fewer where there are fewer than ten times as many pictures.
    """

    def __init__(self, schedule: Schedule = Schedule(), neighbours: int = 10) -> None:  # noqa: B008  (frozen)
        super().__init__(schedule.beginning())
        self.neighbours = neighbours

    def analyse(self, look: Look) -> Findings:
        if look.start is None or look.start is look.reading:
            return Findings(look.step)
        return measure_drift(look.start, look.reading, look.probe_set, self.neighbours, look.device)
