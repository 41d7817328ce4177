"""What the report says of a run: its curves, what trains, its accuracy, its decisions and what it left out.

Data flow: ``page`` reads the files of the run directory and calls one function per section; templates lay out what
they return. Contents may be half written or not ours: a wrong shape raises LookupError, TypeError, ValueError or
AttributeError.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mm.core import metric_names
from lightning_mm.report.figures import theme
from lightning_mm.report.figures.curves import ACCENT, RAW, LegendEntry, Points, Series, line_chart, running_mean
from lightning_mm.report.figures.figure import Figure
from lightning_mm.report.figures.theme import LineStyle
from lightning_mm.report.tables.numbers import percent, short

Curves = Mapping[str, Points]


@dataclass(frozen=True)
class Curve:
    """One chart of the section Curves."""

    title: str
    unit: str
    figure: Figure
    legend: tuple[LegendEntry, ...]
    note: str


def charts(curves: Curves) -> list[Curve]:
    """The charts that have data, in reading order."""
    dotted = LineStyle(theme.INK, dash=theme.DOTTED)
    loss = curves.get(metric_names.TRAIN_LOSS, [])
    smooth = len(loss) > 40
    mean = [Series("train, mean", running_mean(loss, max(5, len(loss) // 25)))] if smooth else []
    train = Series("train", loss, RAW if smooth else ACCENT)
    groups = sorted(key for key in curves if key.startswith(metric_names.LEARNING_RATE + "/"))
    rates = [
        Series(
            group.removeprefix(metric_names.LEARNING_RATE + "/"),
            curves[group],
            LineStyle(theme.TEAL, dash=theme.DASHES[i % len(theme.DASHES)]),
        )
        for i, group in enumerate(groups)
    ]

    mixed = sorted(key for key in curves if key.startswith(metric_names.TRAIN_LOSS + "/"))
    by_source = [
        Series(
            key.removeprefix(metric_names.TRAIN_LOSS + "/"),
            curves[key],
            LineStyle(theme.TEAL if i % 2 else theme.INK, dash=theme.DASHES[i // 2 % len(theme.DASHES)]),
        )
        for i, key in enumerate(mixed)
    ]

    def only(key: str, label: str, style: LineStyle = ACCENT) -> list[Series]:
        return [Series(label, curves.get(key, []), style)]

    images = only(metric_names.IMAGE_TOKENS_PER_SECOND, "of pictures", dotted)
    device = [
        *only(metric_names.DATA_WAIT, "waiting for data", dotted),
        *only(metric_names.PADDING, "padding", RAW),
        *only(metric_names.MFU, "arithmetic (MFU)"),
    ]
    validation = only(metric_names.VAL_LOSS, "validation", dotted)
    exact, tokens = (only(key, "validation") for key in (metric_names.VAL_EXACT_MATCH, metric_names.VAL_TOKEN_ACCURACY))
    speed = only(metric_names.SUPERVISED_TOKENS_PER_SECOND, "training")
    memory = only(metric_names.PEAK_MEMORY, "largest of the ranks")
    norm = only(metric_names.GRAD_NORM, "all trained weights")
    drawn = [
        line_chart("Loss", "nats per token", [train, *mean, *validation]),
        line_chart("Training loss by source", "nats per token", by_source),
        line_chart("Exact match", "share of answers", exact, share=True),
        line_chart("Token accuracy", "share of tokens", tokens, share=True),
        line_chart("Throughput", "answer tokens/s", speed, zero=True),
        line_chart("Tokens", "tokens/s", [*only(metric_names.TOKENS_PER_SECOND, "all"), *images], zero=True),
        line_chart("Use of the device", "share", device, share=True),
        line_chart("Memory", "GiB, highest so far", memory, zero=True),
        line_chart("Gradient norm", "before clipping", norm, zero=True),
        line_chart("Learning rate", "per step", rates, zero=True),
    ]
    return [Curve(c.title, c.unit, c.figure.drawn(), c.legend, c.note) for c in drawn if c]


_AFTER_THE_LAYERS = ("norm", "head")
_Z95 = 1.959964
_MOST_REASONS, _LONGEST_REASON = 50, 160


@dataclass(frozen=True)
class ModelPart:
    """One block of the strip: a region, or one decoder layer."""

    label: str
    mode: str
    words: str


@dataclass(frozen=True)
class Census:
    """What trains: the strip of layers, the table, and the totals."""

    policy: str
    before: tuple[ModelPart, ...]
    layers: tuple[ModelPart, ...]
    after: tuple[ModelPart, ...]
    numbered: tuple[int, ...]
    rows: tuple[dict[str, str], ...]
    layer_words: str
    size_words: str
    digest: str


@dataclass(frozen=True)
class Score:
    """Accuracy on one question type; positions are per cent of the bar."""

    kind: str
    n: str
    cells: dict[str, str]
    marks: dict[str, float]
    verdict: str
    above: bool


def census(raw: Any) -> Census:
    """The strip, the table and the totals of census.json."""
    layers, rows = raw["layers"], raw["rows"]
    total, trained = int(layers["total"]), sorted({int(i) for i in layers["trained"]})
    if not 0 <= total <= 10_000:
        raise ValueError(f"{total} layers")
    modes = dict.fromkeys(trained, "full")
    for row in rows:
        if str(row["region"]).startswith("layer"):
            modes |= {i: str(row["mode"]) for i in _layer_numbers(row["region"]) if i in modes}
    cells = tuple(
        ModelPart(str(i), modes.get(i, "frozen"), f"layer {i}: {modes.get(i, 'frozen')}") for i in range(total)
    )
    others = [row for row in rows if not str(row["region"]).startswith("layer")]
    blocks = [ModelPart(str(r["region"]), str(r["mode"]), f"{r['region']}: {r['mode']}") for r in others]
    ends = [i for i in trained if i - 1 not in trained or i + 1 not in trained]
    everything, moving = int(raw["total_parameters"]), int(raw["trainable_parameters"])
    return Census(
        str(raw["policy"]),
        tuple(b for b in blocks if b.label not in _AFTER_THE_LAYERS),
        cells,
        tuple(b for b in blocks if b.label in _AFTER_THE_LAYERS),
        apart([*ends, 0, total - 1], max(1, total // 14)),
        tuple(_census_row(row, everything) for row in rows),
        f"{ranges(trained)} of {total}",
        f"{count(moving)} of {count(everything)} ({percent(moving / everything) if everything else '–'})",
        str(raw.get("digest", "")),
    )


def scores(raw: Any) -> list[Score]:
    """Accuracy by question type, before and after, with baselines and intervals."""
    return [_score(row) for row in raw["rows"]]


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of ``n`` trials: it stays inside 0 to 1, and is honest for small ``n``."""
    middle = share + _Z95**2 / (2 * n)
    reach = _Z95 * math.sqrt(share * (1 - share) / n + _Z95**2 / (4 * n * n))
    scale = 1 + _Z95**2 / n
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def outcome(scored: Sequence[Score], curves: Curves, split: str) -> str:
    """The run in one line."""
    for score in scored:
        if score.kind == "all" and score.cells["after"] != "–":
            cells = score.cells
            start = f"{cells['before']} → " if cells["before"] != "–" else ""
            rivals = [f"majority {cells['majority']}"] if cells["majority"] != "–" else []
            rivals += [f"without the picture {cells['no_image']}"] if cells["no_image"] != "–" else []
            said = f" ({'; '.join(rivals)})" if rivals else ""
            return f"Exact match {start}{cells['after']} on {score.n} {split} questions{said}."
    lasts = (
        (metric_names.VAL_EXACT_MATCH, "validation exact match", percent),
        (metric_names.VAL_LOSS, "validation loss", short),
    )
    for key, words, spell in lasts:
        if curves.get(key):
            step, value = curves[key][-1]
            return f"No test yet: {words} {spell(value)} at step {step:.0f}."
    return "No result yet."


def ledger(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What was left out by category (a reason up to its colon), the most frequent first, with an example of each."""
    found: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for row in rows:
        category, _, detail = str(row["reason"]).partition(":")
        key = str(row["kind"]), category[:_LONGEST_REASON]
        found[key] += 1
        example.setdefault(key, f"{row['origin']}:{detail}"[:_LONGEST_REASON] if detail else str(row["origin"]))
    listed = [
        {"kind": kind, "reason": category, "count": f"{n:,}", "example": example[kind, category]}
        for (kind, category), n in found.most_common(_MOST_REASONS)
    ]
    if rest := found.most_common()[_MOST_REASONS:]:
        count = sum(n for _, n in rest)
        listed.append({"kind": "", "reason": f"{len(rest):,} more reasons", "count": f"{count:,}", "example": ""})
    return listed


def decisions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Automatic choices, in the order they were taken."""
    return [{key: str(row[key]) for key in ("name", "value", "reason")} for row in rows]


def model_of(config: Any) -> str:
    """The name or path of the backbone in a run's configuration; empty where it names none."""
    found = config.get("model", {}).get("backbone", "")
    while isinstance(found, Mapping):
        found = next((found[key] for key in ("path", "name", "init_args") if found.get(key)), "")
    return str(found)


def ranges(numbers: Sequence[int]) -> str:
    """``[7, 8, 9, 12]`` as ``7–9, 12``; the middle of a long list is left out, its length said."""
    starts = [n for n in numbers if n - 1 not in set(numbers)]
    ends = [n for n in numbers if n + 1 not in set(numbers)]
    spans = [str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True)]
    if len(spans) > 6:
        return f"{len(numbers)} ({', '.join(spans[:3])}, … {spans[-1]})"
    return ", ".join(spans) or "none"


def count(number: int) -> str:
    """A number of parameters: 256 M, 36.2 M, 576."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}\u00a0{unit}"
    return str(number)


def _layer_numbers(region: str) -> set[int]:
    spans = re.findall(r"(\d{1,4})(?:-(\d{1,4}))?", region)
    return {i for first, last in spans for i in range(int(first), int(last or first) + 1)}


def apart(wanted: Sequence[int], gap: int) -> tuple[int, ...]:
    """The layer numbers to print, the first in the list first, none closer than ``gap`` to another."""
    kept: list[int] = []
    for number in wanted:
        if all(abs(number - other) >= gap for other in kept):
            kept.append(number)
    return tuple(sorted(kept))


def _census_row(row: Mapping[str, Any], everything: int) -> dict[str, str]:
    size, moving = int(row["parameters"]), int(row["trainable"])
    return {
        "region": str(row["region"]),
        "mode": str(row["mode"]),
        "parameters": count(size),
        "exact": f"{size:,}",
        "trainable": count(moving) if moving else "–",
        "share": percent(moving / everything) if moving and everything else "–",
        "dtype": str(row["dtype"]),
        "training": "train" if row["training"] else "eval",
        "lr": "–" if row.get("lr") is None else short(float(row["lr"])),
        "weight_decay": "–" if row.get("weight_decay") is None else short(float(row["weight_decay"])),
    }


def _score(row: Mapping[str, Any]) -> Score:
    n = int(row["n"])
    shares = {key: _share(row.get(key)) for key in ("before", "after", "majority", "no_image")}
    marks = {key: 100 * value for key, value in shares.items() if value is not None}
    cells = {key: "–" if value is None else percent(value) for key, value in shares.items()} | {"interval": ""}
    after, verdict, above = shares["after"], "", False
    if after is not None and n > 0:
        low, high = wilson(after, n)
        marks |= {"low": 100 * low, "high": 100 * high}
        cells["interval"] = f"{100 * low:.0f}–{100 * high:.0f}\u00a0%"
        rivals = {"majority": shares["majority"], "no picture": shares["no_image"]}
        known = {name: value for name, value in rivals.items() if value is not None}
        lost = [name for name, value in known.items() if low <= value]
        above = bool(known) and not lost
        verdict = f"not above {_joined(lost)}" if lost else f"above {_joined(list(known))}" if known else ""
    return Score(str(row["type"]), f"{n:,}", cells, marks, verdict, above)


def _joined(rivals: list[str]) -> str:
    return "both" if len(rivals) == 2 else rivals[0]


def _share(value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is no fraction of 0 to 1")
    return float(value)
