"""Tiny models of the data tests, each built once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from lightning_mm.models.processor import Processing, load_processing
from lightning_mm.testing.tiny import build_tiny

Family = Callable[[str], Path]
LoadFamily = Callable[[str], Processing]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The folder of a tiny model, by the name of its family."""
    return cache(lambda name: build_tiny(name, tmp_path_factory.mktemp("tiny") / name))


@pytest.fixture(scope="session")
def processing(family: Family) -> LoadFamily:
    """A new Processing of a family; the caller may change it."""
    return lambda name: load_processing(str(family(name)))
