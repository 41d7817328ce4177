"""Training on kept vision features is training: equal losses and weights, and refused where it would not be."""

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data import images
from lightning_mm.data.batch import CachedFeatures
from lightning_mm.data.collator import Collator
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.execution import step
from lightning_mm.execution.cache.activation_cache import CacheSettings
from lightning_mm.execution.cache.collators import CachedVisionCollator
from lightning_mm.execution.cache.fingerprint import tower_digest
from lightning_mm.execution.cache.store import RecordStore
from lightning_mm.execution.cache.vision_features import split_verified_tower
from lightning_mm.execution.vision_truncation import truncate_tower
from lightning_mm.models.layout import Region
from lightning_mm.models.loading import Backbone
from lightning_mm.models.processor import load_processor
from lightning_mm.planning.cost_estimate import MetaModel, RunSettings, estimate_cost
from lightning_mm.planning.devices import DEVICES
from lightning_mm.training.callbacks.step_cost import BatchCounter
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import ConnectorOnly, Full, IntermediateOnly, LoRA, LoRAOnMiddle, TuningPolicy
from lightning_mm.tuning.apply import prepare_model
from tests.helpers.data import Data, Family
from tests.helpers.feature_layers import concatenating, convolutional
from tests.helpers.training import SaveAt, cache_on, train, train_losses

FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "idefics3",
    "smolvlm",
    "internvl",
    "gemma3",
    "vipllava",
    "llava_of_two_states",
    "qwen3_vl",
    "mllama",
)
"""The last four read several blocks: by a list of feature layers, and by models of their own."""
CONNECTOR = ConnectorOnly()
WITH_CONNECTOR = IntermediateOnly(layers="1-2", connector="full")


@pytest.fixture(scope="module")
def family(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Also LLaVAs that concatenate states of a tower of three blocks: of the first two, or of none and the second; and
    one whose tower is of convolutions."""
    states = {"llava_of_two_states": [1, 2], "llava_of_embedding": [0, 2]}

    @cache
    def made(name: str) -> Path:
        if name == "fast_vlm":
            return convolutional(family("llava"), tmp_path_factory.mktemp("convolutions") / name)
        return (
            concatenating(family("llava"), states[name], tmp_path_factory.mktemp("states") / name)
            if name in states
            else family(name)
        )

    return made


def test_what_is_cached_is_what_the_connector_gets(family: Family, data: Data) -> None:
    """Bit for bit transformers' own hidden states, and only they are computed: the third block is not."""
    model = family("llava_of_two_states")
    collator = Collator(load_processor(str(model)))
    batch = collator([s for s in read_conversations(data["train"]).samples if s.images][:3])
    grey = collator.collate_valid(batch.samples, [], blank_images=True)
    mm, _ = prepare_model(Backbone(path=str(model)), CONNECTOR)
    mm.model.eval()
    with torch.no_grad():
        hidden = mm.model.model.vision_tower(batch.inputs["pixel_values"], output_hidden_states=True).hidden_states
        logits = mm.model(**batch.inputs).logits
    unread = truncate_tower(mm, batch, ExitStack())
    assert unread == mm.layout.vision_blocks[2:]
    tower = split_verified_tower(mm, unread, batch, collator)
    assert tower.read == mm.layout.vision_blocks[:2]
    states = [tower.states(collator([sample])) for sample in batch.samples]
    for known, first, second in zip(states, hidden[1], hidden[2], strict=True):
        assert known is not None
        assert torch.equal(known[0], torch.stack([first, second], -2))
    assert grey is not None
    with torch.no_grad(), tower.starting_from(states):
        assert torch.equal(mm.model(**grey.inputs).logits, logits)


@pytest.mark.parametrize("name", [*FAMILIES, "fast_vlm"])
def test_losses_are_those_without_a_cache(name: str, family: Family, data: Data, tmp_path: Path) -> None:
    """12 rows in batches of 2, two epochs: the second one, and the second run, read what the first wrote.

    1e-5: float32 sums in another order, since rows stand alone when their features are computed.
    """
    plain, weights = train_losses(family(name), data, tmp_path, tuning=CONNECTOR)
    for _ in range(2):
        kept, learned = train_losses(family(name), data, tmp_path, tuning=CONNECTOR, cache=cache_on(tmp_path))
        assert kept == pytest.approx(plain, rel=1e-5)
        for key, value in weights.items():
            torch.testing.assert_close(learned[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "tuning",
    [WITH_CONNECTOR, Full(vision="frozen"), LoRAOnMiddle(layers="1-2", lora=LoRA(r=2), connector="lora")],
    ids=["middle", "full", "lora"],
)
def test_any_policy_with_a_frozen_tower(tuning: TuningPolicy, family: Family, data: Data, tmp_path: Path) -> None:
    plain, _ = train_losses(family("qwen2_5_vl"), data, tmp_path, tuning=tuning, max_steps=8)
    for _ in range(2):
        kept, _ = train_losses(
            family("qwen2_5_vl"), data, tmp_path, tuning=tuning, max_steps=8, cache=cache_on(tmp_path)
        )
        assert kept == pytest.approx(plain, rel=1e-5)
    assert len(list((tmp_path / "kept").glob("*/identity.json"))) == 1, "both runs read one tower"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_it_makes_no_difference_whether_a_row_is_known(dtype: Any, family: Family, data: Data, tmp_path: Path) -> None:
    """Bit for bit: rows are rounded before they are used for the first time, and alone whenever they are computed."""
    cold, _ = train_losses(family("llava"), data, tmp_path, tuning=CONNECTOR, cache=cache_on(tmp_path, dtype=dtype))
    warm, _ = train_losses(family("llava"), data, tmp_path, tuning=CONNECTOR, cache=cache_on(tmp_path, dtype=dtype))
    assert warm == cold


def test_the_tower_runs_once_per_picture_and_known_pictures_are_not_decoded(
    family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    decoded: list[Path] = []
    load = images.load

    def count(module: MMModule) -> None:
        block = module.model.get_submodule(module.mm.layout.vision_blocks[0])
        block.mlp.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))

    def counted(path: Path, *args: Any) -> Any:
        decoded.append(path)
        return load(path, *args)

    train_losses(family("llava"), data, tmp_path, tuning=CONNECTOR, cache=cache_on(tmp_path), on_start=count)
    pictures = {image.read_bytes() for s in read_conversations(data["train"]).samples for image in s.images}
    assert sum(seen) == len(pictures) < 12, "two epochs of 12 rows; equal pictures are looked at once"
    monkeypatch.setattr(images, "load", counted)
    seen.clear()
    train_losses(family("llava"), data, tmp_path, tuning=CONNECTOR, cache=cache_on(tmp_path), on_start=count)
    assert not seen
    assert len(decoded) == 2 + 2 * 3 + 4, "read for the proofs of the tower, its halves and the step"


def test_killed_and_resumed_equals_uninterrupted(family: Family, data: Data, tmp_path: Path) -> None:
    """Bit for bit, in the middle of the epoch that fills the cache."""
    model, folder = family("llava"), tmp_path
    whole, weights = train_losses(model, data, folder, tuning=WITH_CONNECTOR, cache=cache_on(folder / "a"))
    checkpoint = folder / "killed.ckpt"
    with pytest.raises(SystemExit):
        train(
            model,
            data,
            folder,
            tuning=WITH_CONNECTOR,
            callbacks=[SaveAt(4, checkpoint)],
            max_steps=12,
            cache=cache_on(folder / "b"),
        )
    rest, resumed = train_losses(
        model, data, folder, tuning=WITH_CONNECTOR, cache=cache_on(folder / "b"), ckpt_path=checkpoint, num_workers=2
    )
    for name, value in weights.items():
        assert torch.equal(resumed[name], value), name
    assert rest == {step: loss for step, loss in whole.items() if step > 4}


@pytest.mark.parametrize(
    ("name", "tuning", "why"),
    [
        ("llava", Full(vision="full"), "Vision, connector, embedding trained"),
        ("llava_of_embedding", CONNECTOR, "is lost"),  # what enters the first block is no block's output
    ],
)
def test_where_it_would_be_wrong_it_is_refused(
    name: str, tuning: TuningPolicy, why: str, family: Family, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=why):
        train_losses(family(name), data, tmp_path, tuning=tuning, cache=cache_on(tmp_path))
    plain, _ = train_losses(family(name), data, tmp_path, tuning=tuning, max_steps=4)
    auto, _ = train_losses(family(name), data, tmp_path, tuning=tuning, max_steps=4, cache=CacheSettings())
    assert auto == plain


def test_only_the_tower_tells_towers_apart(family: Family) -> None:
    """What trains is no part of the name, adapters neither; every weight of the tower is."""
    backbone = Backbone(path=str(family("llava")))
    adapted, _ = prepare_model(backbone, LoRAOnMiddle(layers="1-2", lora=LoRA(r=2), connector="lora"))
    first = tower_digest(adapted)
    plain, _ = prepare_model(backbone, Full(vision="frozen"))
    assert tower_digest(plain) == first
    with torch.no_grad():
        for name in plain.layout.locations:
            if "vision_tower" not in name:
                plain.model.get_parameter(name).add_(1.0)
        assert tower_digest(plain) == first
        for name in plain.layout.locations:
            if "vision_tower" in name:
                before = tower_digest(plain)
                plain.model.get_parameter(name).view(-1)[0] += 1.0
                assert tower_digest(plain) != before, name


def test_a_small_tower_is_kept_on_request_only(
    family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the tiny LLaVA is; a limit below it makes it a large one."""
    auto = CacheSettings(folder=str(tmp_path / "kept"))
    train_losses(family("llava"), data, tmp_path, tuning=CONNECTOR, cache=auto)
    assert any(each.value == "off" and "of a forward pass" in each.reason for each in decision_log())
    assert not (tmp_path / "kept").exists()
    monkeypatch.setattr(step, "_MIN_TOWER_SHARE", 0.01)
    train_losses(family("llava"), data, tmp_path, tuning=CONNECTOR, cache=auto)
    assert any(each.name == "model.cache" and each.value.startswith("vision features") for each in decision_log())
    assert list((tmp_path / "kept").rglob("*.shard"))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_kept_and_saved_is_foretold(name: str, family: Family, data: Data) -> None:
    """Bytes of the features as they are made, and the tower's FLOPs, from the plan that runs nothing."""
    processing = load_processor(str(family(name)))
    collator = Collator(processing)
    batch = collator([s for s in read_conversations(data["train"]).samples if s.images][:2])
    mm, _ = prepare_model(Backbone(path=str(family(name))), CONNECTOR)
    mm.model.eval()
    tower = split_verified_tower(mm, truncate_tower(mm, batch, ExitStack()), batch, collator)
    rows = [collator([sample]) for sample in batch.samples]
    made = [states.nbytes for row in rows if (states := tower.states(row)) is not None]
    blueprint = MetaModel(Backbone(path=str(family(name))), batch)
    told = estimate_cost(blueprint, CONNECTOR, [batch], RunSettings(), DEVICES["h200"])
    assert told.record == sum(made) / len(batch)
    assert told.cached is not None
    assert told.run - told.cached == pytest.approx(told.flops.region(Region.VISION).total)


def test_under_autocast_sums_are_coarser(family: Family, data: Data, tmp_path: Path) -> None:
    """1e-2: features are rounded to bfloat16 once more, where they are kept."""
    plain, _ = train_losses(family("internvl"), data, tmp_path, tuning=CONNECTOR, precision="bf16-mixed", max_steps=8)
    for _ in range(2):
        kept, _ = train_losses(
            family("internvl"),
            data,
            tmp_path,
            tuning=CONNECTOR,
            precision="bf16-mixed",
            max_steps=8,
            cache=cache_on(tmp_path),
        )
        assert kept == pytest.approx(plain, rel=1e-2)


def test_what_trains_may_draw(family: Family, data: Data, tmp_path: Path) -> None:
    """Bit for bit, with dropout behind the tower: new rows leave no trace in the generators."""
    tuning = LoRAOnMiddle(layers="1-2", lora=LoRA(r=2, dropout=0.3), connector="lora")
    cold, _ = train_losses(family("llava"), data, tmp_path, tuning=tuning, cache=cache_on(tmp_path))
    warm, _ = train_losses(family("llava"), data, tmp_path, tuning=tuning, cache=cache_on(tmp_path))
    assert warm == cold


def test_rows_without_pictures_and_twins(family: Family, rows: Any, tmp_path: Path) -> None:
    """Batches with a picture in every row, in some, and in none; a conversation that stands in the file twice."""
    folder = tmp_path / "data"
    made = [*rows(folder, 3), *rows(folder, 4, seed=1, text_only=True)]
    file = folder / "mixed.json"
    file.write_text(json.dumps([*made, made[0]]))
    mixed = {"train": file}
    for name in ("llava", "qwen2_5_vl"):
        options: dict[str, Any] = {"tuning": CONNECTOR, "max_steps": 12, "batch_size": 2}
        plain, _ = train_losses(family(name), mixed, tmp_path, **options)
        for _ in range(2):
            kept, _ = train_losses(family(name), mixed, tmp_path, **options, cache=cache_on(tmp_path))
            assert kept == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_nothing_falls_out_silently(known: bool, family: Family, rows: Any, tmp_path: Path) -> None:
    """One picture is damaged, one too long row is cut, twice; a grey row that the processor refuses is told of, too."""
    made = rows(tmp_path, 3)
    (tmp_path / made[1]["image"]).write_bytes(b"no picture")
    made[2]["conversations"][1]["value"] = "very " * 200
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([*made, made[2]]))
    samples = read_conversations(file).samples
    store = RecordStore.open(tmp_path / "kept", {}, limit_bytes=2**30, dtype="float32")
    plain = Collator(load_processor(str(family("llava"))), max_length=80)
    collator = CachedVisionCollator(plain, store, torch.float32)
    if known:
        first = collator(samples).cached
        assert isinstance(first, CachedFeatures)
        for key, record in zip(first.keys, first.records, strict=True):
            store.put(key, {**record, "hidden": torch.zeros(1, 2, 3)})
    batch = collator(samples)
    told, expected = (sorted((r.origin, r.reason, r.kind) for r in b.rejected) for b in (batch, plain(samples)))
    assert told == expected
    assert {reason for origin, reason, kind in told if kind == "cut" and origin.endswith(("[2]", "[3]"))}
    with pytest.MonkeyPatch.context() as patch:
        header = images.check_header
        bad = str(samples[0].images[0])

        def check(path: Path, limit: float) -> tuple[int, int]:
            if str(path) == bad:
                raise images.BadImage(path, "gone")
            return header(path, limit)

        patch.setattr(images, "check_header", check)
        assert any("gone" in each.reason for each in collator(samples).rejected)


def test_one_row_does_not_show_how_rows_stand_side_by_side(family: Family, rows: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    file = folder / "one.json"
    made = [*rows(folder, 1), *rows(folder, 3, seed=1, text_only=True)]
    file.write_text(json.dumps(made))
    with pytest.raises(UserError, match="One row with pictures"):
        train_losses(
            family("llava"), {"train": file}, tmp_path, tuning=CONNECTOR, cache=cache_on(tmp_path), max_steps=2
        )


def test_the_tower_counts_for_new_rows_only(family: Family, data: Data, tmp_path: Path) -> None:
    collator = Collator(load_processor(str(family("llava"))))
    samples = read_conversations(data["train"]).samples[:2]
    whole, rows = collator(samples), [collator([sample]) for sample in samples]
    done = []
    for kept in (None, CachedFeatures((None, None), (0, 1), tuple(rows)), CachedFeatures((torch.zeros(1),) * 2)):
        work = BatchCounter()
        work.add(replace(whole, cached=kept))
        done.append(work.take())
    plain, new, known = done
    assert new == plain
    assert known.shape.pixels == 0 < plain.shape.pixels
    assert replace(known.shape, pixels=plain.shape.pixels) == plain.shape
