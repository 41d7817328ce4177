"""What the report says around the measurements: matrices by layer, the probe set, their cost, why layers were chosen.

Data flow: contents of matrices.json, probes.json, inspections.json, selection.json -> dataclasses -> templates.
Contents may be half written or not ours: a wrong shape raises LookupError, TypeError, ValueError or AttributeError.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mm.core.layer_table import MOST_LAYERS
from lightning_mm.core.measure_catalog import describe_site, measure
from lightning_mm.report.figures import theme
from lightning_mm.report.figures.figure import Figure
from lightning_mm.report.figures.matrices import matrix_figure
from lightning_mm.report.figures.tracks import Track
from lightning_mm.report.sections.run import apart, ranges
from lightning_mm.report.tables.numbers import percent
from lightning_mm.report.tables.panels import EMBEDDINGS, StepLabels, TrainedLayers

_MOST_MATRICES, _OPEN, _MOST_ROWS, _MOST_TIPS = 12, 1, 24, 40


@dataclass(frozen=True)
class LayerMatrix:
    """One measure over all pairs of layers, first and last."""

    title: str
    place: str
    pair: bool
    drawings: tuple[tuple[str, Figure], ...]


@dataclass(frozen=True)
class SelectionRow:
    """One row of the selection: a criterion, or a range of layers."""

    title: str
    track: str
    peak: str


@dataclass(frozen=True)
class LayerSelection:
    """Why these layers were chosen."""

    expression: str
    evidence: bool
    words: str
    why: tuple[str, ...]
    scores: tuple[SelectionRow, ...]
    ranges: tuple[SelectionRow, ...]
    numbered: tuple[tuple[float, str], ...]


def matrices(
    raw: Any, trained: TrainedLayers, names: StepLabels
) -> tuple[tuple[LayerMatrix, ...], tuple[LayerMatrix, ...]]:
    """The matrices that are shown, and those on demand: the last step of each, beside the first."""
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for item in raw:
        found.setdefault((str(item["measure"]), str(item["site"])), {})[int(item["step"])] = item
    cards: list[LayerMatrix] = []
    for (name, site), by_step in list(found.items())[:_MOST_MATRICES]:
        ends = sorted({min(by_step), max(by_step)})
        tips = len(cards) < _OPEN
        figures = [(names.long(step), _matrix(by_step[step], trained, tips)) for step in ends]
        drawn = tuple((words, figure.drawn() if tips else figure) for words, figure in figures)
        pair = "~" in site or site in ("last", "token", "token_last")
        cards.append(LayerMatrix(measure(name).title, describe_site(site), pair, drawn))
    return tuple(cards[:_OPEN]), tuple(cards[_OPEN:])


def _matrix(item: Mapping[str, Any], trained: TrainedLayers, tips: bool) -> Figure:
    layers = [int(layer) for layer in item["layers"]]
    values = [[_finite(value) for value in row] for row in item["values"]]
    fits = len(values) == len(layers) and all(len(row) == len(layers) for row in values)
    if not (layers and fits and layers == sorted(set(layers)) and layers[0] >= EMBEDDINGS and len(layers) <= 200):
        raise ValueError("a matrix does not fit its layers")
    if layers[-1] >= MOST_LAYERS:
        raise ValueError(f"layer {layers[-1]}")
    return matrix_figure(layers, values, trained, tips=tips and len(layers) <= _MOST_TIPS)


def probe_set(raw: Any) -> dict[str, Any]:
    """What was asked of the model, from probes.json."""
    tasks = [
        {"task": measure(str(name)).title, "rows": f"{int(task['rows']):,}", "images": f"{int(task['images']):,}"}
        for name, task in list(raw.get("tasks", {}).items())[:_MOST_ROWS]
    ]
    known = {"Rows": raw.get("rows"), "Pictures": raw.get("images"), "Source": raw.get("source")}
    known |= {"Seed": raw.get("seed"), "Hash": raw.get("hash")}
    facts = {
        name: f"{value:,}" if isinstance(value, int) else str(value)
        for name, value in known.items()
        if value is not None
    }
    return {"facts": {name: value[:120] for name, value in facts.items()}, "tasks": tasks}


def cost(raw: Any) -> dict[str, Any]:
    """What looking took, from inspections.json."""
    rows = sorted(raw, key=lambda row: int(row["step"]))
    parts = [{str(part): float(seconds) for part, seconds in row["seconds"].items()} for row in rows]
    by_part = {part: math.fsum(row.get(part, 0.0) for row in parts) for row in parts for part in row}
    share = _finite(rows[-1].get("share")) if rows else None
    problems = [str(problem)[:240] for row in rows for problem in row.get("problems") or []]
    words = f"{len(rows)} look{'s' if len(rows) != 1 else ''} took {_seconds(math.fsum(by_part.values()))}"
    words += f" ({', '.join(f'{part} {_seconds(seconds)}' for part, seconds in by_part.items())})" if by_part else ""
    words += f", {percent(share)} of the training time" if share is not None else ""
    return {"words": words + ".", "problems": list(dict.fromkeys(problems))[:_MOST_ROWS]}


def selected(raw: Any) -> TrainedLayers:
    """The layers that selection.json names; none where they are a fall-back that nothing speaks for."""
    layers = sorted({int(layer) for layer in raw["layers"]})
    total = len(raw.get("score") or [])
    if not layers or layers[0] < 0 or max(total - 1, layers[-1]) >= MOST_LAYERS:
        raise ValueError("no layers are chosen")
    return TrainedLayers(tuple(layers) if raw.get("evidence", True) else (), total, "chosen")


def chosen(raw: Any, trained: TrainedLayers) -> LayerSelection:
    """The choice of layers, its score by layer, what it was combined from, and rivals, from selection.json."""
    layers = selected(raw | {"evidence": True}).layers
    criteria = {str(name): _scores(values) for name, values in list(raw.get("criteria", {}).items())[:_MOST_ROWS]}
    if raw.get("score"):
        criteria = {"score": _scores(raw["score"])} | criteria
    total = max([trained.total, *layers, *(len(values) for values in criteria.values())])
    track = Track(0, max(total - 1, layers[-1]), layers)
    spread = dict(
        enumerate(zip(_scores(raw.get("score_low") or []), _scores(raw.get("score_high") or []), strict=True))
    )
    scores = [_score(name, values, track, spread if name == "score" else {}) for name, values in criteria.items()]
    rivals = {str(name): str(layers) for name, layers in list(raw.get("controls", {}).items())[:_MOST_ROWS]}
    plain = Track(track.first, track.last, ())
    rows = [SelectionRow("chosen", plain.membership(layers).svg(), ranges(layers))]
    rows += [
        SelectionRow(name, plain.membership(_members(spec), theme.SOFT).svg(), spec[:60])
        for name, spec in rivals.items()
    ]
    numbered = apart([*TrainedLayers(layers).ends, 0, track.last], max(1, total // 8))
    return LayerSelection(
        str(raw.get("expression") or ranges(layers)),
        bool(raw.get("evidence", True)),
        _ends(raw) if raw.get("evidence", True) else "",
        tuple(str(reason)[:400] for reason in list(raw.get("why", []))[:_MOST_ROWS]),
        tuple(scores),
        tuple(rows),
        tuple((track.share(layer), str(layer)) for layer in numbered),
    )


def _ends(raw: Mapping[str, Any]) -> str:
    """How sure both ends are."""
    first, last = raw.get("first_range", raw.get("low")), raw.get("last_range", raw.get("high"))
    if not (first and last and len(first) == 2 and len(last) == 2):
        return ""
    low, high = (f"{int(a)}" if int(a) == int(b) else f"{int(a)} to {int(b)}" for a, b in (first, last))
    return f"95 % interval of its first layer {low}, of its last {high}."


def _score(name: str, values: Sequence[float | None], track: Track, spread: Mapping[int, Any]) -> SelectionRow:
    known = {layer: value for layer, value in enumerate(values) if value is not None}
    best = max(known, key=lambda layer: known[layer], default=None)
    floor = min(known.values(), default=0.0)
    bars = track.bars(dict(enumerate(values)), {}, floor, best, spread=spread).svg()
    title = {"score": "all together"}.get(name, name)
    return SelectionRow(title[:60], bars, "undefined" if best is None else f"highest at layer {best}")


def _members(spec: str) -> set[int]:
    """``"0-3, 9"`` as a set; what is no range of layers is left out."""
    found: set[int] = set()
    for part in spec[:4000].replace("–", "-").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and (last or first).isdigit() and len(first) <= 4 and len(last) <= 4:
            found |= set(range(int(first), min(int(last or first), MOST_LAYERS) + 1))
    return found


def _scores(values: Sequence[Any]) -> list[float | None]:
    if len(values) > MOST_LAYERS:
        raise ValueError(f"{len(values)} layers")
    return [_finite(value) for value in values]


def _finite(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) and abs(number) < 1e100 else None


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
