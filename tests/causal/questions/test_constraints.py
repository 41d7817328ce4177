"""Constraints are found by stated rules, in the released layouts and in our own; what is not found is counted.

Data flow: files written as they are released -> ``read_questions`` -> spans, which real tokenizers then turn to tokens.
"""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightning_mm.causal.questions.constraint_matching import RULES, find_constraint
from lightning_mm.causal.questions.files import QuestionFile, read_questions
from lightning_mm.causal.questions.image_regions import BoxTokens
from lightning_mm.causal.questions.question import EncodedQuestion, Question, QuestionEncoder
from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data.sample import Rejection
from lightning_mm.models.processor import load_processor

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "smolvlm", "internvl", "gemma3", "mllama")
FLAG = "What is the capital of the country with this flag?"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the pictures are: none of them in any other place."""
    folder = tmp_path / "pictures"
    for name in ("val2014/COCO_1.jpg", "A photo of Space Needle.jpg", "A photo of Knud, Prince of D.png", "b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), "red").save(folder / name)
    return folder


def read(root: Path, content: str | bytes, name: str = "file.csv") -> QuestionFile:
    path = root.parent / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_questions(path, root)


def read_rows(root: Path, *rows: dict[str, Any]) -> QuestionFile:
    return read(root, "\n".join(json.dumps(row) for row in rows), "file.jsonl")


def said(question: Question) -> list[str]:
    return [question.text[slice(*span)] for span in question.spans]


@pytest.mark.parametrize(
    ("constraint", "question", "rule", "places"),
    [
        ("this flag", FLAG, "exact", ["this flag"]),
        ("This flag", FLAG, "case", ["this flag"]),
        ("this", "What is this? This is what this does.", "case", ["this", "This", "this"]),
        ("this", "Is this what thistles are?", "exact", ["this"]),
        ("a?", "This man is speaking into a?", "exact", ["a?"]),
        ("a?", "Is a pizza?", "punctuation", ["a"]),
        ('"this boat"', "How fast is this boat, really?", "punctuation", ["this boat"]),
        ("the suit", "What brand of suit is the man in the image wearing?", "determiner", ["suit"]),
        ("this hat.", "What type of hat is he wearing?", "determiner", ["hat"]),
        ("this dog", "What breeds of dogs are these?", "number", ["dogs"]),
        ("the city", "Which of the cities are capitals?", "number", ["cities"]),
        ("buses", "Is the bus late?", "number", ["bus"]),
        ("This artist,", "This artist, who has a citizenship of", "exact", ["This artist,"]),
        ("this place", "What is  this\nplace called?", "exact", ["this\nplace"]),
        ("café", "Où est le café?", "exact", ["café"]),
        ("cafe", "Ou\u0300 est le cafe\u0301?", None, []),
        ("这面国旗", "这面国旗的首都是哪里?", "exact", ["这面国旗"]),
        ("C++", "Who made C++, and who C?", "exact", ["C++"]),
        ("ha ha", "ha ha ha", "exact", ["ha ha ha"]),
        ("the hat", "What brand of suit is the man wearing?", None, []),
        ("this", "What does it do?", None, []),
        ("the dress", "Is that the dres?", None, []),
        ("?!", "What?!", "exact", ["?!"]),
        ("?!", "What?", None, []),
        ("art", "Who starts the party?", None, []),
    ],
)
def test_each_rule_finds_what_it_says(constraint: str, question: str, rule: str | None, places: list[str]) -> None:
    found = find_constraint(constraint, question)
    assert (found and found.rule) == rule
    assert [question[slice(*span)] for span in (found.spans if found else ())] == places


@given(st.lists(st.sampled_from(["cat", "Cat", "the", "dog", "dogs", "été"]), min_size=1, max_size=9), st.data())
def test_words_of_the_question_are_found_wherever_they_stand(words: list[str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(words) - 1))
    chosen = words[start : data.draw(st.integers(start + 1, len(words)))]
    question, constraint = " ".join(words), " ".join(chosen)
    found = find_constraint(constraint, question)
    assert found is not None
    assert found.rule in ("exact", "case")
    covered = {i for a, b in found.spans for i in range(a, b)}
    wanted: set[int] = set()
    for at in range(len(words) - len(chosen) + 1):
        if [word.lower() for word in words[at : at + len(chosen)]] == [word.lower() for word in chosen]:
            begin = len(" ".join(words[:at])) + (at > 0)
            wanted |= set(range(begin, begin + len(constraint)))
    assert covered == wanted
    assert all(b <= c for (_, b), (c, _) in zip(found.spans, found.spans[1:], strict=False)), "they do not overlap"


def test_okvqa_as_released(root: Path) -> None:
    content = (
        ",question,main_entity,image_url\n"
        "0,What sport can you use this for?,this,./val2014/COCO_1.jpg\n"
        "1,What brand of suit is the man in the image wearing?,the suit,./val2014/COCO_1.jpg\n"
        "2,This man is speaking into a?,a?,https://images.host/any/val2014/COCO_1.jpg?size=3\n"
        "3,Is the bird or the dog older?,the goat,./val2014/COCO_1.jpg\n"
        "4,What is this?,this,./val2014/COCO_2.jpg\n"
    )
    found = read(root, content.replace("https://images.host/any/val2014", "https://images.host/val2014"))
    assert [(q.id, said(q), q.answer) for q in found.questions] == [
        ("0", ["this"], None), ("1", ["suit"], None), ("2", ["a?"], None),
    ]  # fmt: skip
    assert {q.images for q in found.questions} == {(root / "val2014" / "COCO_1.jpg",)}
    assert len({q.group for q in found.questions}) == 1, "questions about one picture stay together"
    assert found.matched == {"0": "exact", "1": "determiner", "2": "exact"}
    assert [each.origin for each in found.rejected] == ["file.csv:5", "file.csv:6"]
    assert [each.reason.partition(":")[0] for each in found.rejected] == [
        "constraint not in the question", "missing image",
    ]  # fmt: skip
    assert found.num_rows == 5


def test_known_and_movies_as_released(root: Path) -> None:
    known = (
        ",question,subject,main_entity,image_url\n"
        "0,This building is located in,Space Needle,This building,./A photo of Space Needle\n"
        '1,"This ruler, who passed away in","Knud, Prince of D","This ruler,","./A photo of Knud, Prince of D"\n'
        '2,"This person, whose position is that of a ""superior""",X,"This person,",./A photo of Space Needle\n'
    )
    found = read(root, known)
    assert [said(q) for q in found.questions] == [["This building"], ["This ruler,"], ["This person,"]]
    assert found.questions[2].text.endswith('a "superior"')
    assert [q.images[0].name for q in found.questions[:2]] == [
        "A photo of Space Needle.jpg", "A photo of Knud, Prince of D.png",
    ]  # fmt: skip
    (root / "A photo of Jérôme Salle.jpg").write_bytes((root / "b.png").read_bytes())
    movies = (
        "\ufeff,question,director,main_entity,image_url\r\n"
        "0,Name a movie directed by this director?,Jérôme Salle,this director,./A photo of Jérôme Salle\r\n"
        '1,"Name a movie\r\ndirected by\r\nthis director?",X,this director,./A photo of Jérôme Salle\r\n'
        "2,Name one?,X,this director,./A photo of Jérôme Salle\r\n"
    )
    found = read(root, movies, "movies.csv")
    assert [(q.id, said(q)) for q in found.questions] == [("0", ["this director"]), ("1", ["this director"])]
    assert [each.origin for each in found.rejected] == ["movies.csv:6"], "rows are named by the line they begin at"


OKVQA = {
    # what the cell names, as the question has it -> how it is found there
    "What is this bird called?": ("this bird", "exact", "this bird"),
    "This man is leaning on a?": ("a?", "exact", "a?"),
    "Is this a boat for a boy or girl?": ("this a boat", "exact", "this a boat"),
    "What kind of boat is that?": ("boat is that", "exact", "boat is that"),
    "Which boat is the board he is on?": ("board he", "exact", "board he"),
    # P2's own search raises ValueError on these forms: other case, determiner, number or quotes
    "What happens Here?": ("here", "case", "Here"),
    "What type of hat is this gentleman wearing?": ("this hat", "determiner", "hat"),
    "What brand of suit is he wearing?": ("the suit", "determiner", "suit"),
    "What breeds of dogs are these?": ("this dog", "number", "dogs"),
    "Which bird, or which hat?": ('"this bird"', "determiner", "bird"),
    # and on these three, which are refused: the words are not together in the question
    "What type of bike is on the ground?": ("bike on the ground", None, ""),
    "What animal is clearly on the cover?": ("animal on the cover", None, ""),
    "What is the name of the tall plant?": ("the plant name", None, ""),
}


def test_every_shape_of_the_three_released_files(root: Path) -> None:
    """VQA-Constraints' columns, index, quoting and picture names, and what its rows have in the constraint's cell."""
    (root / 'A photo of Say "no".jpg').write_bytes((root / "b.png").read_bytes())
    table = {
        "okvqa.csv": (
            ",question,main_entity,image_url\n",
            [(question, None, cell, "./val2014/COCO_1.jpg") for question, (cell, _, _) in OKVQA.items()],
        ),
        "multimodal_known.csv": (
            ",question,subject,main_entity,image_url\n",
            [
                ("This tower is located in", "Space Needle", "This tower", "./A photo of Space Needle"),
                (
                    "In this place, the language is",
                    "Knud, Prince of D",
                    "this place,",
                    "./A photo of Knud, Prince of D",
                ),
                ("This text's language is", "x", "This text's", "./A photo of Space Needle"),
                ('This one, a "superior"', "x", "This one,", './A photo of Say "no"'),
                ("The capital of this historical region is", "x", "this historical", "./A photo of Space Needle"),
            ],
        ),
        "multimodal_movies.csv": (
            ",question,director,main_entity,image_url\n",
            [("Name a movie of this director?", "Knud", "this director", "./A photo of Knud, Prince of D")] * 2,
        ),
    }
    for name, (head, rows) in table.items():
        held = io.StringIO()
        writer = csv.writer(held, lineterminator="\n")
        for number, row in enumerate(rows):
            writer.writerow([number, *(cell for cell in row if cell is not None)])
        found = read(root, head + held.getvalue(), name)
        assert [q.answer for q in found.questions] == [None] * len(found.questions), (
            "the model's own answer is followed"
        )
        if name == "okvqa.csv":
            wanted = {q: (rule, place) for q, (_, rule, place) in OKVQA.items() if rule}
            assert {q.text: (found.matched[q.id], said(q)[0]) for q in found.questions} == wanted
            assert [r.reason.partition(":")[0] for r in found.rejected] == ["constraint not in the question"] * 3
        else:
            assert not found.rejected
            assert [(q.text, said(q)[q.first]) for q in found.questions] == [(row[0], row[2]) for row in rows]
            assert [q.images[0].stem for q in found.questions] == [row[3].removeprefix("./") for row in rows]


def test_a_picture_is_looked_for_in_one_way_only(root: Path) -> None:
    row = ",question,main_entity,image_url\n0,What is this?,this,{}\n"
    assert read(root, row.format("http://h/x/b.png")).questions[0].images == (root / "b.png",)
    assert read(root, row.format("http://h/A%20photo%20of%20Space%20Needle.jpg")).questions
    Image.new("RGB", (8, 8)).save(root / "A photo of Space Needle.png")
    with pytest.raises(UserError, match="picture not unique"):
        read(root, row.format("A photo of Space Needle"))
    assert read(root, row.format("A photo of Space Needle.png")).questions
    (root.parent / "secret.png").write_bytes((root / "b.png").read_bytes())
    (root / "link.png").symlink_to(root.parent / "secret.png")
    for place in ("../secret.png", "link.png", "/../secret.png", "http://h/../secret.png"):
        with pytest.raises(UserError, match="image outside the image root"):
            read(root, row.format(place))
    for place in ("", "/", "http://h/", "nothing.jpg"):
        with pytest.raises(UserError, match="missing image"):
            read(root, row.format(place))


def test_an_answer_column_is_used_where_there_is_one(root: Path) -> None:
    found = read(
        root, "id,question,main_entity,image_url,answer,kind\nx,What is it?,it,b.png,A cat,pet\n,It?,It,b.png,,\n"
    )
    assert [(q.id, q.answer, q.kind) for q in found.questions] == [("x", "A cat", "pet"), ("file.csv:3", None, "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (",question,main_entity,image_url\n", "is empty"),
        (",question,entity,image_url\n0,a,b,c\n", "no column 'main_entity'"),
        (",question,question,main_entity,image_url\n0,a,a,b,c\n", "no column 'question', or several"),
        ("question;main_entity;image_url\na;b;c\n", "no column 'question', 'main_entity', 'image_url'"),
        (',question,main_entity,image_url\n0,What?,it,b.png\n1,"What,it,b.png\n', "row that begins at line 3"),
        (",question,main_entity,image_url\n0,Où?,it,b.png\n".encode("latin-1"), "Line 2: invalid"),
        (",question,main_entity,image_url\n0,What?,b.png\n", "wrong number of cells: 3"),
        (",question,main_entity,image_url\n0,,it,b.png\n", "no question"),
        (",question,main_entity,image_url\n0,What?,,b.png\n", "no constraint"),
        ('[{"conversations": [], "image": "b.png"}]', "no question"),
        ('[{"question": "a"', "is not JSON"),
    ],
)
def test_bad_files_are_told_where_and_why(root: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(root, content)
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No file"):
        read_questions(tmp_path / "no.csv")
    with pytest.raises(UserError, match="It is a folder"):
        read_questions(tmp_path)


def test_our_own_rows(root: Path) -> None:
    box = {"name": "flag", "box": [1, 2, 30, 40]}
    found = read_rows(
        root,
        {"id": "a", "image": "b.png", "question": f" {FLAG} ", "constraint": ["capital", "The country"], "group": "g"},
        {"id": "a", "images": ["b.png", "val2014/COCO_1.jpg"], "question": FLAG, "spans": [[12, 19], [43, 49]]},
        {"image": "b.png", "question": "What is there?", "boxes": [box], "answer": "A flag.", "kind": "k"},
        {"question": "Paris or Rome, and Paris again?", "constraint": ["Paris or", "or Rome"]},
    )
    assert not found.rejected
    first, second, third, fourth = found.questions
    assert (said(first), first.group, first.text) == (["capital", "the country"], "g", FLAG)
    assert (said(second), second.id, len(second.images)) == (["capital", "s flag"], "a (file.jsonl:2)", 2)
    assert third.boxes[0].box == (1, 2, 30, 40)
    assert (third.answer, third.kind, third.spans, third.constraint) == ("A flag.", "k", (), "")
    assert (said(fourth), fourth.images, fourth.group) == (["Paris or Rome"], (), "file.jsonl:4")
    assert list(found.matched.values()) == ["case", "spans", "boxes", "exact"]


@pytest.mark.parametrize(
    ("question", "constraint", "first"),
    [
        ("This? What is this?", "this", 1),
        ("this? What is this?", "this", 0),
        ("What hat? Which hats?", "the hat", 0),
        ("A dog, or this cat?", ["this cat", "A dog"], 0),
    ],
)
def test_the_first_place_is_the_first_as_written(root: Path, question: str, constraint: Any, first: int) -> None:
    """As 2406.04236 finds it: the first place that is written as the constraint, upper and lower case included."""
    (found,) = read_rows(root, {"question": question, "constraint": constraint}).questions
    assert found.first == first


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "<image>\nWhat?", "constraint": "What"}, "misplaced image mark"),
        ({"question": "What?"}, "no constraint"),
        ({"question": "What?", "constraint": " "}, "no constraint"),
        ({"question": "What?", "constraint": ["What", "that"]}, "constraint not in the question"),
        ({"question": "What?", "constraint": 3}, "wrong type"),
        ({"question": ["What?"], "constraint": "What"}, "wrong type"),
        ({"question": "What?", "constraint": "What", "answer": 4}, "wrong type"),
        ({"question": "What?", "spans": [[0, 9]]}, "impossible span"),
        ({"question": "What?", "spans": [[2, 2]]}, "impossible span"),
        ({"question": "What?", "spans": [[0, True]]}, "impossible span"),
        ({"question": "What is it?", "spans": [[4, 5]]}, "impossible span"),
        ({"question": "What?", "spans": []}, "wrong type"),
        ({"question": "What?", "spans": "What"}, "wrong type"),
        ({"question": "What?", "boxes": [{"name": "a", "box": [4, 4, 2, 2]}]}, "impossible box"),
        ({"question": "What?", "boxes": [{"name": "a"}]}, "box without a place"),
        ({"question": "What?", "constraint": "What", "image": "../x.png"}, "image outside the image root"),
        ({"question": "What?", "constraint": "What", "image": "http://h/b.png"}, "image is a URL"),
        ({"question": "What?", "constraint": "What", "image": "b.png", "images": ["b.png"]}, "two image lists"),
        (["What?"], "not an object"),
    ],
)
def test_rows_that_cannot_be_used_are_counted_with_the_reason(root: Path, row: Any, reason: str) -> None:
    decision_log().clear()
    found = read_rows(root, {"question": "This?", "constraint": "this"}, row)
    assert [each.origin for each in found.rejected] == ["file.jsonl:2"]
    assert found.rejected[0].reason.startswith(f"{reason}:")
    (said,) = decision_log()
    assert said.value == "1 questions of 2 rows in file.jsonl"
    assert said.reason.endswith(f"1 case; not used: 1 {reason}")


def test_rules_are_in_the_order_they_are_tried() -> None:
    """What is told of several constraints is the last rule that was needed."""
    assert RULES == ("exact", "case", "punctuation", "determiner", "number")


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_a_constraint_say_it_and_no_more(name: str, family: Callable[[str], Path], root: Path) -> None:
    encoder = QuestionEncoder(load_processor(str(family(name))), "{question} Answer in a few words about this.")
    decode = encoder._encoder.processing.processor.tokenizer.decode
    texts = {
        FLAG: "the country with this flag",
        "this, and this: what is this": "this",
        "This building is located in": "This building",
        'Who wrote "Émile ou De l’éducation" in 学校 🏫?': "Émile ou De l’éducation",
        "What is in 学校 🏫 today?": "学校 🏫",
        "What   colour is the unbelievably-old car?": "unbelievably-old car",
        "Is the cat under the table, or the table over the cat?": "the table",
    }
    rows = [{"question": t, "constraint": c, "image": "b.png"} for t, c in texts.items()]
    for question in read_rows(root, *rows).questions:
        encoded = encoder.encode(question)
        assert isinstance(encoded, EncodedQuestion), encoded
        ids = encoded.inputs["input_ids"][0]
        told = [decode(ids[span]).strip() for span in encoded.spans]
        assert told == said(question)
        assert len(told) == question.text.casefold().count(question.constraint.casefold())
        assert decode(ids[encoded.text]).strip() == question.text.strip()
        assert not set(encoded.constraint.tolist()) & set(encoded.image.tolist())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_boxes_are_tokens_of_the_picture(name: str, family: Callable[[str], Path], root: Path) -> None:
    """The halves of a picture share it out, a text has none to look at."""
    processing = load_processor(str(family(name)))
    encoder, tokens = QuestionEncoder(processing), BoxTokens(processing)
    boxes = [[0, 0, 48, 10], [0, 30, 48, 40], [0, 0, 48, 40]]
    rows = [{"question": "What?", "image": "b.png", "boxes": [{"name": "x", "box": box}]} for box in boxes]
    encoded = [encoder.encode(question) for question in read_rows(root, *rows).questions]
    top, bottom, whole = (set(tokens(each).tolist()) for each in encoded)  # type: ignore[arg-type, union-attr]
    assert whole == set(encoded[0].image.tolist())  # type: ignore[union-attr]
    assert top
    assert bottom
    assert max(top) < min(bottom)
    alone = encoder.encode(Question("q", "What?", (), ((0, 4),)))
    assert isinstance(alone, EncodedQuestion)
    assert isinstance(tokens(alone), Rejection)
