"""Wrong captions: false of their picture, as many as true ones, and not to be told by their words alone."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict

from lightning_mm.core.decisions import decision_log
from lightning_mm.data.english import plural
from lightning_mm.data.probe_sets.build.entailment import make_false_captions
from lightning_mm.data.probe_sets.build.false_captions import find_mentions, is_false_caption, swap_nouns, words
from lightning_mm.data.probe_sets.build.sampling import SelectedImage, build_probe_rows
from lightning_mm.data.probe_sets.build.scenes import Scene, SceneObject
from lightning_mm.data.probe_sets.probe_set import ProbeRow, ProbeSet
from lightning_mm.nano.data.questions import with_article

NOUNS = {"animal": ("cat", "dog", "owl", "hot dog", "horse"), "vehicle": ("car", "bus", "elevated train", "ox cart")}
PLACES = ("in the park", "at night", "under an old bridge", "near a river", "beside the wall")


def thing(name: str, category: str) -> SceneObject:
    return SceneObject({"name": name, "category": category}, (0, 0, 9, 9))


def scenes_of_things(count: int, seed: int = 0) -> list[Scene]:
    """Captions in COCO's manner: one or two things, one or several of a kind, somewhere."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        category = rng.choice(sorted(NOUNS))
        names = rng.sample(NOUNS[category], rng.randint(1, 2))
        said = [plural(name) if rng.random() < 0.3 else with_article(name) for name in names]
        caption = f"{' and '.join(said)} {rng.choice(PLACES)} {i % 7}"
        objects = tuple(thing(name, category) for name in names)
        made.append(Scene(f"{i:04d}", Path(f"/{i}.png"), str(i), (caption[0].upper() + caption[1:],), (), objects))
    return made


def scenes_of_texts(count: int, seed: int = 0) -> list[Scene]:
    return [Scene(s.id, s.image, s.origin, s.captions) for s in scenes_of_things(count, seed)]


def scenes_with_false(count: int, seed: int = 0) -> list[Scene]:
    """Rows that bring their own wrong captions, in groups of two that trade."""
    made = []
    for one, other in zip(*[iter(scenes_of_things(count, seed))] * 2, strict=True):
        for scene, false in ((one, f"A zebra {one.id}"), (other, f"A zebra {other.id}")):
            made.append(Scene(scene.id, scene.image, scene.id, scene.captions, (false,), scene.objects, one.id))
    return made


Make = Callable[[int, int], list[Scene]]
KINDS: dict[str, Make] = {"traded": scenes_of_things, "nearest": scenes_of_texts, "given": scenes_with_false}


def drawn(scenes: Sequence[Scene]) -> ProbeSet:
    return build_probe_rows([SelectedImage(scene, (40, 30)) for scene in scenes], source="t").probe_set


@pytest.mark.parametrize("kind", KINDS)
def test_every_probe_is_balanced_and_split_by_picture(kind: str) -> None:
    scenes = KINDS[kind](41 if kind != "given" else 40, 0)
    by_id = {scene.id: scene for scene in scenes}
    rows = [row for row in drawn(scenes).rows if row.role == "entailment"]
    ids = {row.id for row in rows}
    assert len(ids) == len(rows) > 3 * 34
    for probe in ("entailment/random", "entailment/hard"):
        labels = Counter(row.labels[probe] for row in rows if probe in row.labels)
        assert labels[0] == labels[1]
        assert 34 <= labels[1] <= 40, "one scene of 41 finds no partner, and few no caption that is surely wrong"
    home = {}
    for row in rows:
        assert home.setdefault(row.sample.images, row.group) == row.group, "no picture is in two groups"
        is_true = row.span == by_id[row.id.partition(":")[0]].caption
        assert all(label == int(is_true) for label in row.labels.values())
        assert len(row.labels) == (2 if is_true and f"{row.id.partition(':')[0]}:random" in ids else 1)


def without_articles(caption: str) -> list[str]:
    return [word for word in words(caption) if word not in ("a", "an")]


@pytest.mark.parametrize("kind", ["traded", "nearest"])
def test_texts_are_as_often_true_as_false_within_a_group(kind: str) -> None:
    rows = [row for row in drawn(KINDS[kind](40, 1)).rows if row.role == "entailment"]
    for group in {row.group for row in rows}:
        for probe in ("entailment/random", "entailment/hard"):
            said: dict[int, Counter[str]] = {0: Counter(), 1: Counter()}
            for row in rows:
                if row.group == group and probe in row.labels:
                    label = row.labels[probe]
                    assert isinstance(label, int)
                    is_traded = kind == "traded" and probe == "entailment/hard"
                    said[label].update(without_articles(row.span) if is_traded else [row.span])
            assert said[0] == said[1]


def bag_of_words_accuracy(rows: Sequence[ProbeRow], probe: str, groups: Sequence[str]) -> float:
    """Cross-validated accuracy of scikit-learn's logistic regression on words and pairs of words."""
    truth = np.array([row.labels[probe] for row in rows])
    counts = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+").fit_transform([row.span for row in rows])
    told = cross_val_predict(LogisticRegression(C=10, max_iter=1000), counts, truth, groups=groups, cv=GroupKFold(5))
    return float((told == truth).mean())


@pytest.mark.parametrize("kind", ["traded", "nearest"])
@pytest.mark.parametrize("probe", ["entailment/random", "entailment/hard"])
def test_words_alone_tell_nothing(kind: str, probe: str) -> None:
    """At 400 rows the standard error of a coin is 0.025; three of them are allowed."""
    rows = [row for row in drawn(KINDS[kind](200, 2)).rows if probe in row.labels]
    assert len(rows) > 380
    assert abs(bag_of_words_accuracy(rows, probe, [row.group for row in rows]) - 0.5) < 0.075


def test_splitting_by_picture_alone_would_teach_the_opposite() -> None:
    """Why a group is the pictures that trade: torn apart, a text that is true in training is false in the test."""
    rows = [row for row in drawn(scenes_of_things(200, 2)).rows if "entailment/random" in row.labels]
    pictures = [str(row.sample.images[0]) for row in rows]
    assert bag_of_words_accuracy(rows, "entailment/random", pictures) < 0.3


def test_a_cue_in_the_words_would_be_seen() -> None:
    """The check above is worth something only if it finds a cue that is there: a zebra is always wrong."""
    rows = [row for row in drawn(scenes_with_false(200, 2)).rows if "entailment/hard" in row.labels]
    assert bag_of_words_accuracy(rows, "entailment/hard", [row.group for row in rows]) > 0.95


@given(st.integers(2, 30), st.integers(0, 5), st.sampled_from(sorted(KINDS)))
def test_wrong_captions_are_wrong(count: int, seed: int, kind: str) -> None:
    scenes = KINDS[kind](2 * (count // 2), seed)
    by_id = {scene.id: scene for scene in scenes}
    for name, wrong in make_false_captions(scenes, seed).items():
        scene = by_id[name]
        for caption in (wrong.random, wrong.hard):
            assert caption is None or Counter(words(caption)) != Counter(words(scene.caption))
        assert scene.family in wrong.group.split("+")
        if wrong.kind == "traded":
            there = {each.name for each in scene.objects or ()}
            every = frozenset(each for names in NOUNS.values() for each in names)
            assert {each.name for each in find_mentions(wrong.hard, every)} - there, "it names what is not there"
            assert len(wrong.hard.split()) - len(scene.caption.split()) in (-1, 0, 1)


def test_a_trade_stays_within_its_category_where_it_can() -> None:
    scenes = scenes_of_things(100, 3)
    category = {name: kind for kind, names in NOUNS.items() for name in names}
    every = frozenset(category)
    alike = 0
    traded_ones = [(s, w) for s in scenes if (w := make_false_captions(scenes, 0).get(s.id)) and w.kind == "traded"]
    for scene, wrong in traded_ones:
        said = {each.name for each in find_mentions(scene.caption, every)}
        (new,) = {each.name for each in find_mentions(wrong.hard, every)} - said
        alike += category[new] in {category[name] for name in said}
    assert alike > 0.9 * len(traded_ones) > 80


def test_the_draw_depends_on_the_seed_and_on_nothing_else() -> None:
    scenes = scenes_of_things(30)
    shuffled = random.Random(5).sample(scenes, len(scenes))
    assert make_false_captions(scenes, 0) == make_false_captions(shuffled, 0)
    assert make_false_captions(scenes, 0) != make_false_captions(scenes, 1)


def test_captions_that_are_all_alike_find_no_partner() -> None:
    same = [Scene(str(i), Path(f"/{i}.png"), str(i), ("a cat",)) for i in range(4)]
    assert make_false_captions(same, 0) == {}
    two = [*same[:1], Scene("9", Path("/9.png"), "9", ("a dog",))]
    found = make_false_captions(two, 0)
    assert {name: (wrong.random, wrong.hard) for name, wrong in found.items()} == {
        "0": (None, "a dog"),
        "9": (None, "a cat"),
    }


def test_pairs_of_equal_meaning_share_their_group() -> None:
    probe_set = drawn(scenes_of_things(20))
    pictures = {row.group: row for row in probe_set.rows if row.role == "picture"}
    texts = {row.group: row for row in probe_set.rows if row.role == "text"}
    assert pictures.keys() == texts.keys() == {f"{i:04d}" for i in range(20)}
    for group, text in texts.items():
        question = pictures[group].span
        assert pictures[group].text == f"<image>\n{question}"
        assert text.text == f"{text.span}\n{question}"
        assert not text.sample.images


@pytest.mark.parametrize(
    ("one", "a", "other", "b", "expected"),
    [
        ("A cat.", "cat", "an owl", "owl", ("An owl.", "a cat")),
        ("two cats", "cat", "some dogs", "dog", ("two dogs", "some cats")),
        ("Cats on a mat", "cat", "big dogs", "dog", ("Dogs on a mat", "big cats")),
        ("a hot dog", "hot dog", "an egg", "egg", ("an egg", "a hot dog")),
        ("A man's umbrella", "umbrella", "a catfish, the kite", "kite", ("A man's kite", "a catfish, the umbrella")),
        ("A TV on a table", "tv", "A dog", "dog", ("A dog on a table", "A TV")),
        ("TV on a table", "tv", "a dog", "dog", ("Dog on a table", "a TV")),
        ("dogs on a mat", "dog", "Cats asleep", "cat", ("cats on a mat", "Dogs asleep")),
        ("A Dog At Night", "dog", "a cat", "cat", ("A Cat At Night", "a dog")),
        ("a unicorn", "unicorn", "An owl", "owl", ("an owl", "A unicorn")),
        ("two people", "person", "three dogs", "dog", ("two dogs", "three people")),
        ("two sheep", "sheep", "three dogs", "dog", ("two dogs", "three sheep")),
    ],
)  # fmt: skip
def test_nouns_are_traded(one: str, a: str, other: str, b: str, expected: tuple[str, str]) -> None:
    assert (
        swap_nouns(one, *find_mentions(one, frozenset([a])), other, *find_mentions(other, frozenset([b]))) == expected
    )


def test_mentions() -> None:
    found = find_mentions("A hot dog, two dogs and a dogsled", frozenset(["dog", "hot dog", "cat"]))
    assert [(m.name, m.is_plural, m.article) for m in found] == [("hot dog", False, "a"), ("dog", True, "")]
    assert not find_mentions("a cat and a cat", frozenset(["cat"])), "which of the two would be traded?"


def test_the_nano_pictures_are_found_for_what_they_are(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    scene = Scene("x", tmp_path / "x.png", "x", ("sushi", "a cat"), (), (thing("cat", "animal"),))
    assert scene.caption == "a cat"


def told(name: str, *captions: str, objects: tuple[str, ...] | None = None, group: str = "") -> Scene:
    known = None if objects is None else tuple(thing(each, "thing") for each in objects)
    return Scene(name, Path(f"/{name}.png"), name, captions, (), known, group)


@pytest.mark.parametrize(
    ("said", "shown", "is_wrong"),
    [
        (("a red bus",), ("a green field", "a field of grass"), True),
        (("a red bus",), ("a bus stop", "The red bus"), False),  # its second caption says the same
        (("A man rides a brown horse",), ("the man rides a brown horse on the beach",), False),  # 4 of 5 words
        (("A cat on a mat",), ("the cat is on the mat",), False),
        (("a cat in a park",), ("a dog in a park",), True),
    ],
)
def test_what_other_captions_of_a_picture_say_is_not_wrong(
    said: tuple[str, ...], shown: tuple[str, ...], is_wrong: bool
) -> None:
    assert is_false_caption(told("a", *said), told("b", *shown)) == is_wrong


def test_what_other_captions_name_is_not_traded_away() -> None:
    """The second picture's list of things lacks the dog that one of its captions speaks of."""
    one = told("a", "a dog on a hill", objects=("dog",))
    assert not make_false_captions([one, told("b", "a cat at home", "a cat and a dog", objects=("cat",))], 0)
    assert (
        make_false_captions([one, told("b", "a cat at home", "a cat asleep", objects=("cat",))], 0)["a"].kind
        == "traded"
    )


def frames(clips: int, of_each: int) -> list[Scene]:
    """Videos: frames of one clip are told of in nearly the same words."""
    things = ("cat", "dog", "owl", "bus", "car", "kite", "ship", "tent", "drum", "bell")
    return [
        told(f"{clip}-{i}", f"a {things[clip]} stands near a wall {i}", objects=(things[clip],), group=str(clip))
        for clip in range(clips)
        for i in range(of_each)
    ]


@pytest.mark.parametrize("clips", [8, 7])
def test_no_row_of_a_group_is_torn_from_it(clips: int) -> None:
    """Frames of a clip land on one side of any split, whatever is asked of them."""
    scenes = frames(clips, 5)
    clip_of = {scene.id: scene.group for scene in scenes}
    home: dict[tuple[str, str], set[str]] = {}
    rows = drawn(scenes).rows
    for row in rows:
        home.setdefault((row.role, clip_of[row.subject]), set()).add(row.group)
    assert len(home) == 3 * clips
    assert all(len(groups) == 1 for groups in home.values())
    asked = [row for row in rows if row.role == "entailment"]
    assert len({row.sample.images for row in asked}) >= len(scenes) - 1
    assert len({row.group for row in asked}) == clips // 2, "two clips, or three, hang together, and not all of them"


def test_a_group_that_is_alone_trades_with_as_many_single_pictures() -> None:
    found = make_false_captions(frames(1, 4) + scenes_of_things(20), 0)
    (group,) = {wrong.group for name, wrong in found.items() if name.startswith("0-")}
    assert len(group.split("+")) == 1 + 4
    assert len({wrong.group for wrong in found.values()}) > 5


def test_a_group_that_has_partners_within_stays_alone() -> None:
    scenes = [told(str(i), f"a {name}", objects=(name,), group="walk") for i, name in enumerate(("cat", "bus", "owl"))]
    assert {wrong.group for wrong in make_false_captions(scenes + frames(2, 3), 0).values()} == {
        "group walk",
        "group 0+group 1",
    }


def test_how_many_find_no_partner_is_said() -> None:
    decision_log().clear()
    drawn(scenes_of_things(41))
    (reason,) = [each.reason for each in decision_log() if each.name == "data.probes.entailment"]
    assert reason == "41 of 41 pictures have a caption, 1 of them find no partner"
