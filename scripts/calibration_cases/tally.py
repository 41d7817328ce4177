"""Coverage, size and power of one case: shares of its models, each with its own binomial interval.

Data flow: ``Record``s of a case -> by statistic -> an entry of benchmarks/calibration.json.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from scipy.stats import binomtest

from calibration_cases.case import Case, Reading
from calibration_cases.records import Record


def tally(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """The entry of a case.

    Args:
        case: The design.
        records: Its models.
    """
    by_statistic: dict[str, list[Reading]] = {}
    for record in records:
        for reading in record.outcome.readings:
            by_statistic.setdefault(reading.statistic, []).append(reading)
    profiles = _mean_profiles(records)
    return {
        "about": case.about,
        "models": len(records),
        "seconds_per_model": _round(fmean(record.seconds for record in records)),
        "statistics": {name: _statistic(case, readings, profiles) for name, readings in by_statistic.items()},
    }


def _statistic(case: Case, readings: Sequence[Reading], profiles: dict[str, list[float]]) -> dict[str, Any]:
    """All that is known of one statistic: fields without any reading are left out."""
    values = [one.value for one in readings if one.value is not None]
    entry: dict[str, Any] = {}
    if undefined := sum(one.value is None and one.found is None for one in readings):
        entry["undefined"] = undefined
    mean = fmean(values) if values else math.nan
    if values:
        entry |= {"mean": _round(mean), "spread": _round(stdev(values) if len(values) > 1 else 0.0)}
    sure = [(one, one.low, one.high) for one in readings if one.value is not None and None not in (one.low, one.high)]
    if sure:
        entry["coverage"] = share([low <= _truth(one, mean, profiles) <= high for one, low, high in sure])
        entry["width"] = _round(fmean(high - low for _, low, high in sure))
    if case.is_null:
        nulls = [one.null for one in readings if one.null is not None]
        bands = [(one.null_low, one.value, one.null_high) for one in readings]
        outside = [not low <= value <= high for low, value, high in bands if None not in (low, value, high)]
        entry |= {"null_told": _round(fmean(nulls))} if nulls else {}
        entry |= {"outside": share(outside)} if outside else {}
    if said := [one.found for one in readings if one.found is not None]:
        entry["size" if case.is_null else "power"] = share(said)
    return entry


def _truth(reading: Reading, mean: float, profiles: dict[str, list[float]]) -> float:
    if reading.profile:
        return profiles[reading.profile][reading.layer]
    return mean if reading.truth is None else reading.truth


def _mean_profiles(records: Sequence[Record]) -> dict[str, list[float]]:
    """Mean over models of each profile's layers; NaN where no model has a value."""
    gathered: dict[str, list[list[float]]] = {}
    for record in records:
        for name, profile in record.outcome.profiles.items():
            layers = gathered.setdefault(name, [[] for _ in profile])
            for layer, value in zip(layers, profile, strict=True):
                layer.extend([] if value is None else [value])
    return {name: [fmean(layer) if layer else math.nan for layer in layers] for name, layers in gathered.items()}


def share(events: Sequence[bool]) -> list[float]:
    """How often, with its own exact 95 % interval (Clopper and Pearson 1934), and of how many.

    Example:
        >>> share([True] * 19 + [False])
        [0.95, 0.7513, 0.9987, 20]
    """
    found = binomtest(sum(map(bool, events)), len(events)).proportion_ci(0.95, "exact")
    return [_round(fmean(map(bool, events))), _round(found.low), _round(found.high), len(events)]


def _round(value: float) -> float:
    return round(float(value), 4) if abs(value) >= 0.01 else float(f"{float(value):.3g}")
