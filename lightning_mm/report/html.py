"""The local report: ``report.html``, one file that opens anywhere and is complete without any service.

Data flow: the files of a run directory -> ``sections``, ``inside``, ``facts``, ``samples`` (what is said) ->
``templates/`` (how it looks). A folder that ``lightning-mm inspect`` made gets a page of what it holds, and no more.
A file that is missing or half written costs its own section only, which then says so. All that is read is untrusted.
"""

import csv
import io
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json, read_jsonl, write_atomically
from lightning_mm.core.layer_table import read_layers
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.figures import colors
from lightning_mm.report.optional_file import BROKEN, found
from lightning_mm.report.sections import run as sections
from lightning_mm.report.sections import selection as facts
from lightning_mm.report.sections.causal import FILES as CAUSAL_FILES
from lightning_mm.report.sections.causal import causes, is_cause
from lightning_mm.report.sections.causal import title as causal_title
from lightning_mm.report.sections.layers import inside
from lightning_mm.report.sections.run import charts
from lightning_mm.report.sections.samples import samples
from lightning_mm.report.tables.panels import StepNames, Trained

_PARTS = {
    "accuracy": "Accuracy",
    "curves": "Curves",
    "trains": "What trains",
    "chosen": "Why these layers",
    "inside": "Inside the model",
    "causes": "What causes the answer",
    "samples": "Samples",
    "decisions": "Decisions",
    "left-out": "Left out",
    "config": "Configuration",
}


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the run directory, from whatever it holds.

    Args:
        run: The folder of a run; only the files of the contract are read.

    Returns:
        The path of the report.

    Raises:
        UserError: If there is no such folder, or the report cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # late: most commands write no report

    directory = RunDirectory.open(run)
    template = Environment(
        loader=PackageLoader("lightning_mm.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    page = template.render(_gather(directory))
    try:
        write_atomically(directory.report, page.encode("utf-8", errors="replace"))
    except OSError as error:
        fix = "Free some space, or make the folder writable."
        raise UserError(f"{directory.report} cannot be written.", str(error), fix) from error
    return directory.report


def _gather(directory: RunDirectory) -> dict[str, Any]:
    """All that the template asks for."""
    curves = found(directory.metrics, lambda: read_curves(directory.metrics))
    evaluation = found(directory.evaluation, lambda: read_json(directory.evaluation))
    scores = evaluation
    if evaluation.content:
        scores = found(directory.evaluation, lambda: sections.scores(evaluation.content))
    config = found(directory.config, lambda: directory.config.read_text(encoding="utf-8", errors="replace"))
    split = evaluation.content.get("split", "test") if isinstance(evaluation.content, Mapping) else "test"
    about = _about(directory)
    looked = _looked(directory, about["labels"])
    parts = _parts(directory, looked)
    return {
        "name": about["title"] or directory.name,
        "kind": "inspection" if _is_inspection(directory) else "run",
        "parts": [(name, words) for name, words in _PARTS.items() if name in parts],
        "outcome": sections.outcome(scores.content or [], curves.content or {}, str(split)),
        "split": str(split),
        "started": _started(directory),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "steps": f"{max((p[-1][0] for p in (curves.content or {}).values()), default=0):,.0f}",
        "model": about["model"] or _model(config.content or ""),
        "charts": found(directory.metrics, lambda: charts(curves.content)) if curves.content else curves,
        "census": found(directory.census, lambda: sections.census(read_json(directory.census))),
        "scores": scores,
        "samples": found(directory.samples, lambda: samples(directory.path, read_json(directory.samples))),
        "decisions": found(directory.decisions, lambda: sections.decisions(read_json(directory.decisions))),
        "ledger": found(directory.ledger, lambda: _ledger(directory.ledger)),
        "config": config,
        "light": colors.css(colors.LIGHT) + colors.css(colors.SIGNED_LIGHT, "d"),
        "dark": colors.css(colors.DARK) + colors.css(colors.SIGNED_DARK, "d"),
        **looked,
    }


def _looked(directory: RunDirectory, labels: Mapping[int, str]) -> dict[str, Any]:
    """What was found inside the model."""
    names, trained = StepNames(labels), _trained(directory)
    read = found(directory.layers, lambda: read_layers(directory.layers))
    rows, bad = read.content or ([], 0)
    own = [row for row in rows if not is_cause(row)]
    looked = {
        "chosen": found(directory.selection, lambda: facts.chosen(read_json(directory.selection), trained)),
        "inside": found(directory.layers, lambda: inside(own, bad, trained, names)) if read.content else read,
        "matrices": found(directory.matrices, lambda: facts.matrices(read_json(directory.matrices), trained, names)),
        "probes": found(directory.probes, lambda: facts.probe_set(read_json(directory.probes))),
        "cost": found(directory.inspections, lambda: facts.cost(read_json(directory.inspections))),
        "causes": causes(directory, [row for row in rows if is_cause(row)], trained, names),
    }
    return looked | {"trained": trained, "labels": [words for _, words in sorted(labels.items())]}


def _trained(directory: RunDirectory) -> Trained:
    """Which layers train; of a model that was not trained, which were chosen to; nothing where neither is known."""
    census = found(directory.census, lambda: Trained.of(read_json(directory.census))).content
    if isinstance(census, Trained):
        return census
    selection = found(directory.selection, lambda: facts.selected(read_json(directory.selection))).content
    return selection if isinstance(selection, Trained) else Trained()


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
    except (UserError, *BROKEN):
        title, model = causal_title(directory)
        labels = {0: model} if model and _is_inspection(directory) else {}
        return {"title": title, "model": "" if labels else model, "labels": labels}


def _is_inspection(directory: RunDirectory) -> bool:
    """Whether the model was looked at without being trained: nothing of training is there."""
    seen = [directory.layers, directory.selection, *(directory.path / name for name in CAUSAL_FILES)]
    looked = any(path.exists() for path in seen)
    trained = directory.metrics.exists() or directory.config.exists()
    return directory.inspection.exists() or (looked and not trained and _census_is_short(directory))


def _census_is_short(directory: RunDirectory) -> bool:
    """Whether the census names the trained layers and no more, or is not there."""
    rows = found(directory.census, lambda: "rows" in read_json(directory.census))
    return not directory.census.exists() or rows.content is False


def _parts(directory: RunDirectory, looked: Mapping[str, Any]) -> set[str]:
    """The sections of this report: those of a run stand even where they are empty, to say why."""
    files = {
        "accuracy": [directory.evaluation],
        "curves": [directory.metrics],
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
        return there | (files.keys() - {"chosen", "inside"})
    return there - {"trains"} if _census_is_short(directory) else there


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The (step, value) points of each metric in metrics.csv, in step order.

    A step that was run again after a resume counts once, as it was last. A last line without its end is not read.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    curves: dict[str, dict[float, float]] = {}
    for row in csv.DictReader(io.StringIO(whole)):
        step = _number(row.get("step"))
        for name, cell in row.items():
            value = _number(cell)
            if step is not None and value is not None and name not in ("step", "epoch", None):
                curves.setdefault(name, {})[step] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


def _number(cell: object) -> float | None:
    try:
        return float(cell) if isinstance(cell, str) else None
    except ValueError:
        return None


def _ledger(path: Path) -> dict[str, Any]:
    rows, broken = read_jsonl(path)
    return {"reasons": sections.ledger(rows), "broken": broken, "total": f"{len(rows):,}"}


def _started(directory: RunDirectory) -> str:
    try:
        return datetime.fromisoformat(read_json(directory.path / "run.json")["created"]).strftime("%Y-%m-%d %H:%M")
    except (UserError, *BROKEN):
        return ""


def _model(config: str) -> str:
    import yaml

    try:
        return sections.model_of(yaml.safe_load(config))
    except (yaml.YAMLError, *BROKEN):
        return ""
