"""The report's section "Inside the model": what layers.csv says, from the headline to each single reason and note.

Data flow: rows of layers.csv and which layers train -> panels -> headlines, figures by question, undefined values (each
reason once, with where it holds), notes. Contents may be half written or not ours: a wrong shape raises LookupError,
TypeError or ValueError.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mm.core.layer_table import LayerRow
from lightning_mm.core.measure_catalog import QUESTIONS, rank
from lightning_mm.core.peak_note import PEAK_NOTE, noted_peak_range
from lightning_mm.core.simultaneous import tell_apart
from lightning_mm.report.figures.curves import LegendEntry
from lightning_mm.report.figures.figure import Figure
from lightning_mm.report.figures.layers import MOST_COLUMNS, panel_figure
from lightning_mm.report.figures.tracks import Track, panel_track
from lightning_mm.report.sections.run import apart, ranges
from lightning_mm.report.tables.numbers import percent, short
from lightning_mm.report.tables.panels import (
    EMBEDDINGS,
    Panel,
    StepLabels,
    TrainedLayers,
    layer_name,
    layer_tick,
    panels,
)

_MOST, _LONGEST = 12, 240
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class UndefinedValues:
    """One reason why numbers are missing."""

    reason: str
    layers: str
    places: str
    measures: str


def undefined_values(found: Sequence[Panel]) -> tuple[UndefinedValues, ...]:
    """The reasons for undefined values, the most frequent first; those that differ in their numbers only are one."""
    told: dict[str, list[tuple[str, int, Panel]]] = {}
    for panel in found:
        for (_, layer), row in panel.cells.items():
            if row.value is None:
                told.setdefault(_NUMBER.sub("#", row.undefined), []).append((row.undefined, layer, panel))
    ordered = sorted(told.values(), key=lambda where: -len(where))
    listed = [
        UndefinedValues(
            spelled([reason for reason, _, _ in where]),
            _layers({layer for _, layer, _ in where}),
            "; ".join(sorted({panel.place for _, _, panel in where if panel.place})),
            _listed([panel.measure.title for _, _, panel in where]),
        )
        for where in ordered[:_MOST]
    ]
    if len(ordered) > _MOST:
        listed.append(UndefinedValues(f"{len(ordered) - _MOST} further reasons stand in layers.csv", "", "", ""))
    return tuple(listed)


def notes(found: Sequence[Panel]) -> tuple[tuple[str, str], ...]:
    """The notes on the values of the last step, each with the measures it concerns."""
    told: dict[str, list[tuple[str, str]]] = {}
    for panel in found:
        for (step, _), row in panel.cells.items():
            if step == panel.steps[-1] and row.value is not None:
                for note in row.notes:
                    if not PEAK_NOTE.match(note):  # the table of headlines shows it
                        told.setdefault(_NUMBER.sub("#", note), []).append((note, panel.measure.title))
    listed = [
        (spelled([note for note, _ in where]), _listed([title for _, title in where]))
        for where in list(told.values())[:_MOST]
    ]
    return tuple(
        listed + ([(f"{len(told) - _MOST} further notes stand in layers.csv", "")] if len(told) > _MOST else [])
    )


def spelled(texts: Sequence[str]) -> str:
    """Texts that differ in their numbers only, as one with the range of each.

    Example:
        >>> spelled(["all 64 of 64 coincide", "all 26 of 64 coincide"])
        'all 26–64 of 64 coincide'
    """
    slots = iter([sorted(set(slot), key=float) for slot in zip(*map(_NUMBER.findall, texts), strict=True)])

    def ranged(_: re.Match[str]) -> str:
        seen = next(slots)
        return seen[0] if len(seen) == 1 else f"{seen[0]}–{seen[-1]}"

    return _NUMBER.sub(ranged, texts[0])[:_LONGEST]


def _layers(layers: set[int]) -> str:
    blocks = sorted(layers - {EMBEDDINGS})
    words = ["embeddings"] if EMBEDDINGS in layers else []
    words += [f"layer{'s' if len(blocks) > 1 else ''} {ranges(blocks)}"] if blocks else []
    return " and ".join(words)


def _listed(titles: Sequence[str]) -> str:
    names = list(dict.fromkeys(titles))
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:4])} and {len(names) - 4} more"


_MOST_PANELS, _FEWER_COLUMNS = 160, 8


@dataclass(frozen=True)
class Headline:
    """One row of the table: a main measure at one site, at the last step."""

    title: str
    place: str
    meaning: str
    track: str
    cells: dict[str, str]
    clear: bool
    moved: bool
    trains: bool


@dataclass(frozen=True)
class MeasureFigure:
    """The figure of one panel, with its heading, its legend and its note."""

    title: str
    place: str
    meaning: str
    figure: Figure
    legend: tuple[LegendEntry, ...]
    note: str


@dataclass(frozen=True)
class Question:
    """The figures that answer one question: some shown, the rest on demand."""

    title: str
    lead: str
    shown: tuple[MeasureFigure, ...]
    more: tuple[MeasureFigure, ...]
    titles: str


@dataclass(frozen=True)
class LayerSection:
    """The whole section."""

    lead: str
    strip: str
    span: tuple[int, int]
    numbered: tuple[tuple[float, str], ...]
    headlines: tuple[Headline, ...]
    groups: tuple[Question, ...]
    undefined: tuple[UndefinedValues, ...]
    notes: tuple[tuple[str, str], ...]
    ends: tuple[str, str] | None
    left_out: str

    @property
    def holds_any(self) -> bool:
        """Whether there is anything to say."""
        return bool(self.headlines or self.groups or self.undefined or self.left_out)


def layer_section(rows: Sequence[LayerRow], bad: int, trained: TrainedLayers, names: StepLabels) -> LayerSection:
    """All that layers.csv tells.

    Args:
        rows: Its rows.
        bad: How many of its lines could not be read.
        trained: Which layers train.
        names: What the steps are called.
    """
    found = ordered(panels(rows))
    measured = [panel for panel in found if panel.measured]
    drawn = measured[:_MOST_PANELS]
    main = _main(drawn)
    top = max([trained.total - 1, *(panel.layers[-1] for panel in drawn)], default=0)
    track = Track(EMBEDDINGS, top, trained.layers)
    left_out = [f"{bad} lines of layers.csv cannot be read"] if bad else []
    left_out += [f"{len(measured) - len(drawn)} further panels are not drawn"] if len(drawn) < len(measured) else []
    return LayerSection(
        _lead(main, found, trained, names),
        track.membership(trained.layers).svg(),
        (track.first, track.last),
        _numbers(track, trained),
        tuple(_headline(panel, track, trained) for panel in sorted(main, key=lambda p: p.measure.question != "moved")),
        _groups(drawn, main, trained, names),
        undefined_values(found),
        notes(found),
        _ends(main, names),
        "; ".join(left_out),
    )


def ordered(found: Sequence[Panel]) -> list[Panel]:
    """By question, the main measures of each first, as in the vocabulary; sites as they came, cuts by their kind."""
    order = list(QUESTIONS)

    def standing(p: Panel) -> tuple[int, bool, int, bool]:
        return order.index(p.measure.question), p.measure.main == 0, rank(p.measure), p.site.endswith("/post")

    return sorted(found, key=standing)


def _main(drawn: Sequence[Panel]) -> list[Panel]:
    """The panels that are shown without asking: a few sites of each main measure, one form of the modality gap."""
    known = {panel.measure.name for panel in drawn}
    kept: list[Panel] = []
    for panel in drawn:
        name = panel.measure.name
        sites = sum(other.measure.name == name for other in kept)
        if sites < panel.measure.main and not (name == "gap" and "gap_auc" in known):
            kept.append(panel)
    return kept


def _lead(main: Sequence[Panel], found: Sequence[Panel], trained: TrainedLayers, names: StepLabels) -> str:
    """Where the trained layers are, how often was looked, and what moved most."""
    steps = sorted({step for panel in found for step in panel.steps})
    verb = {"trained": "train", "chosen": "were chosen to train"}[trained.word]
    of = f" of {trained.total}" if trained.total else ""
    words = f"Layers {ranges(trained.layers)}{of} {verb}. " if trained.layers else ""
    if len(steps) > 1:
        ends = f"{names.long(steps[0])} and {names.long(steps[-1])}"
        words += f"Compared: {ends}. " if len(steps) == 2 else f"Read at {len(steps)} steps, between {ends}. "
    elif steps:
        words += "" if steps[0] in names.labels else f"Read once, at {names.long(steps[0])}. "
    moved = [(panel, panel.peak(panel.steps[-1])) for panel in main if panel.measure.name == "drift_overlap"]
    ends_at = [(row.value, row.layer, panel) for panel, row in moved if row is not None and row.value is not None]
    if ends_at:
        value, layer, panel = min(ends_at, key=lambda end: end[0])
        inner = ", which trains" if trained.place(layer) == "inside" else ""
        words += f"Most moved: {layer_name(layer)}{inner}; samples keep {percent(value)} of their neighbours there "
        words += f"({panel.place}). "
    return words.strip()


def _ends(main: Sequence[Panel], names: StepLabels) -> tuple[str, str] | None:
    """What is compared in the table: the first and the last step; None where there is one."""
    steps = sorted({step for panel in main for step in panel.measured})
    return (names.long(steps[0]), names.long(steps[-1])) if len(steps) > 1 else None


def _numbers(track: Track, trained: TrainedLayers) -> tuple[tuple[float, str], ...]:
    shown = apart([*trained.ends, track.last, EMBEDDINGS], max(1, (track.last + 2) // 8))
    return tuple((track.share(layer), "emb" if layer == EMBEDDINGS else str(layer)) for layer in shown)


def _headline(panel: Panel, track: Track, trained: TrainedLayers) -> Headline:
    """One row: the peak at the last step, what chance gives, and the change of that layer since the first."""
    steps, known = panel.measured, panel.measure
    peak = panel.peak(steps[-1])
    row = peak or panel.profile(steps[-1])[0]
    assert row.value is not None, "profiles hold defined rows only"
    sure = row.low is not None and row.high is not None
    change, moved = _change(panel, panel.cells.get((steps[0], row.layer)) if len(steps) > 1 else None, row)
    was = panel.peak(steps[0]) if len(steps) > 1 else None
    cells = {
        "peak": layer_name(row.layer) if peak else "all alike",
        "sure": _sure(peak),
        "was": f"was {layer_name(was.layer)}" if was and peak and was.layer != row.layer else "",
        "value": panel.spell(row.value),
        "interval": f"{panel.spell(row.low or 0.0)} to {panel.spell(row.high or 0.0)}" if sure else "no interval",
        "chance": "–" if row.null is None else panel.spell(row.null),
        "n": "–" if row.n is None else f"{row.n:,}",
        "change": change,
        "where": (trained.place(row.layer) if peak else "") or "–",
    }
    clear = row.is_clear is not False
    bars = panel_track(panel, track).svg()
    return Headline(known.title, panel.place, known.meaning, bars, cells, clear, moved, cells["where"] == "inside")


def _sure(peak: LayerRow | None) -> str:
    """Between which layers the peak lies, where its notes say that."""
    found = noted_peak_range(peak.notes) if peak else None
    return f"between {layer_tick(found[0])} and {layer_tick(found[1])}" if found else ""


def _change(panel: Panel, first: LayerRow | None, last: LayerRow) -> tuple[str, bool]:
    """How much a layer changed, and whether by more than both intervals allow where it is chosen among all layers."""
    if first is None or first.value is None or last.value is None:
        return "–", False
    change = last.value - first.value
    sign = "+" if change > 0 else "−" if change < 0 else "±"
    spelled = (
        f"{100 * abs(change):.1f}".removesuffix(".0") + " points" if panel.measure.in_percent else short(abs(change))
    )
    return f"{sign}{spelled}", tell_apart(first, last, len(panel.layers))


def _groups(
    drawn: Sequence[Panel], main: Sequence[Panel], trained: TrainedLayers, names: StepLabels
) -> tuple[Question, ...]:
    groups = []
    for question, (title, lead) in QUESTIONS.items():
        mine = [panel for panel in drawn if panel.measure.question == question]
        shown = [panel for panel in mine if panel in main]
        more = [panel for panel in mine if panel not in main]
        if mine:
            titles = list(dict.fromkeys(panel.measure.title for panel in more))
            named = ", ".join(titles[:4]) + (f" and {len(titles) - 4} more" if len(titles) > 4 else "")
            figures = [_measure_figure(panel, drawn, trained, names, MOST_COLUMNS) for panel in shown]
            rest = [_measure_figure(panel, drawn, trained, names, _FEWER_COLUMNS) for panel in more]
            groups.append(Question(title, lead, tuple(figures), tuple(rest), named))
    return tuple(groups)


def _measure_figure(
    panel: Panel, drawn: Sequence[Panel], trained: TrainedLayers, names: StepLabels, columns: int
) -> MeasureFigure:
    without = f"{panel.measure.name}/text_only"
    withheld = next(
        (p for p in drawn if p.measure.name == without and p.site == panel.site and p.profile(p.steps[-1])), None
    )
    shown = panel_figure(panel, trained, names, withheld, columns=columns)
    known, figure = panel.measure, shown.figure.drawn() if columns >= MOST_COLUMNS else shown.figure
    return MeasureFigure(known.title, panel.place, known.meaning, figure, shown.legend, shown.note)
