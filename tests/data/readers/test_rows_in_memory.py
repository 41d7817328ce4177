"""Rows and datasets of a Python program are read as files with the same rows are."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.images import load
from lightning_mm.data.readers.rows import in_cache
from lightning_mm.data.sample import Sample

Read = Callable[..., list[Sample]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def make(train: Any, **options: Any) -> list[Sample]:
        data = MMDataModule(train=train, cache_dir=str(tmp_path / "cache"), **options)
        return [replace(sample, id="", origin="", source="", extra={}) for sample in data.samples("train")]

    return make


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    for index in range(3):
        Image.linear_gradient("L").resize((30 + index, 40)).save(tmp_path / f"{index}.png")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    return [{"image": f"{index}.png", "conversations": said} for index in range(3)]


def test_rows(rows: list[dict[str, Any]], read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.json").write_text(json.dumps(rows))
    expected = read(str(tmp_path / "t.json"))
    assert len(expected) == 3
    assert read(rows, image_root=str(tmp_path)) == expected
    monkeypatch.chdir(tmp_path)
    assert read(rows) == expected
    assert read(tuple(rows)) == expected
    assert read([str(tmp_path / "t.json")]) == expected
    assert read(tmp_path / "t.json") == expected


def test_a_dataset_with_pictures(rows: list[dict[str, Any]], read: Read, tmp_path: Path) -> None:
    pictures = [Image.open(tmp_path / row["image"]) for row in rows]
    made = [{"image": picture, "question": "What?", "answer": "That."} for picture in pictures]
    found = read(datasets.Dataset.from_list(made))
    assert [sample.turns[1].text for sample in found] == ["That."] * 3
    for sample, picture in zip(found, pictures, strict=True):
        assert load(sample.images[0]).image.tobytes() == picture.convert("RGB").tobytes()
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(made), test=datasets.Dataset.from_list(made[:1]))
    assert len(read(both)) == 3


def test_rows_with_pictures_in_memory(read: Read) -> None:
    """As TRL's examples have them: in a list beside the messages, or within a part of one."""
    picture = Image.linear_gradient("L").resize((30, 20)).convert("RGB")
    answer = {"role": "assistant", "content": "That."}
    beside = {"images": [picture], "messages": [{"role": "user", "content": "<image>What?"}, answer]}
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    for row in (beside, {"messages": [{"role": "user", "content": parts}, answer]}):
        (sample,) = read([row])
        assert sample.turns[0].text == "<image>What?"
        assert load(sample.images[0]).image.tobytes() == picture.tobytes()


def test_a_resumed_program_has_the_same_source(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    options = {"cache_dir": str(tmp_path / "cache"), "image_root": str(tmp_path)}
    first, again = MMDataModule(train=rows, **options), MMDataModule(train=[dict(row) for row in rows], **options)
    assert first.arguments["train"] == again.arguments["train"]
    assert MMDataModule(train=rows[:2], **options).arguments["train"] != first.arguments["train"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "train is int"),
        (datasets.Dataset.from_list([{"a": 1}]).to_iterable_dataset(), "train is IterableDataset"),
        ([{"image": object(), "question": "a", "answer": "b"}], "cannot be written as JSON"),
    ],
)
def test_what_cannot_be_given(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MMDataModule(train=given)


def test_ranks_that_start_together_write_a_dataset_once(tmp_path: Path) -> None:
    given = datasets.Dataset.from_list([{"question": "What?", "answer": "A."}] * 5000)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: in_cache(given, None, "train", tmp_path), range(4)))
    assert made == [made[0]] * 4
    assert len(datasets.load_from_disk(made[0]["path"])) == 5000
