"""CIDEr where questions have several references, in a list or in several rows; through ``test`` and ``predict``."""

import json
from pathlib import Path

import lightning as L
import pytest

from lightning_mm import ConnectorOnly, MMDataModule, MMModule
from lightning_mm.core.cider import cider
from lightning_mm.data.sample import Sample, Turn
from lightning_mm.training.caption_scores import CaptionScores, references_of
from tests.helpers.data import Data, Family


def row(picture: str, caption: str, question: str = "Describe.", **extra: object) -> Sample:
    return Sample(
        picture + caption, (Turn("user", question), Turn("assistant", caption)), (Path(picture),), extra=extra
    )


def test_rows_about_one_picture_are_one_question() -> None:
    """As COCO's captions are released: one row per caption."""
    rows = [row("a", "a red car"), row("b", "two cats sit"), row("a", "the car is red"), row("b", "cats on a sofa")]
    answers = ["a red car drives", "cats", "a red car drives", "cats"]
    found = CaptionScores()
    found.update(answers, rows, [1] * 4)
    wanted = cider(["a red car drives", "cats"], [["a red car", "the car is red"], ["two cats sit", "cats on a sofa"]])
    assert found.compute() == pytest.approx(sum(wanted) / 2)
    turned = CaptionScores()
    turned.update(answers[::-1], rows[::-1], [1] * 4)
    assert turned.compute() == pytest.approx(sum(wanted) / 2)


def test_a_list_of_references_is_taken_and_answers_without_are_left_to_exact_match() -> None:
    rows = [
        row("a", "a red car", references=["a red car", "the car"]),
        row("b", "two cats", references=["two cats"]),
        row("b", "red", question="Which colour?"),
    ]
    found = CaptionScores()
    found.update(["a red car", "two dogs", "red"], rows, [1, 1, 1])
    wanted = cider(["a red car", "two dogs"], [["a red car", "the car"], ["two cats"]])
    assert found.compute() == pytest.approx(sum(wanted) / 2)
    plain = CaptionScores()
    plain.update(["red"], rows[2:], [1])
    assert plain.compute() is None
    assert references_of(row("a", "x", captions=["x", " ", "y"]), 1) == ("x", "y")
    assert references_of(row("a", "x", captions="x"), 1) == ()


def test_one_question_alone_has_no_cider() -> None:
    found = CaptionScores()
    found.update(["a car"], [row("a", "a car", references=["a car", "the car"])], [1])
    assert found.compute() is None


def test_test_and_predict_tell_it(family: Family, data: Data, tmp_path: Path) -> None:
    rows = json.loads(data["test"].read_text())
    for number, each in enumerate(rows):
        each["conversations"] = each["conversations"][:2]
        each["references"] = [f"number {number} of them", each["conversations"][1]["value"]]
    file = data["test"].with_name("captions.json")
    file.write_text(json.dumps(rows))
    module = MMModule(str(family("llava")), ConnectorOnly())
    held = MMDataModule(train=str(data["train"]), test=str(file), predict=str(file), batch_size=2, num_workers=0)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    (told, *_) = trainer.test(module, held, verbose=False)
    answered = [each for batch in trainer.predict(module, held) or [] for each in batch]
    assert [each["references"] for each in answered] == [each["references"] for each in rows]
    wanted = cider([each["answer"] for each in answered], [each["references"] for each in answered])
    assert told["test/cider"] == pytest.approx(sum(wanted) / len(wanted))
