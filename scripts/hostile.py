"""Tries hostile configs and model folders by the thousand, and writes how many were refused, and how fast.

Data flow: seed, count -> pytest runs the two test files with that many attempts -> ``benchmarks/hostile.json``.

    python scripts/hostile.py [--seed 1] [--count 2000] [--out benchmarks/hostile.json]
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = {
    "configs": "tests/verbs/test_config_classes.py::test_a_hostile_config_runs_nothing",
    "model folders": "tests/models/test_hostile_folders.py::test_a_hostile_folder",
}


class Results:
    """Counts outcomes of the attempts, by test."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.slowest: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take down one attempt; one that could not be prepared has not held either."""
        test = report.nodeid.partition("[")[0]
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.held[test] += 1
            self.slowest[test] = max(self.slowest.get(test, 0.0), report.duration)


def main() -> int:
    """Run the attempts; returns 1 unless all of them were made and held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2000, help="Attempts, half of them configs.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "hostile.json")
    options = parser.parse_args()
    each = options.count // len(TESTS)
    os.environ["LIGHTNING_MM_HOSTILE"] = f"{options.seed}:{each}"
    results, began = Results(), time.monotonic()
    os.chdir(ROOT)
    pytest.main(["-q", "-p", "no:cacheprovider", *TESTS.values()], plugins=[results])
    content = {
        "seed": options.seed,
        "seconds": round(time.monotonic() - began),
        **{
            kind: {"attempts": each, "held": results.held[test], "slowest_s": round(results.slowest.get(test, 0.0), 1)}
            for kind, test in TESTS.items()
        },
        "failed": results.failed,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))
    return 0 if results.held.total() == each * len(TESTS) else 1


if __name__ == "__main__":
    sys.exit(main())
