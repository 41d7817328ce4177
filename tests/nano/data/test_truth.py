"""Every answer is true of its picture and its question, and the pictures show what their boxes say.

Data flow: small builds -> rows read back -> each answer worked out anew by ``tests/helpers/nano_rows.py``.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_mm.nano.data.catalog import CATEGORIES
from lightning_mm.nano.data.colors import BACKGROUNDS, dominant_color
from lightning_mm.nano.data.questions import ANSWERS, NAME_FREE, count_phrase, with_article
from tests.helpers.nano_rows import ENTRIES, NOUNS, Row, answer_of, expected_answer, question_of, read_rows, shown

ASKED = ("train", "val", "test", "test_unseen")
SIDE = 196


@pytest.fixture(scope="session")
def asked(built: Path) -> list[Row]:
    return [row for name in ASKED for row in read_rows(built, name)]


def test_every_answer_follows_from_boxes_and_words(built: Path, asked: list[Row]) -> None:
    flags = [row for name in ("train_flags", "test_flags") for row in read_rows(built, name)]
    assert {row["question_type"] for row in asked} == set(ANSWERS)
    assert len({row["question_type"] for row in flags}) == 3
    for row in [*asked, *flags]:
        assert answer_of(row) == expected_answer(row), (row["id"], question_of(row))


def test_swapped_captions_differ_in_one_noun(asked: list[Row]) -> None:
    with_captions = [row for row in asked if row["caption"]]
    assert with_captions
    for row in with_captions:
        said, wrong = (re.split(r", | and ", row[key]) for key in ("caption", "caption_swapped"))
        (swap,) = [b for a, b in zip(said, wrong, strict=True) if a != b]
        assert swap not in said


def test_wrong_things_are_of_another_group(asked: list[Row]) -> None:
    for row in asked:
        if row["question_type"] in ("yes_no", "presence") and answer_of(row) == "No.":
            name = NOUNS[re.sub(r"^(?:Is|Are) there | in the picture\?$", "", question_of(row))]
            assert ENTRIES[name].group not in {box["group"] for box in row["boxes"]}


def test_boxes_hold_what_is_drawn_and_do_not_touch(built: Path, asked: list[Row]) -> None:
    """Outside every box only the ground is left: its color, within the light (0.97 x 0.92 to 1.02) and rounding."""
    for row in [*asked, *read_rows(built, "probes")]:
        boxes = [box["box"] for box in row["boxes"]]
        bare = np.ones((SIDE, SIDE), dtype=bool)
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            assert all(right < b[0] or b[2] < left or bottom < b[1] or b[3] < top for b in boxes[:i])
            bare[top:bottom, left:right] = False
        with Image.open(built / row["image"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (SIDE, SIDE))
            pixels = np.asarray(picture, dtype=np.float64)
        wanted = np.array(BACKGROUNDS[row["background"]], dtype=np.float64)
        assert (pixels[bare] >= 0.89 * wanted - 1).all()
        assert (pixels[bare] <= 1.02 * wanted + 1).all()
        for left, top, right, bottom in boxes:
            inside = pixels[top:bottom, left:right]
            assert (np.abs(inside - wanted).max(axis=2) > 20).any(), f"{row['id']}: an empty box"


def test_a_thing_has_the_color_that_is_told_of_it(built: Path, asked: list[Row]) -> None:
    """The pixels of its box that are not of the ground, by the rule that names colors: half of them or more.

    Not three quarters, as before a tint was scaled: the rim mixes with the ground.
    """
    colored = [row for row in asked if row["question_type"] in ("colour", "bind_colour")]
    assert colored
    for row in colored:
        (name,) = [box["name"] for box in row["boxes"] if f"the {box['name']}?" in question_of(row)]
        (box,) = [box["box"] for box in row["boxes"] if box["name"] == name]
        with Image.open(built / row["image"]) as picture:
            part = np.asarray(picture.convert("RGB").crop(tuple(box)), dtype=np.int64)
        ground = np.array(BACKGROUNDS[row["background"]])
        thing = np.abs(part - ground).max(axis=2) > 40
        cutout = Image.fromarray(np.dstack([part, 255 * thing]).astype(np.uint8), "RGBA")
        assert dominant_color(cutout, share=0.5) == answer_of(row).rstrip(".").lower(), row["id"]


def test_each_answer_is_asked_for_equally_often(built: Path) -> None:
    for name, types in (("test", set(ANSWERS)), ("test_unseen", set(NAME_FREE))):
        answers = Counter((row["question_type"], answer_of(row)) for row in read_rows(built, name))
        assert {kind for kind, _ in answers} == types
        for kind in types - {"caption", "category", "compare_count"}:
            assert {told for other, told in answers if other == kind} == set(ANSWERS[kind])
            assert len({count for (other, _), count in answers.items() if other == kind}) == 1, kind
        assert answers["category", "Animal."] == answers["category", "Vehicles."]
        assert answers["category", "Food."] == 2 * answers["category", "Animal."]


def test_training_answers_are_nearly_even(built: Path) -> None:
    answers: dict[str, Counter[str]] = {}
    for row in read_rows(built, "train"):
        answers.setdefault(row["question_type"], Counter())[answer_of(row)] += 1
    for kind in set(ANSWERS) - {"caption", "category", "compare_count"}:
        counts = [answers[kind][told] for told in ANSWERS[kind]]
        assert max(counts) - min(counts) <= 9, kind


def test_what_is_more_is_named_first_as_often_as_second(built: Path) -> None:
    rows = [row for row in read_rows(built, "test") if row["question_type"] == "compare_count"]
    first = sum(f"more {answer_of(row).rstrip('.').lower()} or" in question_of(row).lower() for row in rows)
    assert 2 * first == len(rows)


def test_probes_are_pairs_that_trade_one_noun(built: Path) -> None:
    """Every word of a pair's captions is as often right as wrong, and what is wrong is not in the picture."""
    probes = read_rows(built, "probes")
    assert len(probes) == 40
    tested = {box["key"] for row in read_rows(built, "test") for box in row["boxes"]}
    for one, other in zip(probes[::2], probes[1::2], strict=True):
        assert one["group"] == other["group"]
        right, wrong = (
            Counter(f"{one[key]} {other[key]}".replace(",", "").split()) for key in ("caption", "caption_swapped")
        )
        assert right == wrong
        for row in (one, other):
            named, _, scenery = row["caption"].partition(" on ")
            assert scenery == f"{with_article(row['background'])} background"
            numbers = shown(row)
            phrases = re.split(r", | and ", named)
            assert sorted(phrases) == sorted(count_phrase(name, ENTRIES[name].number, n) for name, n in numbers.items())
            traded = re.split(r", | and ", row["caption_swapped"].partition(" on ")[0])
            (swap,) = [b for a, b in zip(phrases, traded, strict=True) if a != b]
            assert swap in (other if row is one else one)["caption"]
            assert swap not in phrases
            assert not tested & {box["key"] for box in row["boxes"]}, "layers are chosen by probes: no test drawing"
        groups = [{box["group"] for box in row["boxes"]} for row in (one, other)]
        assert not groups[0] & groups[1]


def test_probes_are_balanced(built: Path) -> None:
    probes = read_rows(built, "probes")
    counts = Counter(len(row["boxes"]) for row in probes)
    assert counts == {1: 16, 2: 12, 3: 8, 4: 4}, "the cycle of arrangements is drawn twice over 20 pairs"
    alone = [row["boxes"][0]["box"] for row in probes if len(row["boxes"]) == 1]
    assert Counter((box[0] + box[2]) / 2 < SIDE / 2 for box in alone) == {True: 8, False: 8}
    assert all(abs((box[0] + box[2]) / (2 * SIDE) - 0.5) >= 0.12 for box in alone)
    kinds = Counter(box["category"] for row in probes for box in row["boxes"])
    assert set(kinds) == set(CATEGORIES)
