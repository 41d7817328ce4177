"""What the page of a run or an inspection says: its header, and the content of each of its sections.

Data flow: the files of a run directory -> ``sections`` -> the variables of report.html.jinja. A folder that
``lightning-mm inspect`` made gets a page of what it holds, and no more. A file that is missing or half written costs
its own section only, which then says so. No content is trusted.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json, read_jsonl
from lightning_mm.core.layer_table import read_layers
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.optional_file import PARSE_ERRORS, read_optional
from lightning_mm.report.sections import causal, layers, run, selection
from lightning_mm.report.sections.samples import samples
from lightning_mm.report.sections.sources import sources
from lightning_mm.report.tables.curves import read_curves
from lightning_mm.report.tables.panels import StepLabels, TrainedLayers

_PARTS = {
    "accuracy": "Accuracy",
    "curves": "Curves",
    "sources": "Sources",
    "trains": "What trains",
    "chosen": "Why these layers",
    "inside": "Inside the model",
    "causes": "What causes the answer",
    "samples": "Samples",
    "decisions": "Decisions",
    "left-out": "Left out",
    "config": "Configuration",
}


def page_content(directory: RunDirectory) -> dict[str, Any]:
    """The variables of the template."""
    curves = read_optional(directory.metrics, lambda: read_curves(directory.metrics))
    evaluation = read_optional(directory.evaluation, lambda: read_json(directory.evaluation))
    scores = evaluation
    if evaluation.content:
        scores = read_optional(directory.evaluation, lambda: run.scores(evaluation.content))
    config = read_optional(directory.config, lambda: directory.config.read_text(encoding="utf-8", errors="replace"))
    split = evaluation.content.get("split", "test") if isinstance(evaluation.content, Mapping) else "test"
    about = _about(directory)
    inside = _inside(directory, about["labels"])
    parts = _parts(directory, inside)
    return {
        "name": about["title"] or directory.name,
        "kind": "inspection" if _is_inspection(directory) else "run",
        "parts": [(name, words) for name, words in _PARTS.items() if name in parts],
        "outcome": run.outcome(scores.content or [], curves.content or {}, str(split)),
        "split": str(split),
        "started": _started(directory),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "steps": f"{max((p[-1][0] for p in (curves.content or {}).values()), default=0):,.0f}",
        "model": about["model"] or _model(config.content or ""),
        "charts": read_optional(directory.metrics, lambda: run.charts(curves.content)) if curves.content else curves,
        "census": read_optional(directory.census, lambda: run.census(read_json(directory.census))),
        "scores": scores,
        "samples": read_optional(directory.samples, lambda: samples(directory.path, read_json(directory.samples))),
        "decisions": read_optional(directory.decisions, lambda: run.decisions(read_json(directory.decisions))),
        "sources": read_optional(
            directory.sources, lambda: sources(read_json(directory.sources), curves.content or {})
        ),
        "ledger": read_optional(directory.ledger, lambda: _ledger(directory.ledger)),
        "config": config,
        **inside,
    }


def _inside(directory: RunDirectory, labels: Mapping[int, str]) -> dict[str, Any]:
    """What was measured inside the model."""
    names, trained = StepLabels(labels), _trained(directory)
    read = read_optional(directory.layers, lambda: read_layers(directory.layers))
    rows, bad = read.content or ([], 0)
    own = [row for row in rows if not causal.is_causal(row)]
    looked = {
        "chosen": read_optional(directory.selection, lambda: selection.chosen(read_json(directory.selection), trained)),
        "inside": read_optional(directory.layers, lambda: layers.layer_section(own, bad, trained, names))
        if read.content
        else read,
        "matrices": read_optional(
            directory.matrices, lambda: selection.matrices(read_json(directory.matrices), trained, names)
        ),
        "probes": read_optional(directory.probes, lambda: selection.probe_set(read_json(directory.probes))),
        "cost": read_optional(directory.inspections, lambda: selection.cost(read_json(directory.inspections))),
        "causes": causal.causal_section(directory, [row for row in rows if causal.is_causal(row)], trained, names),
    }
    return looked | {"trained": trained, "labels": [words for _, words in sorted(labels.items())]}


def _trained(directory: RunDirectory) -> TrainedLayers:
    """Which layers train; of a model that was not trained, which were chosen to; nothing where neither is known."""
    census = read_optional(directory.census, lambda: TrainedLayers.of(read_json(directory.census))).content
    if isinstance(census, TrainedLayers):
        return census
    chosen = read_optional(directory.selection, lambda: selection.selected(read_json(directory.selection))).content
    return chosen if isinstance(chosen, TrainedLayers) else TrainedLayers()


def _about(directory: RunDirectory) -> dict[str, Any]:
    """Title, model and names of what was compared, from inspection.json where there is one."""
    try:
        raw = read_json(directory.inspection)
        labels = {int(step): str(words)[:80] for step, words in (raw.get("labels") or {}).items()}
        return {
            "title": str(raw.get("title") or "")[:120],
            "model": str(raw.get("model") or "")[:120],
            "labels": labels,
        }
    except (UserError, *PARSE_ERRORS):
        title, model = causal.title(directory)
        labels = {0: model} if model and _is_inspection(directory) else {}
        return {"title": title, "model": "" if labels else model, "labels": labels}


def _is_inspection(directory: RunDirectory) -> bool:
    """Whether the model was looked at without being trained: nothing of training is there."""
    seen = [directory.layers, directory.selection, *(directory.path / name for name in causal.FILES)]
    looked = any(path.exists() for path in seen)
    trained = directory.metrics.exists() or directory.config.exists()
    return directory.inspection.exists() or (looked and not trained and _census_is_short(directory))


def _census_is_short(directory: RunDirectory) -> bool:
    """Whether the census names the trained layers and no more, or is not there."""
    rows = read_optional(directory.census, lambda: "rows" in read_json(directory.census))
    return not directory.census.exists() or rows.content is False


def _parts(directory: RunDirectory, looked: Mapping[str, Any]) -> set[str]:
    """The sections of this report: those of a run stand even where they are empty, to say why."""
    files = {
        "accuracy": [directory.evaluation],
        "curves": [directory.metrics],
        "sources": [directory.sources],
        "trains": [directory.census],
        "chosen": [directory.selection],
        "inside": [directory.matrices, directory.probes, directory.inspections],
        "samples": [directory.samples],
        "decisions": [directory.decisions],
        "left-out": [directory.ledger],
        "config": [directory.config],
    }
    there = {name for name, paths in files.items() if any(path.exists() for path in paths)}
    there |= {"causes"} if looked["causes"] else set()
    only_causes = looked["causes"] and looked["inside"].content and not looked["inside"].content.holds_any
    there |= {"inside"} if directory.layers.exists() and not only_causes else set()
    if not _is_inspection(directory):
        return there | (files.keys() - {"chosen", "inside", "sources"})
    return there - {"trains"} if _census_is_short(directory) else there


def _ledger(path: Path) -> dict[str, Any]:
    rows, broken = read_jsonl(path)
    return {"reasons": run.ledger(rows), "broken": broken, "total": f"{len(rows):,}"}


def _started(directory: RunDirectory) -> str:
    try:
        return datetime.fromisoformat(read_json(directory.path / "run.json")["created"]).strftime("%Y-%m-%d %H:%M")
    except (UserError, *PARSE_ERRORS):
        return ""


def _model(config: str) -> str:
    try:
        return run.model_of(yaml.safe_load(config))
    except (yaml.YAMLError, *PARSE_ERRORS):
        return ""
