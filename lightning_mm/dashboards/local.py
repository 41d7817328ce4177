"""The local report: ``report.html``, one file that opens anywhere and is complete without any service.

Data flow: the files of a run directory -> ``sections``, ``inside``, ``facts``, ``samples`` (what is said) ->
``templates/`` (how it looks). A folder that ``lightning-mm inspect`` made gets a page of what it holds, and no more.
A file that is missing or half written costs its own section only, which then says so. All that is read is untrusted.
"""

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_mm.dashboards import colours, facts, sections
from lightning_mm.dashboards.inside import inside
from lightning_mm.dashboards.layers_file import read_layers
from lightning_mm.dashboards.panels import StepNames, Trained
from lightning_mm.dashboards.rundir import RunDirectory, read_json, read_jsonl
from lightning_mm.dashboards.samples import samples
from lightning_mm.errors import UserError

_BROKEN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, csv.Error, OSError)
_PARTS = {
    "accuracy": "Accuracy",
    "curves": "Curves",
    "trains": "What trains",
    "chosen": "Why these layers",
    "inside": "Inside the model",
    "samples": "Samples",
    "decisions": "Decisions",
    "left-out": "Left out",
    "config": "Configuration",
}


@dataclass(frozen=True)
class Found:
    """What became of one section: its content, or why there is none."""

    content: Any = None
    problem: str = ""


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
        loader=PackageLoader("lightning_mm.dashboards", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    page = template.render(_gather(directory))
    temporary = directory.path / ".report.html.tmp"
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(directory.report)
    except OSError as error:
        fix = "Free some space, or make the folder writable."
        raise UserError(f"{directory.report} cannot be written.", str(error), fix) from error
    return directory.report


def _gather(directory: RunDirectory) -> dict[str, Any]:
    """All that the template asks for."""
    curves = _found(directory.metrics, lambda: read_curves(directory.metrics))
    evaluation = _found(directory.evaluation, lambda: read_json(directory.evaluation))
    scores = evaluation
    if evaluation.content:
        scores = _found(directory.evaluation, lambda: sections.scores(evaluation.content))
    config = _found(directory.config, lambda: directory.config.read_text(encoding="utf-8", errors="replace"))
    split = evaluation.content.get("split", "test") if isinstance(evaluation.content, Mapping) else "test"
    about = _about(directory)
    parts = _parts(directory)
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
        "charts": _found(directory.metrics, lambda: sections.charts(curves.content)) if curves.content else curves,
        "census": _found(directory.census, lambda: sections.census(read_json(directory.census))),
        "scores": scores,
        "samples": _found(directory.samples, lambda: samples(directory.path, read_json(directory.samples))),
        "decisions": _found(directory.decisions, lambda: sections.decisions(read_json(directory.decisions))),
        "ledger": _found(directory.ledger, lambda: _ledger(directory.ledger)),
        "config": config,
        "light": colours.css(colours.LIGHT),
        "dark": colours.css(colours.DARK),
        **_looked(directory, about["labels"]),
    }


def _looked(directory: RunDirectory, labels: Mapping[int, str]) -> dict[str, Any]:
    """What was found inside the model."""
    names, trained = StepNames(labels), _trained(directory)
    found = {
        "chosen": _found(directory.selection, lambda: facts.chosen(read_json(directory.selection), trained)),
        "inside": _found(directory.layers, lambda: inside(*read_layers(directory.layers), trained, names)),
        "matrices": _found(directory.matrices, lambda: facts.matrices(read_json(directory.matrices), trained, names)),
        "probes": _found(directory.probes, lambda: facts.probe_set(read_json(directory.probes))),
        "cost": _found(directory.inspections, lambda: facts.cost(read_json(directory.inspections))),
    }
    return found | {"trained": trained, "labels": [words for _, words in sorted(labels.items())]}


def _trained(directory: RunDirectory) -> Trained:
    """Which layers train; of a model that was not trained, which were chosen to; nothing where neither is known."""
    census = _found(directory.census, lambda: Trained.of(read_json(directory.census))).content
    if isinstance(census, Trained):
        return census
    selection = _found(directory.selection, lambda: facts.selected(read_json(directory.selection))).content
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
    except (UserError, *_BROKEN):
        return {"title": "", "model": "", "labels": {}}


def _is_inspection(directory: RunDirectory) -> bool:
    """Whether the model was looked at without being trained: nothing of training is there."""
    looked = directory.layers.exists() or directory.selection.exists()
    trained = directory.metrics.exists() or directory.config.exists()
    return directory.inspection.exists() or (looked and not trained and _census_is_short(directory))


def _census_is_short(directory: RunDirectory) -> bool:
    """Whether the census names the trained layers and no more, or is not there."""
    rows = _found(directory.census, lambda: "rows" in read_json(directory.census))
    return not directory.census.exists() or rows.content is False


def _parts(directory: RunDirectory) -> set[str]:
    """The sections of this report: those of a run stand even where they are empty, to say why."""
    files = {
        "accuracy": [directory.evaluation],
        "curves": [directory.metrics],
        "trains": [directory.census],
        "chosen": [directory.selection],
        "inside": [directory.layers, directory.matrices, directory.probes, directory.inspections],
        "samples": [directory.samples],
        "decisions": [directory.decisions],
        "left-out": [directory.ledger],
        "config": [directory.config],
    }
    there = {name for name, paths in files.items() if any(path.exists() for path in paths)}
    if not _is_inspection(directory):
        return there | (files.keys() - {"chosen", "inside"})
    return there - {"trains"} if _census_is_short(directory) else there


def _found(path: Path, read: Callable[[], Any]) -> Found:
    """The content that ``read`` gives, or the reason why there is none: a report never fails for one bad file."""
    if not path.exists():
        return Found(problem=f"The run has no {path.name}.")
    try:
        return Found(read())
    except UserError as error:
        return Found(problem=f"{error.what} {error.why}")
    except _BROKEN as error:
        return Found(problem=f"{path.name} is not as it should be ({type(error).__name__}: {str(error)[:200]}).")


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
    except (UserError, *_BROKEN):
        return ""


def _model(config: str) -> str:
    import yaml

    try:
        return sections.model_of(yaml.safe_load(config))
    except (yaml.YAMLError, *_BROKEN):
        return ""
