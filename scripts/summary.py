"""Accuracy by question type over the stages of a training, beside its baselines: summary.py RUN [RUN ...].

With --looks RUN SECONDS: what looking inside has cost of so long a time. With --json FILE RUN RUN: the same numbers into a
file, for readme_numbers.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def table(runs: list[Path]) -> Table:
    """One row per question type: after each run, and what needs no picture."""
    last = json.loads((runs[-1] / "evaluation.json").read_text(encoding="utf-8"))
    rows = {row["type"]: row for row in last["rows"]}
    shown = Table(title=f"held-out questions answered exactly right ({last['split']} split)")
    shown.add_column("question")
    # A stage that is not asked at its end is asked at the beginning of the next one: the model is the same.
    for name in ("n", *(run.name.rpartition("-")[2] for run in runs), "no picture", "majority"):
        shown.add_column(name, justify="right")
    for kind, row in rows.items():
        after = [_asked(runs[i + 1], kind) for i in range(len(runs) - 1)]
        values = [*after, row["after"], row["no_image"], row["majority"]]
        shown.add_row(kind, str(row["n"]), *map(_percent, values))
    return shown


def _asked(run: Path, kind: str) -> Any:
    rows = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    return next((row["before"] for row in rows if row["type"] == kind), None)


def write(file: Path, runs: list[Path]) -> None:
    """The numbers of the last two runs as JSON."""
    last = json.loads((runs[-1] / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    kept = ("type", "n", "no_image", "majority")
    rows = [{**{key: row[key] for key in kept}, "connector": row["before"], "middle": row["after"]} for row in last]
    file.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


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
    if sys.argv[1] == "--json":
        sys.exit(write(Path(sys.argv[2]), [Path(run) for run in sys.argv[3:]]))
    Console().print(table([Path(run) for run in sys.argv[1:]]))
