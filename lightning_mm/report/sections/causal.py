"""The report's section "What causes the answer": effects of interventions, from one sentence to single questions.

Data flow: causal rows of layers.csv, traces.json, pictures.json, causal.json -> maps by kind of token, traces,
profiles, overlaid images and tables. A damaged file costs its own part only; no content is trusted.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_mm.core.io import read_json
from lightning_mm.core.layer_table import LayerRow
from lightning_mm.core.measure_catalog import measure
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.figures.class_maps import class_maps, class_name
from lightning_mm.report.figures.figure import Figure
from lightning_mm.report.figures.trace_maps import peak_words, probability_drop, trace_map
from lightning_mm.report.optional_file import OptionalFile, read_optional
from lightning_mm.report.sections import image_overlays
from lightning_mm.report.sections.layers import LayerSection, MeasureFigure, Question, layer_section
from lightning_mm.report.sections.samples import THUMBNAIL, packed
from lightning_mm.report.tables.numbers import percent, short
from lightning_mm.report.tables.panels import StepLabels, TrainedLayers, layer_name, panels
from lightning_mm.report.tables.traces import Trace, read_traces

FILES = ("causal.json", "traces.json", "pictures.json")
MOST_TRACES = 12
"""How many traces are drawn; the others are counted, and stand in traces.json."""
_OPEN, _MOST_TIPS, _MOST_TABLES, _MOST_ROWS, _MOST_COLUMNS = 2, 4, 12, 60, 12


@dataclass(frozen=True)
class HeatMap:
    """One heat map and the words about it."""

    title: str
    said: str
    meaning: str
    figure: Figure


@dataclass(frozen=True)
class TracedQuestion:
    """One question with its traces."""

    text: str
    constraint: str
    drop: str
    picture: str
    maps: tuple[HeatMap, ...]


@dataclass(frozen=True)
class Table:
    """One table of causal.json; each cell is its text and whether it is a number."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, bool], ...], ...]
    note: str


@dataclass(frozen=True)
class CausalSection:
    """The whole section; each part may be empty."""

    lead: str
    maps: tuple[HeatMap, ...]
    shown: tuple[TracedQuestion, ...]
    more: tuple[TracedQuestion, ...]
    profiles: LayerSection | None
    questions: tuple[Question, ...]
    strips: tuple[image_overlays.Strip, ...]
    tables: tuple[Table, ...]
    problems: tuple[str, ...]
    further: str


def is_causal(row: LayerRow) -> bool:
    """Whether a row belongs to this section."""
    return row.analysis == "causal" or measure(row.measure).question == "causal"


def causal_section(
    run: RunDirectory, rows: Sequence[LayerRow], trained: TrainedLayers, names: StepLabels
) -> CausalSection | None:
    """All that a run and the causal rows of its layers.csv tell of causes; None where nothing was looked for."""
    if not rows and not any((run.path / name).exists() for name in FILES):
        return None
    told = _read(run.path, "causal.json", _told)
    traces = _read(run.path, "traces.json", lambda raw: _traces(run.path, raw, trained))
    overlays = _read(run.path, "pictures.json", lambda raw: image_overlays.strips(run.path, raw))
    shown, more, further, odd = traces.content or ((), (), "", [])
    strips, lost = overlays.content or ([], [])
    words, tables = told.content or ("", ())
    profiles = read_optional(run.layers, lambda: layer_section(rows, 0, trained, names)) if rows else OptionalFile()
    maps = read_optional(run.layers, lambda: tuple(_maps(rows, trained, names))) if rows else OptionalFile()
    lead = read_optional(run.layers, lambda: _lead(rows)) if rows else OptionalFile()
    unread = [f.problem for f in (told, traces, overlays, profiles, maps, lead) if f.problem]
    return CausalSection(
        " ".join(filter(None, (words, lead.content))),
        maps.content or (),
        shown,
        more,
        profiles.content,
        tuple(_regrouped(profiles.content.groups)) if profiles.content else (),
        tuple(strips),
        tables,
        (*unread, *odd, *lost),
        further,
    )


def title(run: RunDirectory) -> tuple[str, str]:
    """Title and model that causal.json tells; empty where it tells none."""
    raw = read_optional(run.path / FILES[0], lambda: read_json(run.path / FILES[0])).content
    told = raw if isinstance(raw, Mapping) else {}
    return str(told.get("title") or "")[:120], str(told.get("model") or "")[:120]


def _read(root: Path, name: str, read: Any) -> OptionalFile:
    """A file that may well be missing: not every run makes all."""
    path = root / name
    return read_optional(path, lambda: read(read_json(path))) if path.exists() else OptionalFile()


def _told(raw: Any) -> tuple[str, tuple[Table, ...]]:
    """How many questions were asked, and the tables."""
    asked, right = (raw.get(key) for key in ("n_questions", "n_right"))
    words = f"{int(asked):,} questions asked" if asked is not None else ""
    words += f", {int(right):,} answered right" if words and right is not None else ""
    tables = list(raw.get("tables") or [])
    return f"{words}." if words else "", tuple(_table(table) for table in tables[:_MOST_TABLES])


def _table(raw: Mapping[str, Any]) -> Table:
    columns, rows = list(raw["columns"]), list(raw["rows"])
    cells = tuple(tuple(_cell(value) for value in list(row)[:_MOST_COLUMNS]) for row in rows[:_MOST_ROWS])
    note = [str(raw.get("note") or "")[:600]]
    if len(rows) > _MOST_ROWS or len(columns) > _MOST_COLUMNS:
        note.append(f"{len(rows):,} rows and {len(columns):,} columns stand in causal.json.")
    return Table(
        str(raw.get("title") or "")[:200],
        tuple(str(column)[:80] for column in columns[:_MOST_COLUMNS]),
        cells,
        " ".join(filter(None, note)),
    )


def _cell(value: Any) -> tuple[str, bool]:
    """A cell as text; three numbers are a value and its interval."""
    if isinstance(value, list) and len(value) == 3 and not isinstance(value[0], str):
        middle, low, high = (_cell(part)[0] for part in value)
        return (f"{middle} ({low} to {high})" if low != "–" != high else middle), True
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–", True
    if isinstance(value, bool):
        return "yes" if value else "no", False
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) and abs(value) < 1e15 else short(float(value)), True
    return str(value)[:300], False


def _maps(rows: Sequence[LayerRow], trained: TrainedLayers, names: StepLabels) -> Iterator[HeatMap]:
    steps = {row.step for row in rows if row.measure == "trace"}
    when = names.long(max(steps)) if len(steps) > 1 else ""
    for each in class_maps(rows):
        yield HeatMap(each.title, "; ".join(filter(None, (each.summary, when))), "", each.figure(trained).drawn())


def _traces(
    root: Path, raw: Any, trained: TrainedLayers
) -> tuple[tuple[TracedQuestion, ...], tuple[TracedQuestion, ...], str, list[str]]:
    """Questions with their traces: the first ones, those on demand; how many are not drawn, and what is odd."""
    read, left, problems = read_traces(raw, MOST_TRACES)
    by_question: dict[tuple[str, str, str], list[Trace]] = {}
    for trace in read:
        by_question.setdefault((trace.id, trace.text, trace.image), []).append(trace)
    further = f"{left:,} further trace{'s stand' if left > 1 else ' stands'} in traces.json." if left > 0 else ""
    groups = enumerate(by_question.values())
    drawn = [
        _question(root, group, trained, tips=len(group) <= _MOST_TIPS, still=number < _OPEN) for number, group in groups
    ]
    return tuple(drawn[:_OPEN]), tuple(drawn[_OPEN:]), further, problems


def _question(root: Path, group: Sequence[Trace], trained: TrainedLayers, *, tips: bool, still: bool) -> TracedQuestion:
    maps = []
    for trace in group:
        void = any(value is None for row in trace.values for value in row)
        said = f"{trace.summary}. Hatched: {trace.undefined}" if void else trace.summary
        figure = trace_map(trace, trained, tips=tips)
        maps.append(HeatMap(trace.title, f"most: {peak_words(trace)}", said, figure.drawn() if still else figure))
    first = group[0]
    small = image_overlays.named(root, first.image, THUMBNAIL)
    picture = packed(small) if small else ""
    lost = f" The picture {first.image[:80]} cannot be shown." if first.image and not picture else ""
    return TracedQuestion(first.text, first.constraint, f"{probability_drop(first)}.{lost}", picture, tuple(maps))


def _regrouped(groups: Sequence[Question]) -> Iterator[Question]:
    """One group per quantity, its variants with it."""
    shown = [figure for group in groups for figure in group.shown]
    more = [figure for group in groups for figure in group.more]
    for name in dict.fromkeys(_quantity(figure) for figure in (*shown, *more)):
        mine, others = ([figure for figure in figures if _quantity(figure) == name] for figures in (shown, more))
        named = ", ".join(dict.fromkeys(figure.title for figure in others))
        meaning = (mine or others)[0].meaning
        lead = f"{meaning[:1].upper()}{meaning[1:]}."
        placed = [tuple(_titled_by_place(figure, name) for figure in figures) for figures in (mine, others)]
        yield Question(name, lead, placed[0], placed[1], named)


def _quantity(figure: MeasureFigure) -> str:
    return figure.title.partition(",")[0]


def _titled_by_place(figure: MeasureFigure, quantity: str) -> MeasureFigure:
    """A figure whose title says where, since the heading above it says what."""
    if not figure.place:
        return figure
    place, meaning = ("", "") if figure.title == quantity else (figure.title, figure.meaning)
    return replace(figure, title=f"{figure.place[:1].upper()}{figure.place[1:]}", place=place, meaning=meaning)


def _lead(rows: Sequence[LayerRow]) -> str:
    """The strongest effects in words."""
    words = []
    parts = [(each, each.best) for each in class_maps(rows) if each.site != "residual"]
    best = max(((e, row) for e, row in parts if row is not None), key=lambda found: found[1].value or 0.0, default=None)
    if best:
        each, row = best
        where = f"at {layer_name(row.layer)} ({class_name(row)})"
        much = f"{percent(row.value or 0.0)} of the lost probability{_sure(row)}"
        words.append(f"{each.title} {where} brings back most: {much}.")
    cuts = [(panel, panel.peak(panel.measured[-1])) for panel in panels(rows) if panel.measured]
    lowest = [(row.value, panel.place, row) for panel, row in cuts if panel.measure.name == "knockout" and row]
    worst = min(lowest, key=lambda cut: cut[0] or 0.0, default=None)
    if worst and worst[0] is not None and worst[0] < 0:
        place, row = worst[1].partition(",")[0], worst[2]
        cost = f"the answer's probability changes by {percent(worst[0])}{_sure(row)}"
        words.append(f"Cutting attention from {place} about {layer_name(row.layer)} costs most: {cost}.")
    return " ".join(words)


def _sure(row: LayerRow) -> str:
    if row.low is None or row.high is None:
        return ""
    return f" ({percent(row.low)} to {percent(row.high)})"
