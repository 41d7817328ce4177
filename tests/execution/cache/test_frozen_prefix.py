"""Training from a kept prefix is training: equal losses and weights, cold, warm, half known, resumed, across runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data import images
from lightning_mm.data.collator import Collator
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.execution.cache.activation_cache import CacheSettings, PrefixCache
from lightning_mm.execution.cache.frozen_prefix import FrozenPrefix
from lightning_mm.execution.cache.store import RecordStore
from lightning_mm.execution.prepare import Compute
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.processor import load_processor
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import IntermediateOnly, LoRA, LoRAOnMiddle, TuningPolicy
from tests.helpers.data import Data, Family, make_uneven_rows
from tests.helpers.training import DROPOUT, MIDDLE, SaveAt, cache_on, train, train_losses

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl", "gemma3", "mllama")


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_those_without_a_cache(name: str, family: Family, data: Data, tmp_path: Path) -> None:
    """12 rows, batches of 2, two epochs: the second one, and the second run, read what the first wrote.

    1e-5: float32 sums in another order, since rows stand alone when they are computed.
    """
    plain, weights = train_losses(family(name), data, tmp_path)
    cold, _ = train_losses(family(name), data, tmp_path, cache=cache_on(tmp_path))
    warm, warm_weights = train_losses(family(name), data, tmp_path, cache=cache_on(tmp_path))
    assert cold == pytest.approx(plain, rel=1e-5)
    assert warm == pytest.approx(plain, rel=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(warm_weights[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_it_makes_no_difference_whether_a_row_is_known(dtype: Any, family: Family, data: Data, tmp_path: Path) -> None:
    """Bit for bit: rows are rounded before they are used for the first time, and alone whenever they are computed."""
    cold, _ = train_losses(family("llava"), data, tmp_path, cache=cache_on(tmp_path, dtype=dtype))
    warm, _ = train_losses(family("llava"), data, tmp_path, cache=cache_on(tmp_path, dtype=dtype))
    assert warm == cold
    plain, _ = train_losses(family("llava"), data, tmp_path)
    assert cold == pytest.approx(plain, rel={"float32": 1e-5, "bfloat16": 1e-2, "int8": 3e-2}[dtype])


@pytest.mark.parametrize(
    "tuning", [IntermediateOnly(layers="0-1"), LoRAOnMiddle(layers="1-2", lora=LoRA(r=2)), IntermediateOnly(layers="3")]
)
def test_any_policy_with_a_frozen_prefix(tuning: TuningPolicy, family: Family, data: Data, tmp_path: Path) -> None:
    """From what enters the first block on, where that one trains."""
    plain, _ = train_losses(family("llava"), data, tmp_path, tuning=tuning, max_steps=8)
    for _ in range(2):
        kept, _ = train_losses(family("llava"), data, tmp_path, tuning=tuning, max_steps=8, cache=cache_on(tmp_path))
        assert kept == pytest.approx(plain, rel=1e-5)


def test_known_rows_are_not_decoded_again(
    family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    real = images.load

    def load(path: Path, *args: Any) -> Any:
        opened.append(path)
        return real(path, *args)

    monkeypatch.setattr(images, "load", load)
    train_losses(family("llava"), data, tmp_path, cache=cache_on(tmp_path), max_steps=6)
    assert len(opened) >= 12
    opened.clear()
    train_losses(family("llava"), data, tmp_path, cache=cache_on(tmp_path), max_steps=12)
    assert len(opened) == 1 + 2 * 3 + 4, "read for what is never read, the halves and the proof of the step"


@pytest.mark.parametrize("length", [{"max_steps": 12}, {"max_steps": -1, "max_epochs": 2}])
def test_the_tower_runs_once_per_row(length: dict[str, int], family: Family, data: Data, tmp_path: Path) -> None:
    """Also where Lightning makes the loader early, to count the steps of an epoch."""
    seen: list[int] = []

    def count(module: MMModule) -> None:
        mlp = module.model.get_submodule(str(module.mm.layout.blocks[1].mlp))
        mlp.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))

    unpacked = Compute(packing=False)
    train_losses(family("llava"), data, tmp_path, cache=cache_on(tmp_path), compute=unpacked, on_start=count, **length)
    assert sum(seen) == 12, "two epochs of 12 rows, of which only the first runs what is below block 2"


def test_a_full_cache_trains_on_half_of_the_rows_known(family: Family, data: Data, tmp_path: Path) -> None:
    plain, _ = train_losses(family("llava"), data, tmp_path)
    size = sum(f.stat().st_size for f in _filled(family, data, tmp_path / "whole"))
    limit = 0.6 * size / 2**30
    for _ in range(2):
        kept, _ = train_losses(family("llava"), data, tmp_path, cache=cache_on(tmp_path, limit=limit))
        assert kept == pytest.approx(plain, rel=1e-5)
    held = sum(f.stat().st_size for f in (tmp_path / "kept").rglob("*") if f.is_file() and f.suffix != ".json")
    assert 0 < held <= limit * 2**30


def _filled(family: Family, data: Data, folder: Path) -> list[Path]:
    train_losses(family("llava"), data, folder, cache=cache_on(folder), max_steps=6)
    return [f for f in (folder / "kept").rglob("*") if f.is_file() and f.suffix != ".json"]


def test_killed_and_resumed_equals_uninterrupted(family: Family, data: Data, tmp_path: Path) -> None:
    """Bit for bit, in the middle of the epoch that fills the cache."""
    model, folder = family("llava"), tmp_path
    whole, weights = train_losses(model, data, folder, tuning=DROPOUT, cache=cache_on(folder / "a"))
    checkpoint = folder / "killed.ckpt"
    with pytest.raises(SystemExit):
        train(
            model,
            data,
            folder,
            tuning=DROPOUT,
            callbacks=[SaveAt(4, checkpoint)],
            max_steps=12,
            cache=cache_on(folder / "b"),
        )
    rest, resumed = train_losses(
        model, data, folder, tuning=DROPOUT, cache=cache_on(folder / "b"), ckpt_path=checkpoint
    )
    for name, value in weights.items():
        assert torch.equal(resumed[name], value), name
    assert rest == {step: loss for step, loss in whole.items() if step > 4}


def test_workers_read_what_is_kept(family: Family, data: Data, tmp_path: Path) -> None:
    plain, _ = train_losses(family("llava"), data, tmp_path)
    for _ in range(2):
        kept, _ = train_losses(family("llava"), data, tmp_path, cache=cache_on(tmp_path), num_workers=2)
        assert kept == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "tuning", "why"),
    [
        ("qwen3_vl", IntermediateOnly(layers="1"), "differs by"),  # deepstack: pictures are added behind block 1, too
        ("mllama", IntermediateOnly(layers="1"), "is lost"),  # block 1 attends to pictures
    ],
)
def test_where_it_would_be_wrong_it_is_refused(
    name: str, tuning: TuningPolicy, why: str, family: Family, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=why):
        train_losses(family(name), data, tmp_path, tuning=tuning, cache=cache_on(tmp_path))
    plain, _ = train_losses(family(name), data, tmp_path, tuning=tuning, max_steps=8)
    auto, _ = train_losses(family(name), data, tmp_path, tuning=tuning, max_steps=8, cache=CacheSettings())
    assert auto == plain
    assert any(each.name == "model.cache" and each.value == "off" and why in each.reason for each in decision_log())


def test_other_weights_are_another_prefix(family: Family, data: Data, tmp_path: Path) -> None:
    """A prefix that was trained meanwhile finds nothing; one that differs above the boundary finds everything."""
    for layer in (0, 3):
        model = tmp_path / f"changed{layer}"
        shutil.copytree(family("llava"), model)
        weights = load_file(model / "model.safetensors")
        name = next(n for n in weights if f"layers.{layer}.mlp.down" in n)
        weights[name][0, 0] += 1.0
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        train_losses(model, data, tmp_path, cache=cache_on(tmp_path), max_steps=2)
    train_losses(family("llava"), data, tmp_path, cache=cache_on(tmp_path), max_steps=2)
    assert len(list((tmp_path / "kept").glob("*/identity.json"))) == 2


def test_what_is_read_of_the_tower_is_part_of_the_prefix(family: Family, data: Data, tmp_path: Path) -> None:
    """The same weights, another config: no weight tells which features are read."""
    for layer in (-2, -1):
        model = tmp_path / f"reads{layer}"
        shutil.copytree(family("llava"), model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "vision_feature_layer": layer}))
        plain, _ = train_losses(model, data, tmp_path, max_steps=3)
        kept, _ = train_losses(model, data, tmp_path, cache=cache_on(tmp_path), max_steps=3)
        assert kept == pytest.approx(plain, rel=1e-5)
    assert len(list((tmp_path / "kept").glob("*/identity.json"))) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_states_are_used_as_they_come_back(dtype: Any, family: Family, tmp_path: Path) -> None:
    """Bit for bit, and what was told of a row when it was new is told again."""
    model, processing = load_model(Backbone(path=str(family("llava")))), load_processor(str(family("llava")))
    layout, samples = ModelLayout.of(model.eval()), read_conversations(make_uneven_rows(tmp_path)).samples
    store = RecordStore.open(tmp_path / "kept", {}, limit_bytes=2**30, dtype=dtype)
    cache = PrefixCache(FrozenPrefix(MultimodalModel(model, layout), 2), store, dtype, torch.float32)
    cache.prefix.width = int(model.config.get_text_config().hidden_size)
    collator = cache.collator(Collator(processing, max_length=64))
    new = collator(samples)
    assert new.cached is not None
    assert len(new.cached.uncached) == len(samples)
    used = cache.states(new.cached)
    known = collator(samples)
    assert known.cached is not None
    assert not known.cached.uncached
    for b in range(len(samples)):
        tokens = int((new.regions[b] != 0).sum())
        assert torch.equal(used[b, :tokens], known.cached.states[b, :tokens])
    assert [each.reason for each in new.rejected] == [each.reason for each in known.rejected]
    assert any(each.kind == "cut" for each in known.rejected)


def test_one_epoch_keeps_nothing_unless_asked(family: Family, data: Data, tmp_path: Path) -> None:
    auto = CacheSettings(folder=str(tmp_path / "kept"))
    train_losses(family("llava"), data, tmp_path, cache=auto, max_steps=6)
    assert not list((tmp_path / "kept").rglob("*.shard"))
    assert any("seen 1.0 times" in each.reason for each in decision_log())


def test_ranges_are_checked() -> None:
    with pytest.raises(UserError, match="out of range"):
        CacheSettings(limit=0)


def test_auto_stays_with_what_the_run_began_with(family: Family, data: Data, tmp_path: Path) -> None:
    """One epoch, cached only where something is kept: another run fills the cache meanwhile, or removes it."""
    model, auto = family("llava"), CacheSettings(folder=str(tmp_path / "kept"))
    for began_with_one in (False, True):
        checkpoint = tmp_path / f"{began_with_one}.ckpt"
        with pytest.raises(SystemExit):
            train(model, data, tmp_path, tuning=MIDDLE, cache=auto, max_steps=3, callbacks=[SaveAt(1, checkpoint)])
        if began_with_one:
            shutil.rmtree(tmp_path / "kept")
        else:
            train(model, data, tmp_path, tuning=MIDDLE, cache=cache_on(tmp_path), max_steps=1)
        module, _ = train(model, data, tmp_path, tuning=MIDDLE, cache=auto, max_steps=3, ckpt_path=checkpoint)
        assert module._cached is began_with_one
    assert any("began without one" in each.reason for each in decision_log())
