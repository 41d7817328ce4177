"""What the report says of the sources of a run's data: their rows, their share, and the loss on each.

Data flow: sources.json and the curves of metrics.csv -> one row per split and source -> sources.html.jinja.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_mm.core import metric_names
from lightning_mm.report.figures.curves import Points
from lightning_mm.report.tables.numbers import percent, short

_MISSING = "\u2013"


def sources(raw: Sequence[Mapping[str, Any]], curves: Mapping[str, Points]) -> list[dict[str, str]]:
    """One row per split and source.

    Args:
        raw: sources.json.
        curves: The metrics of the run, by name.
    """
    total = sum(int(row["per_epoch"] or 0) for row in raw)
    return [_row(row, curves, total) for row in raw]


def _row(row: Mapping[str, Any], curves: Mapping[str, Points], total: int) -> dict[str, str]:
    split, name, used = str(row["split"]), str(row["name"]), int(row["used"])
    per_epoch = None if row["per_epoch"] is None else int(row["per_epoch"])
    losses = curves.get(metric_names.source_loss(split, name), [])  # type: ignore[arg-type]  # any split may be named
    shares = [share for _, share in curves.get(metric_names.token_share(name), [])] if split == "train" else []
    return {
        "split": split,
        "name": name,
        "path": str(row["path"]),
        "read": f"{int(row['read']):,}",
        "dropped": f"{int(row['dropped']):,}",
        "used": f"{used:,}",
        "per_epoch": _MISSING if per_epoch is None else f"{per_epoch:,}",
        "share": percent(per_epoch / total) if per_epoch is not None and total else _MISSING,
        "times": f"{per_epoch / used:.3g}" if per_epoch is not None and used else _MISSING,
        "tokens": percent(sum(shares) / len(shares)) if shares else _MISSING,
        "first_loss": short(losses[0][1]) if losses else _MISSING,
        "last_loss": short(losses[-1][1]) if losses else _MISSING,
    }
