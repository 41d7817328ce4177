"""Curves over layers of a study: means over seeds, peaks, and whether causal curves agree with geometric ones.

Data flow: layers.csv.gz and causes.csv.gz of the seeds -> one curve per measure and arm -> ``Peak``; pairs of curves ->
``Agreement``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean

from lightning_mm.core.estimate import LEVEL
from lightning_mm.core.layer_table import LayerRow
from lightning_mm.study.results import StudyResults
from lightning_mm.study.statistics import holm, smooth_p_value, spearman

LOOKS = {
    "entailment": (("entailment/hard", "last"), ("entailment/random", "last")),
    "objects": (("objects", "image"), ("objects", "last")),
    "meeting": (("overlap", "last"), ("overlap", "image~text")),
    "gap": (("gap", "last"), ("gap", "image~text")),
}
"""What is asked of the layers -> measure and site that answer, the first that was measured."""
GEOMETRIC = ("meeting", "entailment", "objects")
_CAUSAL = {"ablation": "skip", "knockout": "image->", "transplant": "sliding"}
"""Measure -> what its site says, of the causal curves that are compared: a whole layer, what the image gives to it."""
_Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Peak:
    """Where a curve is highest.

    Args:
        measure: Its name.
        site: Where it was measured.
        layer: Of the highest value; -1 is the embeddings.
        value: There.
        low: Lower end of its 95 % interval; None where there is none.
        high: Upper end.
        null: Chance; None where it is not known.
        alike: Layers whose interval holds the value of the peak.
        clear: Layers that are above chance, at 5 % over all layers together: by their adjusted p-value where layers.csv
            has one, otherwise by the widths of interval and null band (Bonferroni).
        num_layers: Layers with a value.
    """

    measure: str
    site: str
    layer: int
    value: float
    low: float | None
    high: float | None
    null: float | None
    alike: tuple[int, ...]
    clear: tuple[int, ...]
    num_layers: int


@dataclass(frozen=True)
class Agreement:
    """Whether a causal and a geometric curve rank the layers alike.

    Args:
        causal: Name of the causal curve.
        geometric: Name of the geometric one.
        correlation: Spearman's, over the layers of both.
        p_value: Share of random curves as smooth that correlate as strongly, adjusted for all pairs (Holm).
        num_layers: Layers of both.
    """

    causal: str
    geometric: str
    correlation: float
    p_value: float
    num_layers: int


def curve(results: StudyResults, arm: str, seeds: Sequence[int], look: str) -> list[LayerRow]:
    """The mean over seeds of what answers a question about layers; empty where nothing was measured.

    The ends of intervals are means too: the pictures are the same in all seeds, so that more seeds do not make the
    intervals narrower. A layer's adjusted p-value is the largest of its seeds.
    """
    by_seed = [results.layers(arm, seed) for seed in seeds]
    for measure, site in LOOKS[look]:
        found = mean_rows([[row for row in rows if (row.measure, row.site) == (measure, site)] for rows in by_seed])
        if any(row.value is not None for row in found):
            return found
    return []


def mean_rows(by_seed: Sequence[Sequence[LayerRow]]) -> list[LayerRow]:
    """Rows of one measure and site, averaged over the seeds that have them."""
    grouped: dict[int, list[LayerRow]] = {}
    for rows in by_seed:
        for row in rows:
            grouped.setdefault(row.layer, []).append(row)
    found = []
    for layer in sorted(grouped):
        own = [row for row in grouped[layer] if row.value is not None]
        if not own:
            found.append(grouped[layer][0])
            continue
        means = {
            name: _mean([getattr(row, name) for row in own])
            for name in ("value", "low", "high", "null", "null_low", "null_high")
        }
        adjusted = [row.p_adjusted for row in own]
        largest = None if None in adjusted else max(p for p in adjusted if p is not None)
        found.append(replace(own[0], p_adjusted=largest, **means))  # type: ignore[arg-type]
    return found


def peak_of(rows: Sequence[LayerRow]) -> Peak | None:
    """The peak of a curve over layers; None where it has no value."""
    known = [row for row in rows if row.value is not None]
    if not known:
        return None
    best = max(known, key=lambda row: row.value or 0.0)
    assert best.value is not None
    alike = [row.layer for row in known if row.high is not None and row.high >= best.value]
    clear = [row.layer for row in known if _adjusted_p(row, len(known)) <= LEVEL]
    return Peak(
        best.measure,
        best.site,
        best.layer,
        best.value,
        best.low,
        best.high,
        best.null,
        tuple(alike),
        tuple(clear),
        len(known),
    )


def _adjusted_p(row: LayerRow, num_layers: int) -> float:
    """P-value against chance over all layers together."""
    return _p_above_chance(row) * num_layers if row.p_adjusted is None else row.p_adjusted


def _p_above_chance(row: LayerRow) -> float:
    """One-sided p-value against chance, by the widths of the interval and of the null's band; 1 where unknown."""
    if row.value is None or row.null is None or row.low is None or row.high is None:
        return 1.0
    error = (row.high - row.low) / (2 * _Z95)
    if row.null_low is not None and row.null_high is not None:
        error = math.hypot(error, (row.null_high - row.null_low) / (2 * _Z95))
    return 1 - NormalDist().cdf((row.value - row.null) / error) if error > 0 else 1.0


def agreements(results: StudyResults, arm: str, seeds: Sequence[int]) -> list[Agreement]:
    """Every causal curve of an arm against every geometric one.

    Args:
        results: The study's.
        arm: With causes.
        seeds: Whose curves are averaged.
    """
    causal = _causal_curves(results, arm, seeds)
    geometric = {look: _values(curve(results, arm, seeds, look)) for look in GEOMETRIC}
    found = []
    for name, strength in causal.items():
        for look, values in geometric.items():
            both = sorted(strength.keys() & values.keys())
            if len(both) < 4:
                continue
            one, two = [strength[layer] for layer in both], [values[layer] for layer in both]
            if not math.isnan(rho := spearman(one, two)):
                found.append(Agreement(name, look, rho, smooth_p_value(one, two), len(both)))
    adjusted = holm([each.p_value for each in found])
    return [replace(each, p_value=p) for each, p in zip(found, adjusted, strict=True)]


def _causal_curves(results: StudyResults, arm: str, seeds: Sequence[int]) -> dict[str, dict[int, float]]:
    """How much each layer matters, by cause: what the answer loses without it, or what it gives when transplanted."""
    by_seed = [rows for seed in seeds if (rows := results.causes(arm, seed))]
    names = dict.fromkeys((row.measure, row.site) for rows in by_seed for row in rows if row.measure in _CAUSAL)
    names = {name: None for name in names if _CAUSAL[name[0]] in name[1]}
    found = {}
    for measure, site in names:
        rows = mean_rows([[row for row in rows if (row.measure, row.site) == (measure, site)] for rows in by_seed])
        sign = 1.0 if measure == "transplant" else -1.0
        values = {layer: sign * value for layer, value in _values(rows).items()}
        if len(set(values.values())) > 1:
            found[f"{measure} {site}".strip()] = values
    return found


def _values(rows: Sequence[LayerRow]) -> dict[int, float]:
    return {row.layer: row.value for row in rows if row.value is not None and row.layer >= 0}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
