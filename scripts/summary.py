"""Accuracy by question type over the stages of a training, beside its baselines: summary.py RUN [RUN ...].

With --looks RUN SECONDS: what looking inside has cost of so long a time.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def table(runs: list[Path]) -> Table:
    """One row per question type: before the first run, after each run, and what needs no picture."""
    evaluations = [json.loads((run / "evaluation.json").read_text(encoding="utf-8")) for run in runs]
    rows = [{row["type"]: row for row in evaluation["rows"]} for evaluation in evaluations]
    shown = Table(title=f"held-out questions answered exactly right ({evaluations[0]['split']} split)")
    moments = ["untrained", *(run.name for run in runs), "no picture", "majority"]
    shown.add_column("question")
    for name in ("n", *moments):
        shown.add_column(name, justify="right")
    for kind in rows[-1]:
        # A stage that was not asked at its end is asked at the beginning of the next one: the model is the same.
        after = [rows[i + 1][kind]["before"] if i + 1 < len(rows) else rows[i][kind]["after"] for i in range(len(rows))]
        values = [rows[0][kind]["before"], *after, rows[-1][kind]["no_image"], rows[-1][kind]["majority"]]
        shown.add_row(kind, str(rows[-1][kind]["n"]), *map(_percent, values))
    return shown


def looks(run: Path, seconds: float) -> str:
    """What looking inside has cost of so many seconds."""
    rows = json.loads((run / "inspections.json").read_text(encoding="utf-8"))
    spent = sum(sum(row["seconds"].values()) for row in rows)
    return f"looking inside: {len(rows)} looks, {spent:.0f} s, {spent / seconds:.1%} of the whole"


def _percent(value: Any) -> str:
    return "" if value is None else f"{value:.0%}"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--looks":
        sys.exit(print(looks(Path(sys.argv[2]), float(sys.argv[3]))))
    Console().print(table([Path(run) for run in sys.argv[1:]]))
