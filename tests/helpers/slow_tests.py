"""The tests that ``-m "not slow"`` leaves out, listed in ``tests/slow.txt``."""

from pathlib import Path

_LINES = (Path(__file__).parents[1] / "slow.txt").read_text(encoding="utf-8").splitlines()
SLOW_TESTS = frozenset(line for line in _LINES if line and not line.startswith("#"))
"""Tests that are marked slow, with all their parameters."""
