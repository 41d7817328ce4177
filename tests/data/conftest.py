"""Fixtures of the data tests: processors of tiny models."""

from collections.abc import Callable

import pytest

from lightning_mm.models.processor import Processing, load_processing
from tests.helpers.data import Family


@pytest.fixture(scope="session")
def processing(family: Family) -> Callable[[str], Processing]:
    """A new ``Processing`` of a family; the caller may change it."""
    return lambda name: load_processing(str(family(name)))
