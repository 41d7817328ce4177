"""Splits: which hands and which things each file shows, and that the words of a question do not tell its answer.

Data flow: small builds, and the things of this machine's packages -> rows, ``split_things``.
"""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lightning_mm.core.decisions import decision_log
from lightning_mm.nano.data.catalog import Thing
from lightning_mm.nano.data.hands import UNFIT
from lightning_mm.nano.data.questions import ANSWERS
from lightning_mm.nano.data.rows import Picture, quota_pictures, train_pictures
from lightning_mm.nano.data.splits import SplitThings, load_sources, log_sources, split_things
from tests.helpers.nano_rows import NOUNS, Row, question_of, read_rows


def drawings(rows: list[Row], key: str) -> set[str]:
    return {box[key] for row in rows for box in row["boxes"]}


def hands(rows: list[Row]) -> set[str]:
    return {key.partition(":")[0] for key in drawings(rows, "key")}


def split_of(built: Path) -> SplitThings:
    """The things of each split of a build, which may have fewer hands than this machine."""
    used = json.loads((built / "manifest.json").read_text("utf-8"))["hands"]
    return split_things({hand: load_sources().things[hand] for hand in used}, 0)


def test_the_hand_of_the_test_is_not_trained_on(all_hands: Path) -> None:
    trained = hands(read_rows(all_hands, "train"))
    assert trained == {"openmoji", "twemoji", "fluent", "fluent3d", "emojione", "fxemoji"}
    assert hands(read_rows(all_hands, "test_unseen")) <= trained
    for name in ("val", "test", "probes"):
        assert hands(read_rows(all_hands, name)) == {"noto"}
    assert hands(read_rows(all_hands, "train_flags")) == {"openmoji"}
    assert hands(read_rows(all_hands, "test_flags")) == {"flagicons"}


def test_known_and_unseen_things(built: Path) -> None:
    """What is tested by name is known; what is tested as unseen is nowhere else; val and test share no drawing."""
    rows = {name: read_rows(built, name) for name in ("train", "val", "test", "test_unseen", "probes")}
    known = {thing.name for thing in split_of(built).train}
    for name in ("train", "val", "test", "probes"):
        assert drawings(rows[name], "name") <= known
        assert not drawings(rows[name], "group") & drawings(rows["test_unseen"], "group")
    for name in ("val", "probes"):
        assert not drawings(rows[name], "group") & drawings(rows["test"], "group")


def test_countries_of_the_test_are_those_of_training(built: Path) -> None:
    learned, tested = (drawings(read_rows(built, name), "name") for name in ("train_flags", "test_flags"))
    assert len(learned) == 12
    assert tested == learned


def test_drawings_that_do_not_show_the_thing_are_left_out(all_hands: Path) -> None:
    """Each is one that the hand has: a key that names nothing would hide a mistake."""
    sources = load_sources()
    assert not UNFIT.keys() & {thing.key for drawn in sources.things.values() for thing in drawn}
    assert UNFIT.keys() <= {rejection.origin for rejection in sources.rejected}


def test_flat_and_relief_are_on_one_side() -> None:
    things = {hand: _things(hand, range(30)) for hand in ("openmoji", "fluent", "fluent3d", "fxemoji")}
    split = split_things(things, 0)
    assert split.held_out == "fluent"
    assert {thing.source for thing in split.train} == {"openmoji", "fxemoji"}


def test_without_a_second_hand_the_first_is_tested(no_archives: None) -> None:
    sources = load_sources()
    split = split_things(sources.things, 0)
    assert split.held_out == "openmoji"
    assert {thing.name for thing in split.test} <= {thing.name for thing in split.train}
    log_sources(sources, split)
    told = {decision.name: decision for decision in decision_log()}
    assert "the only hand" in told["nano_data.held_out"].reason
    assert "scripts/nano_pictures.sh" in told["nano_data.hands"].reason


def _things(hand: str, groups: range, copies: int = 1) -> list[Thing]:
    return [
        Thing(
            f"{hand}:{group}-{i}",
            f"thing {group}",
            "animal",
            f"group {group}",
            "one",
            lambda: Image.new("RGBA", (1, 1)),
        )
        for group in groups
        for i in range(copies)
    ]


@example([1, 1, 1, 1, 1, 1, 9, 9], 0)
@given(st.lists(st.integers(1, 9), min_size=4, max_size=40), st.integers(0, 5))
def test_splits_keep_groups_whole(sizes: list[int], seed: int) -> None:
    things = {
        hand: [thing for group, size in enumerate(sizes) for thing in _things(hand, range(group, group + 1), size)]
        for hand in ("openmoji", "noto")
    }
    split = split_things(things, seed)
    parts = {name: {thing.group for thing in getattr(split, name)} for name in ("train", "val", "test", "test_unseen")}
    assert not parts["train"] & parts["test_unseen"]
    assert parts["val"] | parts["test"] == parts["train"]
    assert not parts["val"] & parts["test"]
    assert len(parts["train"]) + len(parts["test_unseen"]) == len(sizes)


def test_questions_name_only_things_of_their_split(built: Path) -> None:
    """A name that is never shown in a split must not be a sure "no" there: wrong things come from the split's own."""
    split = split_of(built)
    for name, things in (("train", split.train), ("test", split.test)):
        names = {thing.name for thing in things}
        for row in read_rows(built, name):
            if row["question_type"] in ("yes_no", "presence"):
                phrase = question_of(row).split(" there ")[1].removesuffix(" in the picture?")
                assert NOUNS[phrase] in names


@pytest.fixture(scope="module")
def worded() -> tuple[list[Picture], list[Picture]]:
    """Training and test pictures in numbers that let words be counted, not drawn."""
    split = split_things(load_sources().things, 0)
    return (
        train_pictures(split.train, 1000, "words:train", 196),
        quota_pictures(split.test, dict.fromkeys(ANSWERS, 100), "words:test", 196),
    )


def test_words_alone_do_not_answer(worded: tuple[list[Picture], list[Picture]]) -> None:
    """Naive Bayes on the words of a question stays within four standard errors of the best constant answer.

    The best constant is one of the type's answers, or for two forms of question (category) of the form's; captions are
    left out, as their question has always the same words.
    """
    train, test = ([question for picture in part for question in picture.questions] for part in worded)
    for kind in sorted(set(ANSWERS) - {"caption"}):
        seen, asked = ([question for question in part if question.type == kind] for part in (train, test))
        prior = Counter(question.cell for question in seen)
        told: dict[str, Counter[str]] = defaultdict(Counter)
        for question in seen:
            told[question.cell].update(set(question.text.split()))
        words = {word for counts in told.values() for word in counts}
        right = 0
        for question in asked:
            scores = {cell: _log_odds(prior[cell], told[cell], set(question.text.split()) & words) for cell in prior}
            right += max(scores, key=lambda cell: scores[cell]) == question.cell
        forms = 2 if kind == "category" else 1
        chance = forms / len(ANSWERS[kind])
        error = (chance * (1 - chance) / len(asked)) ** 0.5
        assert right / len(asked) <= chance + 4 * error, f"{kind}: {right / len(asked):.2f}, chance {chance:.2f}"


def _log_odds(prior: int, told: Counter[str], words: set[str]) -> float:
    return math.log(prior) + sum(math.log((told[word] + 0.5) / (prior + 1.0)) for word in words)
