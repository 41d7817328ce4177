"""Callbacks that measure each layer's hidden states while the model trains: linear probes, geometry and drift.

Data flow: ``InspectionInput`` (hidden states of every layer) -> ``analysis.probing``, ``analysis.geometry`` or
``analysis.drift`` -> ``Findings``, one row per layer and measure. Probes after Tao et al. 2024, arXiv:2402.17304;
geometry after Palacios et al. 2026, arXiv:2606.03871.
"""

from collections.abc import Sequence
from typing import Any

from lightning_mm.analysis.drift import measure_drift
from lightning_mm.analysis.findings import Findings
from lightning_mm.analysis.geometry import DEFAULT_MEASURES, measure_geometry, resolve_measures
from lightning_mm.analysis.probing import ProbingOptions, run_probes
from lightning_mm.callbacks.base import LayerCallback
from lightning_mm.callbacks.runner import InspectionInput
from lightning_mm.callbacks.schedule import Schedule


class ProbingCallback(LayerCallback):
    """Linear probes of every layer: does the caption belong to the picture (global), which objects are there (local)?

    Args:
        schedule: When to look, and how much time that may take.
        options: Which probes, and what is measured beside their accuracy.
        text_only: Probe the captions without their pictures too, at the first look due and the last: what language
            alone gives.
        model: Path of the multimodal LLM in a LightningModule that is not ours; None: the one in it.
        processor: Its processor; None: the module's ``processor``.
        probes: A ``ProbeSet``, a file or rows of pictures with captions and objects, or ``Probes`` (how many, and how
            many at a time); None: the data module's.
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        options: ProbingOptions = ProbingOptions(),  # noqa: B008  (frozen)
        text_only: bool = True,
        model: str | None = None,
        processor: Any = None,
        probes: Any = None,
    ) -> None:
        super().__init__(schedule, model, processor, probes)
        self.options, self.text_only = options, text_only

    def wants_text_only(self, outermost: bool) -> bool:
        return self.text_only and outermost

    def analyze(self, data: InspectionInput) -> Findings:
        return run_probes(data.reading, data.text_only, data.probe_set, self.options, data.device)


class GeometryCallback(LayerCallback):
    """Intrinsic dimension, spectra, CKA, neighbourhood overlap, modality gap and more, of every layer.

    Args:
        schedule: When to look, and how much time that may take.
        measures: Names of measures; one of each kind if not given, ``[all]`` for all.
        neighbours: k of the neighbourhood measures; fewer where there are fewer than ten times as many pictures.
        model: Path of the multimodal LLM in a LightningModule that is not ours; None: the one in it.
        processor: Its processor; None: the module's ``processor``.
        probes: A ``ProbeSet``, a file or rows of pictures with captions and objects, or ``Probes`` (how many, and how
            many at a time); None: the data module's.
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        measures: Sequence[str] = DEFAULT_MEASURES,
        neighbours: int = 10,
        model: str | None = None,
        processor: Any = None,
        probes: Any = None,
    ) -> None:
        super().__init__(schedule, model, processor, probes)
        self.measures, self.neighbours = resolve_measures(measures), neighbours

    def analyze(self, data: InspectionInput) -> Findings:
        return measure_geometry(data.reading, data.probe_set, self.measures, self.neighbours, data.device)


class DriftCallback(LayerCallback):
    """Similarity of every layer to itself before the first step.

    Args:
        schedule: When to look, and how much time that may take; the look before the first step is always made.
        neighbours: k of the neighbourhood overlap; fewer where there are fewer than ten times as many pictures.
        model: Path of the multimodal LLM in a LightningModule that is not ours; None: the one in it.
        processor: Its processor; None: the module's ``processor``.
        probes: A ``ProbeSet``, a file or rows of pictures with captions and objects, or ``Probes`` (how many, and how
            many at a time); None: the data module's.
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        neighbours: int = 10,
        model: str | None = None,
        processor: Any = None,
        probes: Any = None,
    ) -> None:
        super().__init__(schedule.beginning(), model, processor, probes)
        self.neighbours = neighbours

    def analyze(self, data: InspectionInput) -> Findings:
        if data.start is None or data.start is data.reading:
            return Findings(data.step)
        return measure_drift(data.start, data.reading, data.probe_set, self.neighbours, data.device)
