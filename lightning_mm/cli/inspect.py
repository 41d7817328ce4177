"""The verb inspect: the callbacks' analyses on any model folder, run or checkpoint, without training; or two compared.

Data flow: model(s) + probe set -> hidden states of each -> probing, geometry, drift, layer selection -> a folder with
report.html, layers.csv and JSON; the peaks are printed.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from lightning_mm.analysis.drift import measure_drift
from lightning_mm.analysis.findings import Findings, FindingsWriter
from lightning_mm.analysis.geometry import (
    DEFAULT_MEASURES,
    measure_geometry,
    resolve_measures,
)
from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.analysis.probing import ProbingOptions, run_probes
from lightning_mm.analysis.summary import MAIN_PROFILES, summarize_profile
from lightning_mm.cli.parser import Parser
from lightning_mm.core.decisions import decision_log, log, log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_json
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.layer_selection.select import AutoRange, log_selection
from lightning_mm.report.html import write_report
from lightning_mm.verbs.model_source import InspectedModel, model_label, open_models


def inspect(arguments: list[str]) -> int:
    """Read every layer of a model: probes, geometry, and which layers are worth training."""
    options = _parser().parse_args(arguments[1:])
    measures, auto = resolve_measures(options.measures or DEFAULT_MEASURES), AutoRange(**vars(options.auto))
    options.probing = ProbingOptions(**vars(options.probing))
    paths = [options.model, *([options.against] if options.against else [])]
    models, probe_set = open_models(paths, options, auto)
    run = RunDirectory.create(options.root, options.name or "inspect-" + "-".join(model_label(path) for path in paths))
    seen: list[tuple[InspectedModel, HiddenStates]] = []
    found = []
    for step, model in enumerate(models):
        first = seen[0][1] if seen else None
        reading, one = _inspect_model(model, probe_set, step, measures, options, first, run)
        found.append(one)
        seen.append((model, reading))
        _write_labels(run, paths, model)
    if options.select:
        _select(seen, probe_set, run)
    _write_ledger(models, run)
    write_json(run.decisions, [asdict(decision) for decision in decision_log()])
    write_report(run.path)
    for path, one in zip(paths, found, strict=True):
        Console().print(peaks_table(path, one))
    log.info("report: %s", run.report)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="lightning-mm inspect", description=inspect.__doc__)
    parser.add_argument("model", type=str, help="Model folder or hub name, a run's folder, or a checkpoint of a run.")
    parser.add_argument("--against", type=str | None, default=None, help="A second one, to see what differs.")
    parser.add_argument(
        "--probes",
        type=str | None,
        default=None,
        help="File of pictures with captions and objects (rows, LLaVA JSON, COCO annotations); a run knows its own.",
    )
    parser.add_argument(
        "--data", type=str | None, default=None, help="Conversations for the gradient criteria; a run knows its own."
    )
    parser.add_argument(
        "--image_root",
        type=str | None,
        default=None,
        help="Folder that the pictures of --probes and --data are relative to; each file's own folder if not given.",
    )
    parser.add_argument(
        "--images", type=int | None, default=None, help="Most pictures; a run's own number, else 256, if not given."
    )
    parser.add_argument(
        "--max_length", type=int | None, default=None, help="Longest row in tokens; a run's own, else 2048."
    )
    parser.add_argument("--checkpoint", type=str, default="last", help="Of a run: name in its checkpoints.")
    parser.add_argument("--measures", type=list[str] | None, default=None, help="Geometry measures, or [all].")
    parser.add_argument("--neighbours", type=int, default=10, help="k of the neighbourhood measures.")
    parser.add_class_arguments(ProbingOptions, "probing")
    parser.set_defaults({"probing.selectivity": True})
    parser.add_argument("--text_only", type=bool, default=True, help="Probe the captions alone too.")
    parser.add_argument("--select", type=bool, default=True, help="Say which layers are worth training.")
    parser.add_class_arguments(AutoRange, "auto")
    parser.add_argument("--batch_size", type=int, default=16, help="Rows per forward pass.")
    parser.add_argument("--bf16", type=bool, default=False, help="Compute the model's forward pass in bfloat16.")
    parser.add_argument("--root", type=str, default="runs", help="Folder of all runs.")
    parser.add_argument("--name", type=str | None, default=None, help="Name of the folder to make.")
    return parser


def _inspect_model(
    model: InspectedModel,
    probe_set: ProbeSet,
    step: int,
    measures: Sequence[str],
    options: Namespace,
    first: HiddenStates | None,
    run: RunDirectory,
) -> tuple[HiddenStates, Findings]:
    began = time.perf_counter()
    reading = model.read(probe_set, step)
    problems = [*reading.problems]
    alone = _without_pictures(model, probe_set, step, problems) if options.text_only else None
    forward = time.perf_counter() - began
    found = run_probes(reading, alone, probe_set, options.probing, model.device)
    found.problems[:0] = problems
    found.extend(measure_geometry(reading, probe_set, measures, options.neighbours, model.device))
    if first is not None:
        found.extend(measure_drift(first, reading, probe_set, options.neighbours, model.device))
    recorder = FindingsWriter(run)
    if step == 0:
        recorder.write_probe_set(probe_set)
    recorder.write(found, forward, time.perf_counter() - began - forward)
    log.info("%s: read in %.1f s, analysed in %.1f s", model.name, forward, time.perf_counter() - began - forward)
    for problem in found.problems:
        log.warning("%s", problem)
    return reading, found


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


def _select(seen: Sequence[tuple[InspectedModel, HiddenStates]], probe_set: ProbeSet, run: RunDirectory) -> None:
    """Select layers of the first model; a second, tuned one adds two criteria."""
    model, reading = seen[0]
    try:
        selection = model.select(reading, probe_set, seen[1] if len(seen) > 1 else None)
    except UserError as error:
        log_decision("select", "no layers are chosen", f"{error.what} {error.why}")
        return
    log_selection(selection)
    write_json(run.selection, selection.to_dict())


def _write_ledger(models: Sequence[InspectedModel], run: RunDirectory) -> None:
    """Write the ledger of rejected probe and conversation rows."""
    ledger = RejectedSamples()
    for data in (data for model in models for data in (model.data, model.conversations)):
        ledger.add(data.rejected_samples)
    if len(ledger):
        ledger.write(run.ledger)


def _write_labels(run: RunDirectory, paths: Sequence[str], model: InspectedModel) -> None:
    """Write which model is which step, and which of its layers were trained."""
    title = " against ".join(map(model_label, paths))
    labels = {str(step): str(path) for step, path in enumerate(paths)}
    write_json(run.path / "inspection.json", {"title": title, "model": model.kind, "labels": labels})
    trained = {"expression": "", "trained": list(model.trained), "total": model.mm.layout.num_layers}
    if model.trained:
        write_json(run.census, {"layers": trained})


def peaks_table(title: str, found: Findings) -> Table:
    """Peaks of the main profiles, for the console."""
    table = Table(title=str(title))
    for column in ("measure", "read at"):
        table.add_column(column, no_wrap=True)
    for column in ("peak layer", "value", "95 % interval", "chance", "n", "half height"):
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
        table.add_row(measure, site, str(brief.peak_layer), f"{peak.value:.3g}", interval, null, str(peak.n), half)
    return table
