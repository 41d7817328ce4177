"""Fixtures of the causal tests."""

from collections.abc import Callable
from functools import cache

import pytest

from tests.helpers.plain_questions import Traced
from tests.helpers.taught_models import known

__all__ = ["known"]


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Traced]:
    """A family's loud model and the questions that it is asked."""
    return cache(lambda family: Traced(family, tmp_path_factory.mktemp(f"traced-{family}")))
