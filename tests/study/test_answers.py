"""Answers by teacher forcing against greedy generation, and the three ways that a question is asked."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.processor import load_processor
from lightning_mm.study.answers import ask, first_tokens, test_data
from lightning_mm.study.folder import StudyFolder, read_table
from lightning_mm.study.inputs import Asked, prepare_inputs, question_files
from lightning_mm.study.retention import text_nats
from lightning_mm.study.settings import StudySettings, read_settings
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import ConnectorOnly
from tests.helpers.data import Family
from tests.helpers.study import make_study

test_data.__test__ = False  # type: ignore[attr-defined]  # it is no test


def _opened(model: Path) -> MMModule:
    module = MMModule(str(model), ConnectorOnly())
    module.configure_model()
    return module.eval()


def _data(settings: StudySettings) -> MMDataModule:
    return MMDataModule(train=settings.options["data.train"], processor=settings.model, num_workers=0, max_length=256)


@pytest.fixture
def prepared(family: Family, tmp_path: Path) -> tuple[StudyFolder, StudySettings, MMDataModule]:
    settings = read_settings({**make_study(tmp_path / "data", family("llava")), "blind_per_type": 5})
    folder, data = StudyFolder(tmp_path / "study"), _data(settings)
    folder.path.mkdir()
    folder.open(settings)
    prepare_inputs(folder, settings, data)
    return folder, settings, data


def test_an_exact_answer_is_the_one_that_greedy_generation_gives(family: Family, tmp_path: Path) -> None:
    """References are what the model itself says, and those with another last word; generation is transformers' own."""
    settings = read_settings(make_study(tmp_path / "data", family("llava")))
    module, data = _opened(family("llava")), _data(settings)
    module.max_new_tokens = 40
    rows = json.loads(Path(settings.tests["test"]).read_text())
    for row in rows:
        row["image"] = str(tmp_path / "data" / row["image"])
        question = row["conversations"][0]["value"].removeprefix("<image>\n")
        row["conversations"][1]["value"] = module.generate(row["image"], question)
    for row in rows[::2]:
        row["conversations"][1]["value"] += " no"
    file = tmp_path / "own.json"
    file.write_text(json.dumps([{**row, "id": str(number)} for number, row in enumerate(rows)]))
    asked = test_data(data, Asked("test", "own", file), 4)
    answers = ask(module, asked, {}, torch.autocast("cpu", enabled=False))
    said = [module.generate(row["image"], row["conversations"][0]["value"].removeprefix("<image>\n")) for row in rows]
    greedy = [text == row["conversations"][1]["value"] for text, row in zip(said, rows, strict=True)]
    ended = [len(load_processor(settings.model).processor.tokenizer(text).input_ids) < 39 for text in said]
    assert [a.question for a in answers] == [f"{number}.0" for number in range(len(rows))]
    assert any(greedy)
    assert not all(greedy)
    for answer, same, is_whole in zip(answers, greedy, ended, strict=True):
        if is_whole or not same:  # of an answer that generation cut, the end is not known
            assert answer.exact == same
    assert all(answer.nats > 0 for answer in answers)


def test_rows_of_a_batch_do_not_change_answers(prepared: tuple[StudyFolder, StudySettings, MMDataModule]) -> None:
    folder, settings, data = prepared
    module, (asked, *_) = _opened(Path(settings.model)), question_files(folder, settings)
    several, alone = (
        ask(module, test_data(data, asked, size), {}, torch.autocast("cpu", enabled=False)) for size in (5, 1)
    )
    assert [(a.question, a.exact) for a in several] == [(a.question, a.exact) for a in alone]
    # float32, sums of a dozen tokens: other shapes of the products round otherwise.
    assert [a.nats for a in several] == pytest.approx([a.nats for a in alone], rel=1e-5)


def test_rows_that_share_a_picture_do_not_change_answers(
    prepared: tuple[StudyFolder, StudySettings, MMDataModule],
) -> None:
    folder, settings, data = prepared
    module, (asked, *_) = _opened(Path(settings.model)), question_files(folder, settings)
    shared = MMDataModule(**{**data.arguments, "share_images": True})
    together = test_data(shared, asked, 3)
    batches = list(together.test_dataloader()[0])
    assert all(batch.shared is not None for batch in batches)
    found, alone = (
        ask(module, each, {}, torch.autocast("cpu", enabled=False)) for each in (together, test_data(data, asked, 1))
    )
    assert [(a.question, a.exact) for a in found] == [(a.question, a.exact) for a in alone]
    # float32, sums of a dozen tokens: other shapes of the products round otherwise.
    assert [a.nats for a in found] == pytest.approx([a.nats for a in alone], rel=1e-5)


def test_the_choice_is_among_the_answers_of_the_type(
    prepared: tuple[StudyFolder, StudySettings, MMDataModule],
) -> None:
    folder, settings, data = prepared
    asked = test_data(data, question_files(folder, settings)[0], 4)
    choices = first_tokens(asked)
    tokenizer = load_processor(settings.model).processor.tokenizer
    assert set(choices) <= {"colour", "yes_no"}
    for kind, answers in choices.items():
        texts = {row["answer"] for row in read_table(folder.questions) if row["type"] == kind}
        assert set(answers) == texts
        for text, token in answers.items():
            assert text.startswith(tokenizer.decode([token]).strip())
    module = _opened(Path(settings.model))
    answers_by_model = ask(module, asked, choices, torch.autocast("cpu", enabled=False))
    kinds = {row["question"]: row["type"] for row in read_table(folder.questions) if row["test"] == "test"}
    for answer in answers_by_model:
        assert (answer.choice is None) == (kinds[answer.question] not in choices)
    # An exact answer's first token is the most likely of all, so among the choices too.
    assert all(answer.choice is not False for answer in answers_by_model if answer.exact)


def test_no_picture_stays_and_gray_ones_have_its_size(
    prepared: tuple[StudyFolder, StudySettings, MMDataModule],
) -> None:
    folder, settings, _ = prepared
    asked = {each.shown: json.loads(each.file.read_text()) for each in question_files(folder, settings)[:3]}
    assert len(asked["own"]) == 16
    own = {row["id"]: row for row in asked["own"]}
    assert len(asked["other"]) == len(asked["gray"]) == 10  # five of each type
    others = {}
    for row in asked["other"]:
        before = own[row["id"]]
        assert row["conversations"] == before["conversations"]
        assert row["image"] != before["image"]
        others.setdefault(before["image"], set()).add(row["image"])
    assert all(len(each) == 1 for each in others.values())  # questions of a picture stay together
    assert len({next(iter(each)) for each in others.values()}) == len(others)
    for row in asked["gray"]:
        with Image.open(row["image"]) as gray, Image.open(own[row["id"]]["image"]) as before:
            assert gray.size == before.size
            assert gray.getcolors() == [(gray.width * gray.height, (127, 127, 127))]
    listed = [row for row in read_table(folder.questions) if row["test"] == "test"]
    assert len({row["picture"] for row in listed}) == 8


def test_the_nats_of_a_text_are_those_of_the_model(family: Family) -> None:
    module = _opened(family("llava"))
    text = "a big red thing and a small blue thing " * 12
    found = text_nats(module, text, 3, 8, torch.autocast("cpu", enabled=False))
    tokenizer = module.mm.required_processor.processor.tokenizer
    begin, ids = tokenizer("").input_ids, tokenizer(text, add_special_tokens=False).input_ids
    for number, nats in enumerate(found):
        passage = ids[number * (len(ids) // 3) :][:8]
        row = torch.tensor([begin + passage])
        labels = row.clone()
        labels[:, : len(begin)] = -100
        with torch.no_grad():
            expected = module.mm.model(input_ids=row, labels=labels).loss
        assert nats == pytest.approx(float(expected), rel=1e-5)  # float32, the same sums in another order
