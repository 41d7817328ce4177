"""Probe sets: the hash knows every change, a saved set is the same set, a part of one tears nothing apart."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.data.probe_sets.probe_set import ObjectBox, ProbeBatch, ProbeRow, ProbeSet, Role
from lightning_mm.data.sample import Sample, Turn


def probe_row(name: str, image: Path | None, *, group: str = "", role: Role = "picture", **others: Any) -> ProbeRow:
    turn = Turn("user", "<image>\nWhat is it?" if image else "A cat.\nWhat is it?")
    made = ProbeRow(
        name, group or name, role, Sample(name, (turn,), (image,) if image else (), name), "What is it?", {}
    )
    return replace(made, **others)


@pytest.fixture
def probe_set(tmp_path: Path) -> ProbeSet:
    """Six pictures; the entailment rows of the first two, and of the next two, hang together."""
    rows = []
    for i in range(6):
        image = tmp_path / f"{i}.png"
        Image.new("RGB", (20, 16 + i), (40 * i, 9, 9)).save(image)
        box = ObjectBox("cat", (1.0, 2.0, 5.5, 7.0))
        labels = {"objects": (1, 0), "count": i % 2}
        rows.append(probe_row(f"{i}:picture", image, group=str(i), labels=labels, boxes=(box,)))
        rows.append(probe_row(f"{i}:text", None, group=str(i), role="text"))
        if i < 4:
            rows.append(probe_row(f"{i}:true", image, group="0+1" if i < 2 else "2+3", role="entailment"))
    rows = [replace(row, labels={"entailment/hard": 1}) if row.role == "entailment" else row for row in rows]
    return ProbeSet(
        tuple(rows), {"objects": ("cat", "dog"), "count": ("1", "2"), "entailment/hard": ("no", "yes")}, 0, "t"
    )


def test_a_saved_set_is_the_same_set(probe_set: ProbeSet, tmp_path: Path) -> None:
    probe_set.save(tmp_path / "set.json")
    again = ProbeSet.load(tmp_path / "set.json")
    assert again.hash == probe_set.hash
    assert (again.classes, again.seed, again.source) == (probe_set.classes, 0, "t")
    assert [row.to_dict() for row in again.rows] == [row.to_dict() for row in probe_set.rows]
    assert [row.sample.images for row in again.rows] == [row.sample.images for row in probe_set.rows]
    assert again.rows[0].boxes == probe_set.rows[0].boxes
    assert again.rows[0].labels == {"objects": (1, 0), "count": 0}
    assert not list(tmp_path.glob("*.new"))


def test_the_order_of_rows_does_not_matter_to_the_hash(probe_set: ProbeSet) -> None:
    rows = list(probe_set.rows)
    random.Random(1).shuffle(rows)
    assert replace(probe_set, rows=tuple(rows)).hash == probe_set.hash


CHANGES: dict[str, Callable[[ProbeRow], ProbeRow]] = {
    "id": lambda row: replace(row, id="other"),
    "group": lambda row: replace(row, group="other"),
    "text": lambda row: replace(row, sample=replace(row.sample, turns=(Turn("user", "<image>\nOh! What is it?"),))),
    "span": lambda row: replace(row, span="What"),
    "label": lambda row: replace(row, labels={"objects": (1, 1), "count": 0}),
    "box": lambda row: replace(row, boxes=(ObjectBox("cat", (1.0, 2.0, 5.5, 7.1)),)),
    "blank": lambda row: replace(row, blank=True),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_hash_knows_a_change_of(what: str, probe_set: ProbeSet) -> None:
    first, *rest = probe_set.rows
    assert replace(probe_set, rows=(CHANGES[what](first), *rest)).hash != probe_set.hash


def test_the_hash_knows_pixels_and_classes(probe_set: ProbeSet, tmp_path: Path) -> None:
    before = probe_set.hash
    assert replace(probe_set, classes={**probe_set.classes, "objects": ("dog", "cat")}).hash != before
    probe_set.save(tmp_path / "set.json")
    Image.new("RGB", (20, 16), (1, 9, 9)).save(tmp_path / "0.png")
    assert replace(probe_set).hash != before
    with pytest.raises(UserError, match="is not the probe set that was saved"):
        ProbeSet.load(tmp_path / "set.json")


def spoilt(told: dict[str, Any], how: str) -> str:
    if how == "format":
        told["format"] = "another"
    elif how == "picture":
        told["rows"][0]["images"] = ["gone.png"]
    elif how == "outside":
        told["rows"][0]["images"] = ["../../../../../../../etc/hostname"]
    elif how == "role":
        told["rows"][0]["role"] = "judge"
    elif how == "rows":
        del told["rows"]
    return "{" if how == "json" else json.dumps(told)


@pytest.mark.parametrize("how", ["format", "picture", "outside", "role", "rows", "json"])
def test_a_spoilt_file_is_told(how: str, probe_set: ProbeSet, tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    probe_set.save(path)
    path.write_text(spoilt(json.loads(path.read_text()), how))
    with pytest.raises(UserError, match="cannot be read as a probe set"):
        ProbeSet.load(path)


@pytest.mark.parametrize("max_pictures", [2, 3, 4, 5, 6, 9])
def test_a_subset_keeps_what_hangs_together(probe_set: ProbeSet, max_pictures: int) -> None:
    part = probe_set.subset(max_pictures)
    kept = {int(path.stem) for path in part.images}
    assert len(kept) == min(6, max_pictures), "two pairs and two single ones fill any number"
    assert len(kept & {0, 1}) != 1
    assert len(kept & {2, 3}) != 1
    assert {row.id for row in part.rows} == {row.id for row in probe_set.rows if int(row.id[0]) in kept}
    assert part.subset(max_pictures).hash == part.hash


@given(st.permutations(range(6)), st.integers(2, 5))
def test_a_subset_does_not_depend_on_the_order_of_rows(order: list[int], most: int) -> None:
    rows = tuple(probe_row(f"{i}:picture", Path(f"{i}.png"), group=f"{i // 2}") for i in range(6))
    whole = ProbeSet(rows, {}, 3, "t")
    shuffled = ProbeSet(tuple(rows[i] for i in order), {}, 3, "t")
    assert {row.id for row in shuffled.subset(most).rows} == {row.id for row in whole.subset(most).rows}


def test_a_group_that_is_larger_than_any_subset_is_told() -> None:
    rows = tuple(probe_row(f"{i}:picture", Path(f"{i}.png"), group="clip") for i in range(6))
    with pytest.raises(UserError, match=r"No part of the probe set fits into 4 pictures(.|\n)*probe_images 6"):
        ProbeSet(rows, {}, 3, "t").subset(4)


def test_without_pictures(probe_set: ProbeSet) -> None:
    blind = probe_set.without_pictures()
    assert [row.id for row in blind.rows] == [f"{i}:true" for i in range(4)]
    assert all(row.blank for row in blind.rows)
    assert not any(row.blank for row in probe_set.rows)
    assert blind.hash != replace(probe_set, rows=tuple(r for r in probe_set.rows if r.role == "entailment")).hash


def test_summary(probe_set: ProbeSet) -> None:
    assert probe_set.summary() == {
        "hash": probe_set.hash,
        "seed": 0,
        "source": "t",
        "rows": 16,
        "images": 6,
        "tasks": {
            "objects": {"rows": 6, "images": 6},
            "count": {"rows": 6, "images": 6},
            "entailment/hard": {"rows": 4, "images": 4},
            "pairs": {"rows": 12, "images": 6},
        },
    }
    json.dumps(probe_set.summary())
    one_clip = replace(probe_set, rows=tuple(replace(row, group="clip") for row in probe_set.rows))
    assert one_clip.summary()["tasks"] == probe_set.summary()["tasks"]
    only = replace(one_clip, rows=tuple(row for row in one_clip.rows if row.id != "5:text"))
    assert only.summary()["tasks"]["pairs"] == {"rows": 10, "images": 5}, "a group is no pair"


def test_a_batch_moves_as_a_whole() -> None:
    batch = ProbeBatch({"input_ids": torch.zeros(1, 2)}, torch.ones(1, 1, 2), (("last",),), ())
    moved = batch.to("meta")
    assert {moved.inputs["input_ids"].device.type, moved.weights.device.type} == {"meta"}
    assert (len(batch), moved.sites) == (0, batch.sites)


def test_spans_that_cannot_be_found_and_ids_twice_are_our_own_mistakes(tmp_path: Path) -> None:
    row = probe_row("a", None)
    with pytest.raises(AssertionError, match="to be found"):
        replace(row, span="dog")
    with pytest.raises(AssertionError, match="to be found"):
        replace(row, span="a")  # twice
    with pytest.raises(AssertionError, match="unique"):
        ProbeSet((row, row), {}, 0, "t")
