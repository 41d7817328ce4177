"""Fixtures of all tests: tiny models, small data with images, and a check of what a test leaves behind."""

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
import torch.distributed as dist

from lightning_mm.models.processor import Processing, load_processing
from lightning_mm.testing.tiny import build_tiny
from tests.helpers.data import Data, Family, make_probe_rows, make_rows
from tests.helpers.slow import SLOW_TESTS

os.environ.setdefault("WANDB_MODE", "offline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what slow.txt names, so that ``-m "not slow"`` leaves it out."""
    for item in items:
        if item.nodeid.partition("[")[0] in SLOW_TESTS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The folder of a tiny model, by the name of its family."""
    return cache(lambda name: build_tiny(name, tmp_path_factory.mktemp("tiny") / name))


@pytest.fixture(scope="session")
def processing(family: Family) -> Callable[[str], Processing]:
    """A new ``Processing`` of a family; the caller may change it."""
    return lambda name: load_processing(str(family(name)))


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs in tests, and the processes they start, keep their prefixes and compiled code out of the user's folders."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        # The compiler's pool of threads lives as long as the process: tests compile in the thread that asks.
        patch.setattr(inductor, "compile_threads", 1)
        yield


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    """A test that leaves a process group, a signal handler or a thread behind would change the tests after it."""
    before = signal.getsignal(signal.SIGTERM)
    threads = set(threading.enumerate())
    yield
    assert not (dist.is_available() and dist.is_initialized()), "a process group was left behind"
    assert signal.getsignal(signal.SIGTERM) == before, "a signal handler was left behind"
    left = {t for t in threading.enumerate() if not t.daemon} - threads
    for thread in left:
        thread.join(timeout=5)  # transformers' loading pool may still be on its way out
    alive = [thread for thread in left if thread.is_alive()]
    assert not alive, f"threads were left behind: {alive}"


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    """``tests.helpers.data.make_rows``."""
    return make_rows


@pytest.fixture
def probes(tmp_path: Path) -> Path:
    """24 pictures to probe with."""
    return make_probe_rows(tmp_path / "probes", 24)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """train (12 rows), val (4) and test (4) files of small conversations."""
    folder = tmp_path / "data"
    files = {}
    for seed, (split, count) in enumerate({"train": 12, "val": 4, "test": 4}.items()):
        files[split] = folder / f"{split}.json"
        folder.mkdir(exist_ok=True)
        files[split].write_text(json.dumps(make_rows(folder, count, seed=seed)))
    return files


@pytest.fixture
def probed(data: Data, probes: Path) -> Data:
    """``data`` with the file of ``probes``."""
    return {**data, "probes": probes}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)
