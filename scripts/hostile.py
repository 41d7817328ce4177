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
        self.outcomes: dict[str, Counter[str]] = {}
        self.slowest: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take down one attempt."""
        if report.when != "call":
            return
        test = report.nodeid.partition("[")[0]
        self.outcomes.setdefault(test, Counter())[report.outcome] += 1
        self.slowest[test] = max(self.slowest.get(test, 0.0), report.duration)
        if report.failed:
            self.failed.append(report.nodeid)


def main() -> int:
    """Run the attempts; returns 1 if one of them succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2000, help="Attempts, three fourths of them configs.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "hostile.json")
    options = parser.parse_args()
    counts = {"configs": options.count - options.count // 4, "model folders": options.count // 4}
    found: dict[str, dict[str, object]] = {}
    failed: list[str] = []
    for kind, test in TESTS.items():
        os.environ["LIGHTNING_MM_HOSTILE"] = f"{options.seed}:{counts[kind]}"
        results, began = Results(), time.monotonic()
        pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / test)], plugins=[results])
        outcomes: Counter[str] = sum(results.outcomes.values(), Counter())
        found[kind] = {
            "attempts": sum(outcomes.values()),
            "held": outcomes["passed"],
            "slowest_s": round(max(results.slowest.values(), default=0.0), 1),
            "seconds": round(time.monotonic() - began),
        }
        failed += results.failed
    content = {"seed": options.seed, **found, "succeeded": failed}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
