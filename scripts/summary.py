"""What the quickstart has shown: python scripts/summary.py STUDY [--seconds N] [--json FILE].

Prints how many questions of each type were answered exactly, beside what needs no picture, and whether the layers gain
over the connector alone. With --picture FILE: the path of one picture of a file of questions, and nothing else.

Data flow: folder of the study -> ``compare_arms`` -> ``summarize`` (plain values) -> table and sentences, or JSON for
``readme_numbers.py`` and ``quickstart_picture.py``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_mm.core.io import read_json, write_json
from lightning_mm.study.comparison import StudyComparison, TestComparison, compare_arms
from lightning_mm.study.results import StudyResults
from lightning_mm.study.sentences import tell
from lightning_mm.study.settings import START
from lightning_mm.study.statistics import Contrast, Level, contrasts

ARMS = {"before": START, "connector": "connector", "middle": "middle"}
"""Name of a column -> arm of the study."""
COLUMNS = ("majority", "gray picture", "another picture", "before", "connector continued", "middle")
_TOLD = ("What does it cost in text and facts?", "Where do the layers know what?")


def summarize(folder: str | Path, seconds: int | None = None) -> dict[str, Any]:
    """The numbers of a finished quickstart as plain values; shares are of 1.

    Args:
        folder: Of the study.
        seconds: What all of it took; None: not known.
    """
    results = StudyResults.read(folder)
    found = compare_arms(results)
    (test,) = found.tests.values()
    told = {section.title: section.sentences for section in tell(results, found)}
    return {
        "steps": results.settings.stage2.steps,
        "seconds": seconds,
        "precision": results.settings.options.get("trainer.precision"),
        "machine": results.result(START, found.seeds[0])["machine"],
        "rows": _rows(test),
        "text": {name: found.text[arm].value for name, arm in ARMS.items()},
        "facts": {name: found.facts[arm].value for name, arm in ARMS.items()},
        "gain": gain_words(_gain(test)),
        "against_before": _against_before(results, found, test.name),
        "told": [sentence for title in _TOLD for sentence in told.get(title, ())],
    }


def gain_words(gain: Contrast) -> str:
    """Whether the middle gains over the connector alone, with the interval that carries it.

    Example:
        >>> gain_words(Contrast("middle", "connector", 0.023, 0.004, 0.042, 0.004, 0.042, (0.023,), 300, 1))[-46:]
        '+0.4 to +4.2, paired over 300 pictures): a gain.'
    """
    verdict = "a gain" if gain.is_higher else "a loss" if gain.is_lower else "no gain was found"
    return f"Middle against connector continued: {_points(gain)}: {verdict}."


def table(summary: dict[str, Any]) -> Table:
    """One row per question type, then text and capitals."""
    shown = Table(title="known things in a hand never shown: questions answered exactly right, %")
    shown.add_column("question")
    for name in ("n", *COLUMNS):
        shown.add_column(name, justify="right")
    for row in summary["rows"]:
        blind = (row["majority"], row["gray"], row["other"])
        shares = (*blind, *(row[name]["value"] for name in ARMS))
        shown.add_row(row["type"], str(row["n"]), *map(_percent, shares), end_section=row["type"] == "all")
    shown.add_section()
    text, facts = summary["text"], summary["facts"]
    shown.add_row("text without a picture, nats", "", "", "", "", *(f"{text[name]:.3f}" for name in ARMS))
    shown.add_row("capitals without a picture", "", "", "", "", *(_percent(facts[name]) for name in ARMS))
    return shown


def test_picture(file: Path) -> Path:
    """The picture of the first question of a file that asks for a category."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return file.parent / next(row["image"] for row in rows if row["conversations"][-1]["type"] == "category")


def _rows(test: TestComparison) -> list[dict[str, Any]]:
    """All questions first, then by type; a gray and another picture are those of the middle arm."""
    return [
        {
            "type": row.kind,
            "n": row.num,
            "majority": row.majority,
            "gray": _value(row.gray.get("middle")),
            "other": _value(row.other.get("middle")),
            **{name: _ends(row.arms[arm]) for name, arm in ARMS.items()},
        }
        for row in test.rows
    ]


def _gain(test: TestComparison) -> Contrast:
    return next(each for each in test.against_control if each.arm == "middle")


def _against_before(results: StudyResults, found: StudyComparison, test: str) -> list[str]:
    """What both arms gain over the model that they began from."""
    names = list(ARMS.values())
    scores = results.scores(test, names, found.seeds)
    pairs = [("connector", START), ("middle", START)]
    differences = contrasts(scores, results.tests[test].pictures, names, pairs, results.settings.resamples)
    words = {"connector": "Connector continued", "middle": "Middle"}
    return [f"{words[each.arm]} against before: {_points(each)}." for each in differences]


def _points(contrast: Contrast) -> str:
    low, high = 100 * contrast.corrected_low, 100 * contrast.corrected_high
    pictures = f"paired over {contrast.num_pictures} pictures"
    return f"{100 * contrast.value:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, {pictures})"


def _ends(level: Level) -> dict[str, float]:
    return {"value": level.value, "low": max(level.low, 0.0), "high": min(level.high, 1.0)}


def _value(level: Level | None) -> float | None:
    return None if level is None else level.value


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def main() -> None:
    """Print the table and the sentences, and write the JSON where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("--seconds", type=int, help="what all of it took")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--picture", type=Path, help="file of questions: print the path of one of its pictures")
    options = parser.parse_args()
    if options.picture is not None:
        print(test_picture(options.picture))
        return
    if options.json is not None:
        write_json(options.json, summarize(options.study, options.seconds))
    summary = summarize(options.study, options.seconds) if options.json is None else read_json(options.json)
    Console().print(table(summary))
    print(*(f"- {line}" for line in (summary["gain"], *summary["against_before"], *summary["told"])), sep="\n")


if __name__ == "__main__":
    main()
