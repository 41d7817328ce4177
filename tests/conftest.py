"""What all tests share: tiny models, small data with pictures, and a watch over what tests leave behind."""

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
from PIL import Image

from lightning_mm.testing.tiny import build_tiny

os.environ.setdefault("WANDB_MODE", "offline")

SLOW_TESTS = frozenset(
    line for line in (Path(__file__).parent / "slow.txt").read_text().splitlines() if line and not line.startswith("#")
)
"""Tests that are marked slow, with all their parameters."""

FAMILIES = ("llava", "qwen2_5_vl", "smolvlm", "internvl", "gemma3")
"""The families that every policy is tried on."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what slow.txt names, so that ``-m "not slow"`` leaves it out."""
    for item in items:
        if item.nodeid.partition("[")[0] in SLOW_TESTS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, by the name of its family."""
    return cache(lambda name: build_tiny(name, tmp_path_factory.mktemp("tiny") / name))


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
    return make_rows


def make_rows(folder: Path, count: int, *, seed: int = 0, text_only: bool = False) -> list[dict[str, Any]]:
    """Conversations of uneven length about pictures of one colour, written to ``folder``."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        colour = generator.choice(["red", "green", "blue", "white"])
        turns = []
        for turn in range(generator.randint(1, 3)):
            mark = "<image>\n" if turn == 0 and not text_only else ""
            words = " ".join(generator.choice(["a", "big", "small", "old"]) for _ in range(generator.randint(0, 6)))
            turns += [
                {"from": "human", "value": f"{mark}What colour is this {words} thing?"},
                {"from": "gpt", "value": f"It is {colour}{' indeed' * generator.randint(0, 4)}.", "type": colour},
            ]
        row: dict[str, Any] = {"id": f"row-{index}", "conversations": turns}
        if not text_only:
            name = f"picture-{seed}-{index}.png"
            Image.new("RGB", (40 + index % 5, 36), colour).save(folder / name)
            row["image"] = name
        rows.append(row)
    return rows


COLOURS = ("red", "green", "blue", "white")
SIZES = {"tiny": 8, "small": 12, "big": 18}
GROUNDS = ("black", "grey", "brown", "purple")


def make_probe_rows(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Pictures of one or two squares, no two alike, with what is true and false of them, in the documented format."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    things = [(size, colour) for size in SIZES for colour in COLOURS]
    ones = [([one], ground) for one in things for ground in GROUNDS]
    twos = [([one, two], ground) for one in things for two in things for ground in GROUNDS if one[1] != two[1]]
    generator.shuffle(ones)
    generator.shuffle(twos)
    scenes = [ones[index // 3] if index % 3 == 0 else twos[index] for index in range(count)]
    rows = [_probe_row(folder / f"probe-{seed}-{i}.png", *scene, generator) for i, scene in enumerate(scenes)]
    file = folder / f"probes-{seed}.json"
    file.write_text(json.dumps(rows))
    return file


def _probe_row(file: Path, squares: list[tuple[str, str]], ground: str, generator: random.Random) -> dict[str, Any]:
    picture = Image.new("RGB", (40, 40), ground)
    objects = []
    for (size, colour), left in zip(squares, (0, 20), strict=False):
        box = (left, 10, left + SIZES[size], 10 + SIZES[size])
        picture.paste(colour, box)
        objects.append({"name": colour, "box": box})
    picture.save(file)
    wrong = generator.choice([colour for colour in COLOURS if colour not in {c for _, c in squares}])

    def told(named: list[tuple[str, str]]) -> str:
        return " and ".join(f"a {size} {colour} square" for size, colour in named) + f" on {ground}"

    return {
        "id": file.stem,
        "image": file.name,
        "caption": told(squares),
        "false_captions": [told([(squares[0][0], wrong), *squares[1:]])],
        "objects": objects,
    }


@pytest.fixture
def probes(tmp_path: Path) -> Path:
    """24 pictures to probe with."""
    return make_probe_rows(tmp_path / "probes", 24)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """train (12 rows), val (4) and test (4) files of small conversations."""
    folder = tmp_path / "data"
    files = {}
    for seed, (split, count) in enumerate({"train": 12, "val": 4, "test": 4}.items()):
        files[split] = folder / f"{split}.json"
        folder.mkdir(exist_ok=True)
        files[split].write_text(json.dumps(make_rows(folder, count, seed=seed)))
    return files


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)
