"""Rows that have pictures in common: how they are grouped, and which of their first tokens are shared."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_mm import MMDataModule
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import TokenRegion
from lightning_mm.data.shared_images import ImageGroups
from tests.helpers.data import Family
from tests.helpers.shared_rows import module, write_rows


def ids(groups: ImageGroups) -> list[list[str]]:
    return [[sample.id for sample in group] for group in groups]


def test_groups_are_rows_of_a_picture_in_equal_parts(tmp_path: Path, family: Family) -> None:
    data = module(write_rows(tmp_path, [1, 5, 2]), family("llava"), rows_per_image=3)
    groups = ImageGroups(data.rows.table("train"), 3)
    assert ids(groups) == [["0-0"], ["1-0", "1-1", "1-2"], ["2-0", "2-1"], ["1-3", "1-4"]]
    assert groups.per_source == [4]
    assert groups.mean_size == 2.0
    assert groups.fingerprint != ImageGroups(data.rows.table("train"), 2).fingerprint
    assert ids(ImageGroups(data.rows.table("train")))[1] == [f"1-{turn}" for turn in range(5)]


def test_an_epoch_holds_every_row_once(tmp_path: Path, family: Family) -> None:
    data = module(write_rows(tmp_path, [1, 5, 2, 4]), family("llava"), batch_size=2, rows_per_image=2)
    seen = [sample.id for batch in data.train_dataloader() for sample in batch.samples]
    assert sorted(seen) == sorted(sample.id for sample in data.samples("train"))
    assert data.rows_per_batch == pytest.approx(2 * 12 / 7)


def test_what_is_shared_is_the_picture_and_what_stands_before_the_first_difference(
    tmp_path: Path, family: Family
) -> None:
    data = module(write_rows(tmp_path, [3]), family("llava"), batch_size=1)
    (batch,) = data.train_dataloader()
    assert batch.shared is not None
    assert batch.shared.owner == (0, 0, 0)
    assert batch.shared.length[0] == 0
    ids_BL = batch.inputs["input_ids"]
    for row, count in list(enumerate(batch.shared.length))[1:]:
        assert (ids_BL[row, :count] == ids_BL[0, :count]).all()
        assert ids_BL[row, count] != ids_BL[0, count]
        assert not (batch.regions[row, count:] == TokenRegion.IMAGE).any()
    tokens = int((batch.regions != TokenRegion.PAD).sum())
    assert len(batch.real) == tokens - sum(batch.shared.length)


def test_equal_questions_share_all_but_nothing_is_lost(tmp_path: Path, family: Family) -> None:
    file = write_rows(tmp_path, [1])
    file.write_text(json.dumps(json.loads(file.read_text()) * 2))
    (batch,) = module(file, family("llava"), batch_size=1).train_dataloader()
    assert len(batch) == 2
    assert batch.num_supervised % 2 == 0
    assert batch.shared is not None
    assert batch.shared.length[1] == int((batch.regions[1] != TokenRegion.PAD).sum())


def test_a_picture_behind_the_question_is_not_shared(tmp_path: Path, family: Family) -> None:
    data = module(write_rows(tmp_path, [3], mark_last=True), family("llava"), batch_size=1)
    (batch,) = data.train_dataloader()
    assert batch.shared is None
    assert len(batch) == 3
    assert data.shared_example() is None


def test_rows_without_pictures_stand_alone(tmp_path: Path, family: Family) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(3)]))
    groups = ImageGroups(module(tmp_path / "text.json", family("llava")).rows.table("train"))
    assert ids(groups) == [["0"], ["1"], ["2"]]


@pytest.mark.parametrize("option", [{"max_tokens": 100}, {"group_by_length": True}, {"streaming": True}])
def test_what_does_not_go_with_it(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"data.share_images and data.{next(iter(option))}"):
        MMDataModule(train="train.json", share_images=True, **option)
