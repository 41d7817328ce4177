"""Reads every layer of a model, without training: probes, geometry, layer selection; or of two, compared.

Data flow: model(s) + probe set -> hidden states of each -> probing, geometry, drift, layer selection ->
``InspectionResult``, and a folder with report.html, layers.csv and JSON where one is wanted.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from lightning_mm.analysis.drift import measure_drift
from lightning_mm.analysis.findings import Findings, FindingsWriter
from lightning_mm.analysis.geometry import DEFAULT_MEASURES, SVCCA_VARIANCE, measure_geometry, resolve_measures
from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.analysis.probing import ProbingOptions, run_probes
from lightning_mm.analysis.summary import MAIN_PROFILES, ProfileSummary, summarize_profile
from lightning_mm.core.decisions import Decision, log, log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_json
from lightning_mm.core.layer_table import LayerRow
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.layer_selection.select import AutoRange, Selection, log_selection
from lightning_mm.report.html import write_report
from lightning_mm.verbs.inspected_model import InspectedModel, ReadingOptions, open_models
from lightning_mm.verbs.model_source import ModelLike, ModelSource, ProcessorLike
from lightning_mm.verbs.result import PrintedResult, open_decisions
from lightning_mm.verbs.rows import PathLike

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class ModelFindings:
    """What was found in one model.

    Args:
        model: What reads it.
        path: The path that it was named by.
        reading: Its hidden states.
        findings: What was measured of them.
        seconds: Of the forward passes, and of the analyses.
    """

    model: InspectedModel = field(repr=False)
    path: str
    reading: HiddenStates = field(repr=False)
    findings: Findings = field(repr=False)
    seconds: tuple[float, float]


@dataclass(frozen=True, eq=False, repr=False)
class InspectionResult(PrintedResult):
    """What ``inspect`` found; ``print`` shows the peaks.

    Args:
        paths: What each model was named by; the number of a model here is the ``step`` of its rows.
        findings: What was measured of each.
        probe_set: The rows that all were read on.
        selection: The layers worth training; None where none were chosen, with the reason among the decisions.
        rejected: Rows that were not used, with reasons.
        decisions: Automatic choices, with reasons.
        run: The folder that was written; None: none was wanted.
    """

    paths: tuple[str, ...]
    findings: tuple[Findings, ...]
    probe_set: ProbeSet
    selection: Selection | None
    rejected: RejectedSamples
    decisions: tuple[Decision, ...]
    run: RunDirectory | None = None

    @property
    def rows(self) -> list[LayerRow]:
        """One row per model, layer, measure and site, as layers.csv holds them; layer -1 is the embeddings."""
        return [row for each in self.findings for row in each.rows]

    @property
    def report(self) -> Path | None:
        """The report; None where no folder was wanted."""
        return None if self.run is None else self.run.report

    def profile(self, measure: str, site: str, model: int = 0) -> dict[int, LayerRow]:
        """One measure at one site by layer; empty where it was not measured.

        Args:
            measure: Its name, such as 'overlap' or 'entailment'.
            site: Where it was measured, such as 'last' or 'image'.
            model: 0: the first; 1: the one it was held against.
        """
        return self.findings[model].profile(measure, site)

    def to_pandas(self) -> "pandas.DataFrame":
        """The rows as a data frame, one column per field of a row."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows])

    def tables(self) -> list[Table | str]:
        """The peaks of each model."""
        return [peaks_table(path, one) for path, one in zip(self.paths, self.findings, strict=True)]


def inspect(
    model: ModelLike,
    *,
    against: ModelLike | None = None,
    probes: PathLike | ProbeSet | None = None,
    data: PathLike | MMDataModule | None = None,
    processor: ProcessorLike | None = None,
    image_root: PathLike | None = None,
    images: int | None = None,
    max_length: int | None = None,
    checkpoint: str = "last",
    measures: str | Sequence[str] | None = None,
    neighbours: int = 10,
    svcca_variance: float = SVCCA_VARIANCE,
    both_last: bool = False,
    probing: ProbingOptions = ProbingOptions(selectivity=True),  # noqa: B008  (frozen)
    text_only: bool = True,
    select: bool = True,
    auto: AutoRange = AutoRange(),  # noqa: B008  (frozen)
    batch_size: int = 16,
    bf16: bool = False,
    out: PathLike | None = None,
) -> InspectionResult:
    """Read every layer of a model: probes, geometry, and which layers are worth training.

    Args:
        model: Model folder, hub name, run or checkpoint by its path; or a loaded model, which is left as it was.
        against: A second one, to see what differs; a tuned one adds two criteria to the selection.
        probes: File of pictures with captions and objects (rows, LLaVA JSON, COCO annotations), or a ``ProbeSet``;
            None: that of the run.
        data: Conversations for the gradient criteria, or a data module, whose probes count too; None: those of the run.
        processor: Of a loaded model; None: the one beside the weights that it was loaded from.
        image_root: Folder that the pictures of ``probes`` and ``data`` are relative to; None: each file's own folder.
        images: Most pictures; None: a run's own number, else 256.
        max_length: Longest row in tokens; None: a run's own, else 2048.
        checkpoint: Of a run: name in its checkpoints, 'last' by default.
        measures: Geometry measures; None: one of each kind; 'all': all.
        neighbours: k of the neighbourhood measures.
        svcca_variance: Share of its variance that SVCCA's directions explain, where there are samples enough.
        both_last: Whether to read each picture and its caption in one prompt too, once with the caption last and once
            with the picture last (site ``token_last``; Palacios et al. 2026, arXiv:2606.03871).
        probing: Which probes, and what is measured beside their accuracy.
        text_only: Whether to probe the captions alone too: what language alone gives.
        select: Whether to say which layers are worth training.
        auto: How those are chosen.
        batch_size: Rows per forward pass.
        bf16: Whether to compute forward passes in bfloat16.
        out: Folder to write, with report.html, layers.csv and JSON; None (default): nothing is written.

    Raises:
        UserError: There is no such model, nothing to probe with, or the two models cannot be compared.
    """
    wanted = resolve_measures([measures] if isinstance(measures, str) else measures or DEFAULT_MEASURES)
    options = ReadingOptions(
        probes=probes,
        data=data,
        image_root=image_root,
        images=images,
        max_length=max_length,
        batch_size=batch_size,
        bf16=bf16,
        both_last=both_last,
    )
    geometry = _Geometry(wanted, neighbours, svcca_variance)
    with open_decisions() as decisions, ExitStack() as stack:
        named = [model] if against is None else [model, against]
        sources = [ModelSource.of(each, checkpoint, processor) for each in named]
        models, probe_set = open_models(sources, options, auto, stack)
        run = None if out is None else RunDirectory.create(Path(out).absolute().parent, Path(out).name)
        found: list[ModelFindings] = []
        for step, (one, source) in enumerate(zip(models, sources, strict=True)):
            first = found[0].reading if found else None
            seen = _read(one, source, probe_set, step, geometry, probing, text_only, first)
            found.append(seen)
            if run is not None:
                _write(run, seen, probe_set, sources)
        selection = _select(found, probe_set) if select else None
        result = InspectionResult(
            tuple(source.path for source in sources),
            tuple(each.findings for each in found),
            probe_set,
            selection,
            _rejected(models),
            tuple(decisions),
            run,
        )
    if run is not None:
        _finish(run, result)
    return result


@dataclass(frozen=True)
class _Geometry:
    """What geometry is measured of, and how."""

    measures: Sequence[str]
    neighbours: int
    svcca_variance: float

    def __post_init__(self) -> None:
        if not 0 < self.svcca_variance <= 1:
            given = f"svcca_variance is {self.svcca_variance}."
            raise UserError(given, "It is a share of the variance.", "Give a number above 0, at most 1.")


def _read(
    model: InspectedModel,
    source: ModelSource,
    probe_set: ProbeSet,
    step: int,
    geometry: _Geometry,
    probing: ProbingOptions,
    text_only: bool,
    first: HiddenStates | None,
) -> ModelFindings:
    """All analyses of one model; ``first`` is what drift is measured from."""
    began = time.perf_counter()
    reading = model.read(probe_set, step)
    problems = [*reading.problems]
    alone = _without_pictures(model, probe_set, step, problems) if text_only else None
    forward = time.perf_counter() - began
    found = run_probes(reading, alone, probe_set, probing, model.device)
    found.problems[:0] = problems
    k, variance = geometry.neighbours, geometry.svcca_variance
    found.extend(measure_geometry(reading, probe_set, geometry.measures, k, model.device, variance))
    if first is not None:
        found.extend(measure_drift(first, reading, probe_set, k, model.device))
    analyses = time.perf_counter() - began - forward
    log.info("%s: read in %.1f s, analysed in %.1f s", model.name, forward, analyses)
    for problem in found.problems:
        log.warning("%s", problem)
    return ModelFindings(model, source.path, reading, found, (forward, analyses))


def _without_pictures(
    model: InspectedModel, probe_set: ProbeSet, step: int, problems: list[str]
) -> HiddenStates | None:
    """Hidden states of the entailment rows with grey images; None without such rows, or if reading fails."""
    blank = probe_set.without_pictures()
    if not len(blank):
        return None
    try:
        reading = model.read(blank, step)
    except Exception as error:  # only a baseline: the results with images stand without it
        problems.append(f"nothing was read without pictures: {type(error).__name__}: {error}")
        return None
    problems += reading.problems
    return reading


def _select(found: Sequence[ModelFindings], probe_set: ProbeSet) -> Selection | None:
    """Layers of the first model; a second, tuned one adds two criteria."""
    first = found[0]
    try:
        pilot = (found[1].model, found[1].reading) if len(found) > 1 else None
        selection = first.model.select(first.reading, probe_set, pilot)
    except UserError as error:
        log_decision("select", "no layers are chosen", f"{error.what} {error.why}")
        return None
    log_selection(selection)
    return selection


def _rejected(models: Sequence[InspectedModel]) -> RejectedSamples:
    """Rejected rows of probes and conversations."""
    ledger = RejectedSamples()
    for data in (data for model in models for data in (model.data, model.conversations)):
        ledger.add(data.rejected_samples)
    return ledger


def _write(run: RunDirectory, seen: ModelFindings, probe_set: ProbeSet, sources: Sequence[ModelSource]) -> None:
    """Write the findings of one model, which model is which step, and which of its layers were trained."""
    recorder = FindingsWriter(run)
    if seen.findings.step == 0:
        recorder.write_probe_set(probe_set)
    recorder.write(seen.findings, *seen.seconds)
    title = " against ".join(source.label for source in sources)
    labels = {str(step): source.path for step, source in enumerate(sources)}
    write_json(run.inspection, {"title": title, "model": seen.model.kind, "labels": labels})
    trained = {"expression": "", "trained": list(seen.model.trained), "total": seen.model.mm.layout.num_layers}
    if seen.model.trained:
        write_json(run.census, {"layers": trained})


def _finish(run: RunDirectory, result: InspectionResult) -> None:
    """Write the selection, the ledger of rejected rows, the decisions and the report."""
    if result.selection is not None:
        write_json(run.selection, result.selection.to_dict())
    if len(result.rejected):
        result.rejected.write(run.ledger)
    write_json(run.decisions, [asdict(decision) for decision in result.decisions])
    write_report(run.path)


def peaks_table(title: str, found: Findings) -> Table:
    """Peaks of the main profiles, for the console."""
    table = Table(title=str(title))
    for column in ("measure", "read at"):
        table.add_column(column, no_wrap=True)
    for column in ("peak layer", "value", "95 % interval", "chance", "clear of it", "n", "half height"):
        table.add_column(column)
    for measure, site in MAIN_PROFILES:
        profile = found.profile(measure, site)
        brief = summarize_profile(profile)
        if brief is None:
            reason = next((row.undefined for row in profile.values()), "")
            if reason:
                table.add_row(measure, site, "undefined", reason)
            continue
        peak = brief.peak
        interval = "" if peak.low is None or peak.high is None else f"{peak.low:.3g} to {peak.high:.3g}"
        null = "" if peak.null is None else f"{peak.null:.3g}"
        half = f"{brief.half[0]} to {brief.half[1]}"
        clear = "" if peak.is_clear is None else "yes" if peak.is_clear else "no"
        value = f"{peak.value:.3g}"
        table.add_row(measure, site, _place(brief), value, interval, null, clear, str(peak.n), half)
    return table


def _place(brief: ProfileSummary) -> str:
    """The peak layer, and between which it may be."""
    span = brief.peak_range
    return str(brief.peak_layer) if span is None else f"{brief.peak_layer} ({span[0]} to {span[1]})"
