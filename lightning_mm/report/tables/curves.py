"""The curves of a run, as its logger wrote them.

Data flow: metrics.csv -> (step, value) points by metric -> ``sections.run`` draws them.
"""

import csv
import io
from pathlib import Path


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
