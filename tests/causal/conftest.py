"""Fixtures of the causal tests."""

from tests.helpers.taught_models import known

__all__ = ["known"]
