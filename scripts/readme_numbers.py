"""Numbers of README and of the docs, from measured files: python scripts/readme_numbers.py [--check].

    scripts/summary.py --json benchmarks/quickstart.json RUN RUN    # after scripts/quickstart.sh
    scripts/policy_table.py --json benchmarks/policies.json         # with nano/model and nano/data
    scripts/bench.py                                                # benchmarks/training.json

Data flow: benchmarks/*.json -> Markdown between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` in each document.
With --check nothing is written, and the exit status is 1 where a document is not up to date.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from bench_rivals import table as rivals  # noqa: E402
from bench_rivals.arms import BASIS  # noqa: E402

_QUESTIONS = {
    "category": "animal, food, vehicle or household object?",
    "count": "how many?",
    "all": "all eleven types",
}


def quickstart() -> str:
    """Table of the quickstart's answers."""
    rows = {row["type"]: row for row in _read("quickstart")["rows"]}
    lines = [
        "| held-out questions, exact match | n | after the connector | after layers 7-14 | without the picture | majority |",
        "|---|---|---|---|---|---|",
    ]
    for kind, words in _QUESTIONS.items():
        row = rows[kind]
        first, second, blank, majority = (row[key] for key in ("connector", "middle", "no_image", "majority"))
        lines.append(f"| {words} | {row['n']} | {first:.0%} | **{second:.0%}** | {blank:.0%} | {majority:.0%} |")
    return "\n".join(lines)


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
    return (
        f"On two CPU cores, a step that trains layers 8-15 of 30 takes {shares[BASIS]:.2f} of the time of full tuning, and\n"
        f"{shares['ours.middle.kept']:.2f} with its frozen prefix cached. TRL's SFTTrainer with its best settings takes {best:.2f} times\n"
        f"as long on the same layers, {patched:.2f} times if it is patched to score answers only (`python scripts/bench.py`)."
    )


BLOCKS: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "quickstart results": (quickstart, ("README.md", "docs/index.md")),
    "policy costs": (policies, ("docs/choose-layers.md",)),
    "training benchmark": (training, ("docs/speed-and-memory.md",)),
    "training summary": (training_summary, ("README.md",)),
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
