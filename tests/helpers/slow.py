"""The tests that ``scripts/test.sh --fast`` leaves out. Data flow: tests/slow.txt -> node ids without parameters."""

from pathlib import Path

LIST = Path(__file__).parents[1] / "slow.txt"
SLOW_TESTS = frozenset(line for line in LIST.read_text().splitlines() if line and not line.startswith("#"))
"""Tests that are marked slow, with all their parameters."""
