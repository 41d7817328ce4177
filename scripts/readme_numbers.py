"""Numbers of README and of the docs, from measured files: python scripts/readme_numbers.py [--check].

    scripts/quickstart.sh                                           # runs/quickstart/quickstart.json, to be copied here
    scripts/quickstart_picture.py                                   # draws docs/quickstart.png
    scripts/policy_table.py --json benchmarks/policies.json         # with nano/model and nano/data
    scripts/bench.py                                                # benchmarks/training.json
    scripts/calibration.py                                          # benchmarks/calibration.json

Data flow: benchmarks/*.json -> Markdown between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` in each document.
With --check nothing is written, and the exit status is 1 where a document is not up to date.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from bench_rivals import table as rivals  # noqa: E402
from bench_rivals.arms import BASIS  # noqa: E402
from calibration_cases.table import faults, tables  # noqa: E402

_QUESTIONS = {
    "all": "all types",
    "category": "animal, food, vehicle or household object?",
    "bind_colour": "which color has a named thing?",
    "count": "how many?",
    "left_right": "left or right?",
}
_ARMS = ("before", "connector", "middle")


def quickstart() -> str:
    """Some of the quickstart's answers, and what they come to."""
    result = _read("quickstart")
    rows = {row["type"]: row for row in result["rows"]}
    chosen = [(words, rows[kind]) for kind, words in _QUESTIONS.items() if kind in rows]
    return "\n".join([*_table(chosen, result), "", *wrap(result["gain"], 120)])


def quickstart_by_type() -> str:
    """All of the quickstart's answers, and all that it says."""
    result = _read("quickstart")
    lines = _table([(row["type"].replace("_", " "), row) for row in result["rows"]], result)
    told = [f"- {line}" for line in (result["gain"], *result["against_before"], *result["told"])]
    took = "" if result["seconds"] is None else f", {result['seconds'] / 60:.0f} minutes in all"
    machine = result["machine"]
    where = f"{machine['processor']}, {machine['threads']} threads, {result['precision']}{took}."
    return "\n".join([*lines, "", *told, "", f"One seed, {result['steps']} steps each, on {where}"])


def quickstart_picture() -> str:
    """README's picture: the quickstart's bars."""
    result = _read("quickstart")
    everything = result["rows"][0]
    shares = ", ".join(f"{name} {everything[name]['value']:.0%}" for name in _ARMS)
    return f"![Questions answered by the quickstart's models, by type; all types: {shares}](docs/quickstart.png)"


def _table(chosen: list[tuple[str, Any]], result: Any) -> list[str]:
    """Lines of the quickstart's table."""
    lines = [
        "| answered exactly | n | majority | gray picture | another picture | before | connector continued | middle |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for words, row in chosen:
        blind = [_share(row[key]) for key in ("majority", "gray", "other")]
        shares = [_share(row[key]["value"]) for key in _ARMS]
        lines.append(f"| {words} | {row['n']} | {' | '.join((*blind, *shares[:2]))} | **{shares[2]}** |")
    for words, key, form in (("capitals, no picture", "facts", ".0%"), ("text, nats per token", "text", ".3f")):
        lines.append(f"| {words} | | | | | {' | '.join(format(result[key][name], form) for name in _ARMS)} |")
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def policies() -> str:
    """Table of what each policy trains and costs."""
    lines = ["| policy | trains | weights | FLOPs of a step |", "|---|---|---|---|"]
    for row in _read("policies")["policies"]:
        lines.append(f"| `{row['policy']}` | {row['trains']} | {row['weights']:.1%} | {row['flops']:.0%} |")
    return "\n".join(lines)


def training() -> str:
    """Table of the training benchmark, and what is known of growth."""
    result = _read("training")
    return "\n".join([rivals.table(result["rivals"]), rivals.growth(result["growth"])])


def training_summary() -> str:
    """Two lines of the training benchmark."""
    arms = _read("training")["rivals"]["arms"]
    seconds = {key: arm["seconds_per_step"]["median"] for key, arm in arms.items()}
    basis = seconds[BASIS]
    shares = {key: value / seconds["ours.full"] for key, value in seconds.items()}
    best, patched = seconds["trl.middle.best"] / basis, seconds["trl.middle.patched"] / basis
    told = (
        f"On two CPU cores, a step that trains layers 8-15 of 30 takes {shares[BASIS]:.2f} of the time of full tuning, "
        f"and {shares['ours.middle.kept']:.2f} with its frozen prefix cached. TRL's SFTTrainer with its best settings "
        f"takes {best:.2f} times as long on the same layers, {patched:.2f} times if it is patched to score answers "
        "only (`python scripts/bench.py`)."
    )
    return "\n".join(wrap(told, 120))


def calibration() -> str:
    """Tables of coverage, size and power."""
    return tables(_read("calibration")["cases"])


def calibration_faults() -> str:
    """What is not as it should be, beyond the error of the simulation."""
    lines = faults(_read("calibration")["cases"])
    return "\n".join(f"- {line}" for line in lines) or "None."


BLOCKS: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "quickstart picture": (quickstart_picture, ("README.md",)),
    "quickstart results": (quickstart, ("README.md",)),
    "quickstart results by type": (quickstart_by_type, ("docs/index.md",)),
    "policy costs": (policies, ("docs/choose-layers.md",)),
    "training benchmark": (training, ("docs/speed-and-memory.md",)),
    "training summary": (training_summary, ("README.md",)),
    "calibration": (calibration, ("docs/calibration.md",)),
    "calibration faults": (calibration_faults, ("docs/calibration.md",)),
}
"""Name of a block -> what makes it, and the documents that hold it."""


def fill(text: str, name: str, content: str) -> str:
    """A document with the block's content in place.

    Raises:
        SystemExit: The document has no such block.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"a document has no lines {begin} and {end}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def stale() -> dict[Path, str]:
    """Documents that are not up to date -> what they should hold."""
    texts: dict[Path, str] = {}
    for name, (make, documents) in BLOCKS.items():
        content = make()
        for path in (ROOT / document for document in documents):
            texts[path] = fill(texts.get(path) or path.read_text(encoding="utf-8"), name, content)
    return {path: text for path, text in texts.items() if text != path.read_text(encoding="utf-8")}


def _read(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    changed = stale()
    for path, text in changed.items():
        print(("not up to date: " if "--check" in sys.argv else "written: ") + str(path.relative_to(ROOT)))
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    sys.exit(bool(changed) and "--check" in sys.argv)
