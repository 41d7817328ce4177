"""Fixtures of the causal tests."""

from tests.causal.taught import known

__all__ = ["known"]
