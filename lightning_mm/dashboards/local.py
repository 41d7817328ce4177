"""The local report: ``report.html``, one file that opens anywhere and is complete without any service.

Data flow: the files of a run directory -> ``sections`` (what is said) -> ``report.html.jinja`` (how it looks).
A file that is missing or half written costs its own section only, which then says so. All that is read is untrusted.
"""

import base64
import csv
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_mm.dashboards import sections
from lightning_mm.dashboards.rundir import RunDirectory, read_json, read_jsonl
from lightning_mm.errors import UserError

THUMBNAIL = 160
"""The longer side of a sample picture, in pixels."""
_MOST_SAMPLES, _LONGEST_TEXT, _MOST_PIXELS = 48, 160, 40_000_000
_BROKEN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, csv.Error, OSError)


@dataclass(frozen=True)
class Found:
    """What became of one section: its content, or why there is none."""

    content: Any = None
    problem: str = ""


@dataclass(frozen=True)
class Answer:
    """What the model said before or after training, and whether that was right (None: not scored)."""

    when: str
    text: str
    correct: bool | None


@dataclass(frozen=True)
class Shown:
    """One sample as it is shown."""

    pictures: tuple[str, ...]
    lost: str
    question: str
    truth: str
    kind: str
    answers: tuple[Answer, ...]


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
        loader=PackageLoader("lightning_mm.dashboards", ""),
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
    curves = _found(directory.metrics, lambda: read_curves(directory.metrics))
    evaluation = _found(directory.evaluation, lambda: read_json(directory.evaluation))
    scores = evaluation
    if evaluation.content:
        scores = _found(directory.evaluation, lambda: sections.scores(evaluation.content))
    config = _found(directory.config, lambda: directory.config.read_text(encoding="utf-8", errors="replace"))
    split = evaluation.content.get("split", "test") if isinstance(evaluation.content, Mapping) else "test"
    return {
        "name": directory.name,
        "outcome": sections.outcome(scores.content or [], curves.content or {}, str(split)),
        "split": str(split),
        "started": _started(directory),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "steps": f"{max((p[-1][0] for p in (curves.content or {}).values()), default=0):,.0f}",
        "model": _model(config.content or ""),
        "charts": _found(directory.metrics, lambda: sections.charts(curves.content)) if curves.content else curves,
        "census": _found(directory.census, lambda: sections.census(read_json(directory.census))),
        "scores": scores,
        "samples": _found(directory.samples, lambda: _samples(directory)),
        "decisions": _found(directory.decisions, lambda: sections.decisions(read_json(directory.decisions))),
        "ledger": _found(directory.ledger, lambda: _ledger(directory.ledger)),
        "config": config,
    }


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


def _samples(directory: RunDirectory) -> dict[str, Any]:
    rows = read_json(directory.samples)
    pairs = [(row.get("correct_before"), row.get("correct_after")) for row in rows]
    turns = {
        "became right": pairs.count((False, True)),
        "stayed right": pairs.count((True, True)),
        "stayed wrong": pairs.count((False, False)),
        "became wrong": pairs.count((True, False)),
    }
    shown = [_shown(directory.path, row) for row in rows[:_MOST_SAMPLES]]
    return {"shown": shown, "total": len(rows), "turns": {words: n for words, n in turns.items() if n}}


def _shown(root: Path, row: Mapping[str, Any]) -> Shown:
    thumbnails = [thumbnail(root, str(name)) for name in row.get("images") or []]
    lost = sum(not data for data in thumbnails)
    asked = [when for when in ("before", "after") if row.get(when) is not None]
    answers = tuple(Answer(when, _cut(row[when]), row.get(f"correct_{when}")) for when in asked)
    return Shown(
        tuple(data for data in thumbnails if data),
        f"{lost} picture{'s' if lost > 1 else ''} cannot be shown" if lost else "",
        _cut(row["question"]),
        _cut(row["truth"]),
        str(row.get("type", "")),
        answers,
    )


def thumbnail(root: Path, name: str) -> str:
    """A picture of the run directory as a data URL of at most 160 pixels a side; empty where there is none to show."""
    from PIL import Image, ImageOps

    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if picture.width * picture.height > _MOST_PIXELS:
                    return ""
                small = ImageOps.exif_transpose(picture).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return ""
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    paper = Image.new("RGB", small.size, "white")
    paper.paste(small, mask=small.getchannel("A"))
    packed = io.BytesIO()
    paper.save(packed, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode()


def _cut(text: object) -> str:
    words = str(text)
    rest = len(words) - _LONGEST_TEXT
    return words if rest <= 0 else f"{words[:_LONGEST_TEXT]} … ({rest:,} more characters)"


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
