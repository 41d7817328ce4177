"""What the page that compares several runs says: accuracy, curves, measures by layer, and how the runs differ.

Data flow: the files of each run directory -> verdicts in words, figures that hold all runs, tables -> the variables of
compare.html.jinja. A file that is missing or damaged costs its own part of its own run, which is said.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lightning_mm.core import metric_names
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json
from lightning_mm.core.layer_table import LayerRow, read_layers
from lightning_mm.core.measure_catalog import QUESTIONS
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.core.simultaneous import tell_apart
from lightning_mm.report.figures.compared import RunPanel, RunShare, compared_profiles, compared_shares, run_style
from lightning_mm.report.figures.curves import Series, line_chart, running_mean
from lightning_mm.report.figures.figure import printable
from lightning_mm.report.figures.theme import LineStyle
from lightning_mm.report.figures.tracks import Track
from lightning_mm.report.optional_file import OptionalFile, read_optional
from lightning_mm.report.sections import run as run_section
from lightning_mm.report.sections.layers import MeasureFigure, ordered
from lightning_mm.report.sections.run import Curve
from lightning_mm.report.tables.curves import read_curves
from lightning_mm.report.tables.numbers import percent
from lightning_mm.report.tables.panels import Panel, TrainedLayers, panels

_MOST_RUNS, _MOST_KEYS, _MOST_FIGURES, _SHOWN = 12, 80, 120, 4
_CURVES = (
    (metric_names.TRAIN_LOSS, "Training loss", "nats per token", False),
    (metric_names.VAL_LOSS, "Validation loss", "nats per token", False),
    (metric_names.VAL_EXACT_MATCH, "Exact match", "share of answers", True),
    (metric_names.VAL_TOKEN_ACCURACY, "Token accuracy", "share of tokens", True),
    (metric_names.SUPERVISED_TOKENS_PER_SECOND, "Throughput", "answer tokens/s", False),
    (metric_names.PEAK_MEMORY, "Memory", "GiB, highest so far", False),
    (metric_names.GRAD_NORM, "Gradient norm", "before clipping", False),
)


@dataclass(frozen=True)
class ComparedRun:
    """One run of the comparison.

    Args:
        directory: Its folder.
        name: What it is called on the page; unique there.
        style: How its lines are drawn.
    """

    directory: RunDirectory
    name: str
    style: LineStyle

    @cached_property
    def curves(self) -> OptionalFile:
        return read_optional(self.directory.metrics, lambda: read_curves(self.directory.metrics))

    @cached_property
    def census(self) -> OptionalFile:
        return read_optional(self.directory.census, lambda: run_section.census(read_json(self.directory.census)))

    @cached_property
    def trained(self) -> TrainedLayers:
        read = read_optional(self.directory.census, lambda: TrainedLayers.of(read_json(self.directory.census)))
        return read.content if isinstance(read.content, TrainedLayers) else TrainedLayers()

    @cached_property
    def panels(self) -> OptionalFile:
        path = self.directory.layers
        return read_optional(path, lambda: [panel for panel in panels(read_layers(path)[0]) if panel.measured])

    @cached_property
    def shares(self) -> OptionalFile:
        """Accuracy after training by question type."""
        path = self.directory.evaluation
        return read_optional(path, lambda: _shares(read_json(path)["rows"]))

    @cached_property
    def config(self) -> OptionalFile:
        path = self.directory.config
        return read_optional(path, lambda: _flat(_loaded(path)))

    @property
    def problems(self) -> list[str]:
        """What could not be read; layers.csv is no fault to lack."""
        read = [self.shares, self.curves, self.census, self.config, self.panels]
        names = [self.directory.layers.name]
        return [f.problem for f in read if f.problem and not any(f.problem == f"The run has no {n}." for n in names)]


def default_path(directories: Sequence[RunDirectory]) -> Path:
    """The file beside the first run that a comparison is written to."""
    names = re.sub(r"[^\w.-]", "", "-".join(directory.name for directory in directories))[:100]
    return directories[0].path.parent / f"compare-{names}.html"


def comparison_content(directories: Sequence[RunDirectory]) -> dict[str, Any]:
    """The variables of the template.

    Raises:
        UserError: If a run is named twice, or there are more runs than one page holds.
    """
    paths = [directory.path.resolve() for directory in directories]
    if len(set(paths)) < len(paths):
        raise UserError("A run is named twice.", f"Named: {', '.join(map(str, paths))}.", "Name each run once.")
    if len(paths) > _MOST_RUNS:
        raise UserError(f"{len(paths)} runs are too many.", f"A page holds {_MOST_RUNS}.", "Compare fewer at a time.")
    names = [directory.name for directory in directories]
    unique = [
        n if names.count(n) == 1 else f"{d.path.parent.name}/{n}" for n, d in zip(names, directories, strict=True)
    ]
    runs = [
        ComparedRun(d, printable(n), run_style(i)) for i, (d, n) in enumerate(zip(directories, unique, strict=True))
    ]
    measures, lonely = _measures(runs)
    return {
        "name": " against ".join(run.name for run in runs),
        "outcome": _outcome(runs),
        "runs": [(run, run.style, _facts(run)) for run in runs],
        "trains": _trains(runs),
        "accuracy": _accuracy(runs),
        "curves": _curves(runs),
        "measures": measures,
        "lonely": lonely,
        "differences": _differences(runs),
        "problems": [(run.name, problem) for run in runs for problem in run.problems],
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    }


def _facts(run: ComparedRun) -> dict[str, str]:
    census, steps = run.census.content, [points[-1][0] for points in (run.curves.content or {}).values() if points]
    everything = (run.shares.content or {}).get("all")
    interval = f" ({percent(everything.low)} to {percent(everything.high)})" if everything else ""
    return {
        "Policy": census.policy if census else "–",
        "Layers that train": census.layer_words if census else "–",
        "Trained parameters": census.size_words if census else "–",
        "Exact match": f"{percent(everything.share)}{interval}" if everything else "–",
        "Last logged step": f"{max(steps):,.0f}" if steps else "–",
    }


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, RunShare]:
    found = {}
    for row in rows:
        share, n = row.get("after"), int(row["n"])
        if share is not None and n > 0 and 0 <= float(share) <= 1:
            found[str(row["type"])] = RunShare(float(share), *run_section.wilson(float(share), n), n)
    return found


def _outcome(runs: Sequence[ComparedRun]) -> str:
    """Which run answers best, and from which others that tells it."""
    known = [(run, run.shares.content["all"]) for run in runs if "all" in (run.shares.content or {})]
    if len(known) < 2:
        return "Fewer than two of these runs were tested: their accuracy cannot be compared."
    best, share = max(known, key=lambda pair: pair[1].share)
    apart = [run.name for run, other in known if run is not best and _difference(share, other)[0] > 0]
    alike = [run.name for run, _ in known if run is not best and run.name not in apart]
    if not apart:
        shares = _listed([f"{run.name} {percent(other.share)}" for run, other in known])
        return f"The intervals of exact match separate no two runs: {shares}."
    words = f"{best.name} answers most questions exactly: {percent(share.share)}, more than {_listed(apart)}"
    return words + (f"; not told apart from {_listed(alike)}." if alike else ".")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _difference(one: RunShare, other: RunShare) -> tuple[float, float]:
    """95 % interval of the difference of two shares (Newcombe, Statistics in Medicine 17, 1998, method 10)."""
    change = one.share - other.share
    return (
        change - math.hypot(one.share - one.low, other.high - other.share),
        change + math.hypot(one.high - one.share, other.share - other.low),
    )


def _accuracy(runs: Sequence[ComparedRun]) -> dict[str, Any] | None:
    """The figure, and a row for each question type: each run, and what its difference from the first says."""
    by_run = {run.name: run.shares.content or {} for run in runs}
    kinds = list(dict.fromkeys(kind for shares in by_run.values() for kind in shares if kind != "all"))[:40]
    kinds += ["all"] if any("all" in shares for shares in by_run.values()) else []
    if not kinds:
        return None
    rows = [(kind, [_compared(kind, run, runs[0]) for run in runs]) for kind in kinds]
    return {"figure": compared_shares(kinds, by_run).drawn(), "rows": rows, "first": runs[0].name}


def _compared(kind: str, run: ComparedRun, first: ComparedRun) -> dict[str, str]:
    own, base = ((r.shares.content or {}).get(kind) for r in (run, first))
    if own is None:
        return {"value": "–", "interval": "", "verdict": ""}
    cells = {"value": percent(own.share), "interval": f"{percent(own.low)} to {percent(own.high)}, n {own.n:,}"}
    if run is first or base is None:
        return cells | {"verdict": ""}
    low, high = _difference(own, base)
    verdict = "higher" if low > 0 else "lower" if high < 0 else "not told apart"
    return cells | {"verdict": f"{verdict} ({100 * low:+.0f} to {100 * high:+.0f} points)"}


def _curves(runs: Sequence[ComparedRun]) -> list[Curve]:
    drawn = []
    for key, title, unit, share in _CURVES:
        series = []
        for run in runs:
            points = (run.curves.content or {}).get(key, [])
            smooth = len(points) > 40
            series.append(Series(run.name, running_mean(points, len(points) // 25) if smooth else points, run.style))
        chart = line_chart(title, unit, series, share=share, zero="loss" not in key and not share)
        if chart:
            drawn.append(Curve(chart.title, chart.unit, chart.figure.drawn(), chart.legend, chart.note))
    return drawn


def _trains(runs: Sequence[ComparedRun]) -> list[tuple[str, str, str]]:
    """A strip of layers for each run."""
    top = max((run.trained.total for run in runs), default=0)
    if not top:
        return []
    track = Track(0, top - 1, ())
    return [
        (run.name, track.membership(run.trained.layers).svg(), run_section.ranges(run.trained.layers)) for run in runs
    ]


def _measures(runs: Sequence[ComparedRun]) -> tuple[list[dict[str, Any]], int]:
    """The measures that two runs or more have, by question, and how many only one run has."""
    found: dict[tuple[str, str], list[RunPanel]] = {}
    for run in runs:
        for panel in run.panels.content or []:
            found.setdefault((panel.measure.name, panel.site), []).append(RunPanel(run.name, run.style, panel))
    shared = [group for group in found.values() if len(group) > 1]
    order = {id(panel): place for place, panel in enumerate(ordered([group[0].panel for group in shared]))}
    shared.sort(key=lambda group: order[id(group[0].panel)])
    by_question: dict[str, list[MeasureFigure]] = {}
    for group in shared[:_MOST_FIGURES]:
        question = group[0].panel.measure.question
        still = group[0].panel.measure.main > 0 and len(by_question.get(question, [])) < _SHOWN
        by_question.setdefault(question, []).append(_figure(group, still=still))
    groups = [
        {"title": QUESTIONS[name][0], "lead": QUESTIONS[name][1], "shown": figures[:_SHOWN], "more": figures[_SHOWN:]}
        for name, figures in ((name, by_question[name]) for name in QUESTIONS if name in by_question)
    ]
    return groups, len(found) - min(len(shared), _MOST_FIGURES)


def _figure(group: Sequence[RunPanel], *, still: bool) -> MeasureFigure:
    figure, legend = compared_profiles(group)
    known = group[0].panel.measure
    figure = figure.drawn() if still else figure
    return MeasureFigure(known.title, group[0].panel.place, _verdict(group), figure, legend, "")


def _verdict(group: Sequence[RunPanel]) -> str:
    """At how many layers the intervals tell each run from the first, at 5 % over all layers together."""
    first, told = _ends(group[0].panel), []
    for run in group[1:]:
        own = _ends(run.panel)
        both = [layer for layer in first if layer in own]
        apart = [layer for layer in both if tell_apart(first[layer], own[layer], len(both))]
        where = f"at {len(apart)} of {len(both)} layers ({run_section.ranges(apart)})" if apart else "nowhere"
        told.append(f"{run.name} {where if both else 'without intervals'}")
    return f"Told apart from {group[0].name}, over all layers: {'; '.join(told)}"


def _ends(panel: Panel) -> dict[int, LayerRow]:
    rows = panel.profile(panel.measured[-1])
    return {row.layer: row for row in rows if row.low is not None and row.high is not None}


def _loaded(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError as error:
        raise ValueError(str(error)[:120]) from error


def _flat(raw: Any, prefix: str = "", depth: int = 0) -> dict[str, str]:
    if isinstance(raw, Mapping) and raw and depth < 12:
        found: dict[str, str] = {}
        for key, value in raw.items():
            found |= _flat(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)
        return found
    return {prefix: str(raw)[:200]}


def _differences(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """The options that are not alike in all runs that have a configuration."""
    read = [run.config.content or {} for run in runs]
    keys = list(dict.fromkeys(key for config in read for key in config))
    rows = [(key, [config.get(key, "–") for config in read]) for key in keys]
    rows = [(key, values) for key, values in rows if len(set(values)) > 1]
    return {"rows": rows[:_MOST_KEYS], "further": max(0, len(rows) - _MOST_KEYS), "known": sum(bool(c) for c in read)}
