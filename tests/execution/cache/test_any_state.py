"""Whatever is in the cache, the same bits: filled to any point when the run was killed, or damaged since."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mm.data.collator import Collator
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.data.sample import Sample
from lightning_mm.execution.cache.activation_cache import PrefixCache, split_verified_prefix
from lightning_mm.execution.cache.frozen_prefix import FrozenPrefix
from lightning_mm.execution.cache.store import RecordStore
from lightning_mm.execution.cache.store import store as store_module
from lightning_mm.execution.cache.vision_features import FeatureCache, FrozenTower, split_verified_tower
from lightning_mm.models.loading import Backbone
from lightning_mm.models.processor import load_processor
from lightning_mm.tuning import ConnectorOnly, IntermediateOnly
from lightning_mm.tuning.apply import prepare_model
from tests.helpers.data import Family, make_uneven_rows

Cache = PrefixCache | FeatureCache


@dataclass
class Run:
    """A model split at its cache, and the batches of two epochs: other rows side by side in each, one of them twice."""

    part: FrozenPrefix | FrozenTower
    collator: Collator
    batches: list[list[Sample]]

    def open(self, folder: Path) -> Cache:
        store = RecordStore.open(folder, {}, limit_bytes=2**30, dtype="float32")
        if isinstance(self.part, FrozenPrefix):
            return PrefixCache(self.part, store, "float32", torch.float32)
        return FeatureCache(self.part, store, "float32", torch.float32)

    def steps(self, cache: Cache, first: int = 0) -> Iterator[list[Tensor | None]]:
        """What the blocks above get in each step, from the given one on, padding included."""
        collate = cache.collator(self.collator)
        for samples in self.batches[first:]:
            cached: Any = collate(samples).cached
            states: Any = cache.states(cached)
            yield [None if each is None else each.clone() for each in states]


@pytest.fixture(scope="module", params=["prefix", "features"])
def split(
    request: pytest.FixtureRequest, family: Family, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    kind = request.param
    samples = read_conversations(make_uneven_rows(tmp_path_factory.mktemp("rows"), text_only=True)).samples
    collator = Collator(load_processor(str(family("llava"))))
    tuning = IntermediateOnly(layers="2") if kind == "prefix" else ConnectorOnly()
    mm, plan = prepare_model(Backbone(path=str(family("llava"))), tuning)
    batch = collator(samples[:3])
    part = (
        split_verified_prefix(mm, plan, batch, collator)
        if kind == "prefix"
        else split_verified_tower(mm, (), batch, collator)
    )

    for name in (mm.layout.vision_blocks[0], mm.layout.layers[0]):
        mm.model.get_submodule(name).register_forward_hook(_depending_on_the_batch)

    def run(batch_size: int) -> Run:
        order = [0, 1, 2, 3, 4, 1, 3, 0, 4, 1, 2, 1]
        rows = [samples[i] for i in order]
        return Run(part, collator, [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)])

    return run


def _depending_on_the_batch(_: Any, __: Any, output: Tensor) -> Tensor:
    """Stands for kernels that add in another order where more rows or padding are there: here, many do not."""
    return output + 1e-3 * output.shape[0] + 1e-3 * output.shape[1]


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_killed_at_any_flush(
    batch_size: int, split: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is copied as a kill would leave it, after every row; the step that was under way begins again."""
    monkeypatch.setattr(store_module, "BLOCK_SECONDS", -1.0)
    run, copies = split(batch_size), []
    flush = RecordStore.flush

    def copying(store: RecordStore) -> None:
        flush(store)
        if store.folder.is_relative_to(tmp_path / "whole"):
            copies.append((len(done), tmp_path / f"killed{len(copies)}"))
            shutil.copytree(tmp_path / "whole", copies[-1][1])

    monkeypatch.setattr(RecordStore, "flush", copying)
    done: list[list[Tensor | None]] = []
    for states in run.steps(run.open(tmp_path / "whole")):
        done.append(states)
    assert len(copies) == 5
    for step, folder in copies:
        for begin in {0, step}:  # from the beginning, and from a checkpoint right before
            resumed = run.open(folder)
            for found, expected in zip(run.steps(resumed, begin), done[begin:], strict=True):
                assert same(found, expected)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "zeroed": lambda data: data[: len(data) // 3] + bytes(len(data) - len(data) // 3),
    "truncated": lambda data: data[: 2 * len(data) // 3],
    "emptied": lambda _: b"",
}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_records(damage: str, batch_size: int, split: Callable[..., Run], tmp_path: Path) -> None:
    """Some rows of a batch are lost, others are not."""
    run = split(batch_size)
    cache = run.open(tmp_path)
    expected = list(run.steps(cache))
    cache.close()
    (shard,) = tmp_path.rglob("*.shard")
    shard.write_bytes(DAMAGES[damage](shard.read_bytes()))
    cache = run.open(tmp_path)
    assert all(same(a, b) for a, b in zip(run.steps(cache), expected, strict=True))
    assert cache.store.stats.misses > 0, "something was lost"
    cache.close()
    cache = run.open(tmp_path)
    assert all(same(a, b) for a, b in zip(run.steps(cache), expected, strict=True))
    assert cache.store.stats.misses == 0, "and was put again"
