"""The table of the training benchmark, between its markers, from what was measured.

Data flow: benchmarks/training.json -> Markdown -> docs/speed-and-memory.md.
"""

from pathlib import Path
from textwrap import wrap
from typing import Any

from bench_rivals.arms import BASIS

BEGIN, END = "<!-- training benchmark: begin -->", "<!-- training benchmark: end -->"
_HEAD = (
    "| who, what trains | s per step | in units of ours | peak memory | first step after | largest difference of loss |"
)


def write_table(result: dict[str, Any], readme: Path) -> None:
    """Put the table, and what is known of growth, between the markers.

    Raises:
        SystemExit: The document has no such markers.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{readme} has no lines {BEGIN} and {END}.")
    parts = [table(result["rivals"])] + ([growth(result["growth"])] if "growth" in result else [])
    readme.write_text(f"{before}{BEGIN}\n\n{chr(10).join(parts)}\n\n{END}{after}", encoding="utf-8")


def table(rivals: dict[str, Any]) -> str:
    """The Markdown table and a line about how it was measured."""
    arms = rivals["arms"]
    basis = arms[BASIS]["seconds_per_step"]["median"] if BASIS in arms else None
    lines = [_HEAD, "|---|---|---|---|---|---|", *(_row(entry, basis) for entry in _fastest(arms))]
    machine, versions = rivals["machine"], rivals["versions"]["theirs"]
    device = machine.get("device", f"{rivals['threads']} cores of an {machine['processor']}")
    told = (
        f"{device}; nano model and data, {rivals['batch_size']} rows per step, {rivals['precision']}; all take turns, "
        f"medians of {rivals['rounds']}; losses over {rivals['steps']} steps, against ours. TRL "
        f"{versions['trl']}, transformers {versions['transformers']}, torch {versions['torch']}; by "
        "`python scripts/bench.py`."
    )
    return "\n".join([*lines, "", *wrap(told, 120)])


def growth(measured: dict[str, Any]) -> str:
    """One sentence: seconds per row by axis."""
    axes = []
    for axis, points in measured["axes"].items():
        seconds = " / ".join(f"{entry['seconds_per_row']:.3f}" for entry in points.values())
        axes.append(f"{axis.replace('_', ' ')} {'/'.join(points)}: {seconds}")
    return "\n".join(wrap(f"Seconds per row of ours against the number of {'; '.join(axes)}.", 120))


def _fastest(arms: dict[str, Any]) -> list[dict[str, Any]]:
    """Of arms with the same label, the fastest."""
    by_label: dict[str, dict[str, Any]] = {}
    for entry in arms.values():
        best = by_label.setdefault(entry["label"], entry)
        if entry["seconds_per_step"]["median"] < best["seconds_per_step"]["median"]:
            by_label[entry["label"]] = entry
    return list(by_label.values())


def _row(entry: dict[str, Any], basis: float | None) -> str:
    seconds, peak, start = (entry[k]["median"] for k in ("seconds_per_step", "peak_bytes", "startup_seconds"))
    relative = f"{seconds / basis:.2f}" if basis else ""
    difference = f"{entry['largest_difference_of_loss']:.0e}" if "largest_difference_of_loss" in entry else ""
    if entry.get("batches_differ_in"):
        difference += f" (other {', '.join(entry['batches_differ_in'])})"
    return f"| {entry['label']} | {seconds:.2f} | {relative} | {peak / 1e9:.1f} GB | {start:.1f} s | {difference} |"
