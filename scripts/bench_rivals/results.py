"""From runs to results: medians, what losses and batches agree, the machine.

Data flow: list of runs per arm -> one entry per arm, with all values beside their median.
"""

import os
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from machine import processor

from bench_rivals.arms import Arm, Growth
from bench_rivals.environment import VERSIONS

Run = dict[str, Any]
_MEASURED = {
    "seconds_per_step": 4,
    "cpu_seconds_per_step": 4,
    "peak_bytes": 0,
    "startup_seconds": 2,
    "startup_cpu_seconds": 2,
    "warm_up_seconds": 2,
}


def compared(arms: Sequence[Arm], runs: Mapping[str, list[Run]]) -> dict[str, Any]:
    """One entry per arm; batches and losses are compared with the product's uncached run of the same policy."""
    first = {arm.key: runs[arm.key][0] for arm in arms}
    own = {arm.train: first[arm.key] for arm in reversed(arms) if arm.who == "ours"}
    entries = {}
    for arm in arms:
        entry = {"label": arm.label, "who": arm.who, "train": arm.train, **_settings(arm), **medians(runs[arm.key])}
        entry["steps"] = first[arm.key]["steps"]
        entry["losses"] = [round(loss, 6) for loss in first[arm.key]["losses"]]
        if first[arm.key] is not own.get(arm.train, first[arm.key]):
            entry |= _agreement(first[arm.key], own[arm.train])
        entries[arm.key] = entry
    return entries


def medians(runs: Sequence[Run]) -> dict[str, Any]:
    """Median and all values of what was measured."""
    values = {name: [run[name] for run in runs] for name in _MEASURED}
    return {name: {"median": round(median(each), _MEASURED[name]), "all": each} for name, each in values.items()}


def grown(points: Sequence[Growth], runs: Mapping[Any, list[Run]]) -> dict[str, Any]:
    """Seconds per step and per row, by axis and value."""
    axes: dict[str, Any] = {}
    for point in points:
        entry = medians(runs[point.conditions])
        rows = point.batch_size * point.ranks
        entry["seconds_per_row"] = round(entry["seconds_per_step"]["median"] / rows, 4)
        axes.setdefault(point.axis, {})[str(point.value)] = entry
    return axes


def machine() -> dict[str, Any]:
    """What it ran on, and which versions; nothing that tells whose machine it is."""
    import transformers

    described: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
    }
    if torch.cuda.is_available():
        described["device"] = torch.cuda.get_device_name()
    ours = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"machine": described, "versions": {"ours": ours, "theirs": VERSIONS}}


def _agreement(run: Run, own: Run) -> dict[str, Any]:
    """Whether both saw the same tokens, targets and pictures, and how far apart their losses are."""
    pairs = list(zip(run["batches"], own["batches"], strict=False))
    noted = ("ids", "targets", "pixels")
    differing = [key for key in noted if any(a[key] != b[key] for a, b in pairs if a[key] and b[key])]
    losses = list(zip(run["losses"], own["losses"], strict=False))
    return {
        "batches_compared": len(pairs),
        "batches_differ_in": differing,
        "largest_difference_of_loss": max(abs(a - b) for a, b in losses),
    }


def _settings(arm: Arm) -> dict[str, Any]:
    settings: dict[str, Any] = {"options": list(arm.options)} if arm.who == "ours" else {"args": arm.args}
    return settings | ({"flags": list(arm.flags)} if arm.flags else {})
