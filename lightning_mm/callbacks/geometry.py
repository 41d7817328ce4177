"""GeometryCallback: the shape of each layer, and where picture and caption meet, while the model trains (2606.03871).

Data flow: a look -> ``analysis.geometry`` -> measures by layer, each with its null, interval, N and k.
"""

from collections.abc import Sequence

from lightning_mm.analysis.findings import Findings
from lightning_mm.analysis.geometry import DEFAULT_MEASURES, measure_geometry, resolve_measures
from lightning_mm.callbacks.base import InspectingCallback
from lightning_mm.callbacks.runner import Look
from lightning_mm.callbacks.schedule import Schedule


class GeometryCallback(InspectingCallback):
    """Intrinsic dimension, spectra, CKA, neighbourhood overlap, modality gap and more, of every layer.

    Args:
        schedule: When to look, and how much time that may take.
        measures: Names of measures; one of each kind if not given, ``[all]`` for all.
        neighbours: k of the neighbourhood measures; fewer where there are fewer than ten times as many pictures.
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        measures: Sequence[str] = DEFAULT_MEASURES,
        neighbours: int = 10,
    ) -> None:
        super().__init__(schedule)
        self.measures, self.neighbours = resolve_measures(measures), neighbours

    def analyse(self, look: Look) -> Findings:
        return measure_geometry(look.reading, look.probe_set, self.measures, self.neighbours, look.device)
