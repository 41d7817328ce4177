"""From the datamodule's options to probe batches: one set for all ranks, each row on one of them."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data import dataloader
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.probe_sets.probe_set import ProbeBatch, ProbeSet

NUM_PICTURES = 24
Make = Callable[..., MMDataModule]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows, talks = [], []
    for i in range(NUM_PICTURES):
        Image.linear_gradient("L").resize((40, 30 + i)).convert("RGB").save(tmp_path / f"{i}.png")
        name = ("cat", "dog", "owl")[i % 3]
        box = {"name": name, "box": [(i % 2) * 20, 0, 20 + (i % 2) * 20, 30]}
        rows.append({"id": i, "image": f"{i}.png", "caption": f"a {name} on day {i}", "objects": [box]})
        said = [
            {"from": "human", "value": "<image>\nDescribe the picture."},
            {"from": "gpt", "value": f"A {name} in {i}."},
        ]
        talks.append({"id": f"v{i}", "image": f"{i}.png", "conversations": said})
    (tmp_path / "probes.json").write_text(json.dumps(rows))
    (tmp_path / "val.json").write_text(json.dumps(talks))
    return tmp_path


@pytest.fixture
def module(folder: Path, family: Callable[[str], Path]) -> Make:
    def make(**options: Any) -> MMDataModule:
        usual = {"probes": str(folder / "probes.json"), "num_workers": 0, "eval_batch_size": 8}
        return MMDataModule(processor=str(family("llava")), **{**usual, **options})

    return make


def test_a_set_is_drawn_once_and_the_same_everywhere(module: Make) -> None:
    data = module()
    drawn = data.probe_set()
    assert data.probe_set() is drawn
    assert len(drawn.images) == NUM_PICTURES
    assert drawn.summary()["tasks"].keys() == {
        "entailment/random", "entailment/hard", "objects", "object_at_patches", "position", "pairs",
    }  # fmt: skip
    assert module(seed=5, batch_size=2).probe_set().hash == drawn.hash, "the order of training has no say in it"
    assert drawn.seed == 0


def test_options_of_the_draw(module: Make) -> None:
    drawn = module(probe_images=8, probe_prompt='"{caption}"?').probe_set()
    assert len(drawn.images) == 8
    asked = [row for row in drawn.rows if row.role == "entailment"]
    assert asked
    assert all(row.text == f'<image>\n"{row.span}"?' for row in asked)
    with pytest.raises(UserError, match=r"data\.probe_prompt"):
        module(probe_prompt="Really?").probe_set()
    with pytest.raises(UserError, match=r"data\.probe_images is 1"):
        module(probe_images=1)


def test_validation_data_serve_where_no_probes_are_given(module: Make, folder: Path) -> None:
    decision_log().clear()
    data = module(probes=None, val=str(folder / "val.json"))
    drawn = data.probe_set()
    assert {row.span for row in drawn.rows if row.role == "text"} == {
        f"A {('cat', 'dog', 'owl')[i % 3]} in {i}" for i in range(NUM_PICTURES)
    }
    assert "data.probes" in {decision.name for decision in decision_log()}
    with pytest.raises(UserError, match="nothing to look inside"):
        module(probes=None).probe_set()
    assert not data.rejected_samples


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_row_is_on_one_rank(world_size: int, module: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Counter[str] = Counter()
    for rank in range(world_size):
        monkeypatch.setattr(dataloader, "rank_and_world_size", lambda rank=rank: (rank, world_size))
        data = module()
        batches: list[ProbeBatch] = list(data.probe_loader(data.probe_set()))
        found.update(row.id for batch in batches for row in batch.rows)
    assert found == Counter(row.id for row in module().probe_set().rows)


def test_rows_of_like_length_share_a_batch(module: Make) -> None:
    data = module()
    batches: list[ProbeBatch] = list(data.probe_loader(data.probe_set()))
    masks = [batch.inputs["attention_mask"] for batch in batches]
    padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding < 0.1
    assert len(batches) == -(-len(data.probe_set()) // 8)


def test_blind_rows_load_too(module: Make) -> None:
    data = module()
    seen = {row.id: b for b in data.probe_loader(data.probe_set()) for row in b.rows}
    blind = data.probe_set().without_pictures()
    for batch in data.probe_loader(blind):
        pixels = batch.inputs["pixel_values"].flatten(2)
        assert torch.equal(pixels, pixels[..., :1].expand_as(pixels))
        assert all(row.id in seen for row in batch.rows)


def test_a_saved_set_loads_in_workers(module: Make, folder: Path) -> None:
    drawn = module().probe_set()
    drawn.save(folder / "set.json")
    data = module(probes=str(folder / "set.json"), num_workers=2)
    assert data.probe_set().hash == drawn.hash == ProbeSet.load(folder / "set.json").hash
    here, there = (list(d.probe_loader(d.probe_set())) for d in (module(), data))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.weights, other.weights)
        assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs)


def test_what_falls_out_is_in_the_ledger(module: Make, folder: Path) -> None:
    (folder / "3.png").unlink()
    (folder / "4.png").write_bytes(b"")
    data = module(max_bad_fraction=0.5)
    assert len(data.probe_set().images) == NUM_PICTURES - 2
    assert set(data.rejected_samples.counts()) == {"missing image", "not an image"}
    with pytest.raises(UserError, match=r"2 of 24 rows of data\.probes cannot be used"):
        module().probe_set()


def test_looking_draws_nothing_from_the_global_generators(module: Make) -> None:
    before = torch.random.get_rng_state()
    data = module()
    list(data.probe_loader(data.probe_set()))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_options_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(MMDataModule, "data")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    for option in ("probes", "probe_images", "probe_prompt"):
        assert f"--data.{option} " in text
    assert "Pictures to look inside the model with" in text
