"""Rows become Samples or ledger entries that name file, line and reason; nothing else can come of any file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data.readers.conversations import (
    MAX_ROW_CHARACTERS,
    ConversationFile,
    InvalidRow,
    RowReader,
    read_conversations,
)
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.sample import Rejection, Turn

ASK = {"from": "human", "value": "What?"}
ANSWER = {"from": "gpt", "value": "A cat."}
GOOD = {"conversations": [ASK, ANSWER]}

Lines = Callable[..., ConversationFile]


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    """Write rows (or raw text) as JSONL beside a.jpg and b.jpg, and read them back."""
    (tmp_path / "a.jpg").touch()
    (tmp_path / "b.jpg").touch()

    def write(*rows: object, **options: Any) -> ConversationFile:
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / "t.jsonl").write_text(text, encoding="utf-8")
        return read_conversations(tmp_path / "t.jsonl", **options)

    return write


def test_llava_rows(lines: Lines, tmp_path: Path) -> None:
    row = {
        "id": 7,
        "image": ["a.jpg", "b.jpg"],
        "question_type": "shape",
        "boxes": [[1, 2, 3, 4]],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image> or <image>?"},
            {"from": "gpt", "value": "Both", "type": "colour"},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes"},
        ],
    }
    (sample,) = lines(row).samples
    assert sample.id == "7"
    assert sample.origin == "t.jsonl:1"
    assert sample.images == (tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert sample.turns == (
        Turn("system", "Be brief."),
        Turn("user", "<image> or <image>?"),
        Turn("assistant", "Both", "colour"),
        Turn("user", "Sure?"),
        Turn("assistant", "Yes", "shape"),
    )
    assert sample.extra == {"boxes": [[1, 2, 3, 4]]}


def test_hf_rows(lines: Lines, tmp_path: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    named = [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "What?"}]
    samples = lines(
        {"messages": said, "images": ["a.jpg"]},
        {"messages": [{"role": "user", "content": named}, said[1]]},
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]},
            ]
        },
    ).samples
    assert samples[0].turns == samples[1].turns == (Turn("user", "<image>What?"), Turn("assistant", "A cat."))
    assert samples[0].images == samples[1].images == (tmp_path / "a.jpg",)
    assert samples[2].turns[1].text == "Ho"


def test_a_json_list_reads_as_its_lines_do(lines: Lines, tmp_path: Path) -> None:
    rows = [GOOD, {"conversations": []}, {"image": "a.jpg", **GOOD}]
    (tmp_path / "t.json").write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    as_list, as_lines = read_conversations(tmp_path / "t.json"), lines(*rows)
    assert [s.turns for s in as_list.samples] == [s.turns for s in as_lines.samples]
    assert [r.reason for r in as_list.rejections] == [r.reason for r in as_lines.rejections]
    text = json.dumps(rows, indent=2).split("\n")
    for origin, index in ((as_list.samples[0].origin, 0), (as_list.samples[1].origin, 2)):
        line = int(origin.removeprefix("t.json:").removesuffix(f"[{index}]"))
        assert text[line - 1] == "  {"


def test_missing_marks_go_in_front_and_are_told(lines: Lines) -> None:
    decision_log().clear()
    (sample,) = lines({"image": ["a.jpg", "b.jpg"], **GOOD}).samples
    assert sample.turns[0].text == "<image>\n<image>\nWhat?"
    assert [d.name for d in decision_log()][-1] == "data.image_marks"


BAD: dict[str, tuple[object, str]] = {
    "no object": ([1, 2], "not an object"),
    "nothing said": ({"id": 1}, "no conversation"),
    "turns of text": ({"conversations": ["hi"]}, "wrong type"),
    "a number as text": ({"conversations": [{"from": "human", "value": 3}, ANSWER]}, "wrong type"),
    "a number as image": ({"image": 3, **GOOD}, "wrong type"),
    "unknown role": ({"conversations": [{"from": "nurse", "value": "x"}, ANSWER]}, "unknown role"),
    "video part": ({"messages": [{"role": "user", "content": [{"type": "video"}]}, ANSWER]}, "marks and videos differ"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "unknown content part"),
    "no answer": ({"conversations": [ASK]}, "no answer"),
    "empty answer": ({"conversations": [ASK, {"from": "gpt", "value": " \n"}]}, "empty turn"),
    "answer first": ({"conversations": [ANSWER, ASK]}, "no question"),
    "mark too many": ({"conversations": [{"from": "human", "value": "<image>?"}, ANSWER]}, "marks and images differ"),
    "image too many": (
        {"image": ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": "<image>?"}, ANSWER]},
        "marks and images differ",
    ),
    "mark in the answer": (
        {"image": "a.jpg", "conversations": [ASK, {"from": "gpt", "value": "<image>"}]},
        "misplaced image mark",
    ),
    "two lists": ({"image": "a.jpg", "images": ["b.jpg"], **GOOD}, "two image lists"),
    "missing image": ({"image": "c.jpg", **GOOD}, "missing image"),
    "a folder": ({"image": ".", **GOOD}, "missing image"),
    "above the root": ({"image": "../x.jpg", **GOOD}, "image outside the image root"),
    "absolute": ({"image": "/etc/hostname", **GOOD}, "image outside the image root"),
    "a link out": ({"image": "link.jpg", **GOOD}, "image outside the image root"),
    "URL": ({"image": "https://example.org/a.jpg", **GOOD}, "image is a URL"),
    "data URL": ({"image": "data:image/png;base64,AA?A", **GOOD}, "invalid base64"),
    "NUL": ({"image": "a\0.jpg", **GOOD}, "impossible image path"),
    "too long a name": ({"image": "a" * 5000, **GOOD}, "impossible image path"),
    "NaN": ('{"score": NaN, "conversations": []}', "not JSON"),
    "Infinity": ('{"score": [-Infinity]}', "not JSON"),
    "cut off": ('{"conversations": [', "not JSON"),
    "two in a line": ("{} {}", "not JSON"),
    "a mark of order within": ("\ufeff{}", "not JSON"),
    "deeply nested": ("[" * 100_000, "not JSON"),
    "a huge number": ("1" * 5000, "not JSON"),
    "huge": ({"blob": "x" * MAX_ROW_CHARACTERS, **GOOD}, "row too large"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_told_and_the_others_stay(lines: Lines, tmp_path: Path, name: str) -> None:
    (tmp_path / "link.jpg").symlink_to("/etc/hostname")
    row, category = BAD[name]
    rows = lines(GOOD, row, {"image": "a.jpg", **GOOD})
    assert [(r.origin, r.reason.partition(":")[0]) for r in rows.rejections] == [("t.jsonl:2", category)]
    assert [sample.origin for sample in rows.samples] == ["t.jsonl:1", "t.jsonl:3"]
    assert rows.num_rows == 3


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\n\xff\xfe\n" + good)
    rows = read_conversations(tmp_path / "t.jsonl")
    assert [sample.origin for sample in rows.samples] == ["t.jsonl:1", "t.jsonl:3"]
    assert rows.rejections[0].reason.startswith("not UTF-8")


def test_links_within_the_root_are_followed(lines: Lines, tmp_path: Path) -> None:
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    assert lines({"image": "link.jpg", **GOOD}).samples[0].images == (tmp_path / "a.jpg",)


def test_an_image_root_of_its_own(lines: Lines, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "c.jpg").touch()
    rows = lines({"image": "c.jpg", **GOOD}, {"image": "../a.jpg", **GOOD}, image_root=tmp_path / "pictures")
    assert rows.samples[0].images == (tmp_path / "pictures" / "c.jpg",)
    assert rows.rejections[0].reason.startswith("image outside")


def test_open_questions(lines: Lines) -> None:
    open_question = {"conversations": [ASK, ANSWER, {"from": "human", "value": "And now?"}]}
    (sample,) = lines(open_question, answers_required=False).samples
    assert sample.turns[-1] == Turn("assistant", "")
    assert sample.answers == (1, 3)


@pytest.mark.parametrize(
    "text", ["", "\n \n", "[]", "{}", "[1, 2", '[{"a": 1} {"b": 2}]', "[] x", "nonsense", "\ufeff"]
)
def test_a_useless_file_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.json"):
        read_conversations(tmp_path / "t.json")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_conversations(tmp_path / "t.json")
    with pytest.raises(UserError, match="folder"):
        read_conversations(tmp_path)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
turn = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from(["human", "gpt", "system"]) | anything,
        "role": st.sampled_from(["user", "assistant"]) | anything,
        "value": st.text(max_size=5) | st.just("<image>") | anything,
        "content": st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"])}) | anything) | anything,
        "type": st.text(max_size=3) | anything,
    },
)
almost_a_row = st.fixed_dictionaries(
    {},
    optional={
        "id": anything,
        "image": st.just("a.jpg") | st.text(max_size=6) | anything,
        "images": st.lists(st.just("a.jpg") | anything, max_size=3) | anything,
        "conversations": st.lists(turn, max_size=4) | anything,
        "messages": st.lists(turn, max_size=4) | anything,
        "question_type": anything,
    },
)


@settings(max_examples=300, deadline=None)
@given(row=almost_a_row | anything)
def test_any_row_is_a_sample_or_a_reason(tmp_path_factory: pytest.TempPathFactory, row: object) -> None:
    root = tmp_path_factory.getbasetemp()
    (root / "a.jpg").touch()
    reason = None
    try:
        sample = RowReader(root).sample(row, "t.json:1")
    except InvalidRow as error:
        reason = str(error)
    if reason is not None:
        assert ": " in reason
        return
    assert sum(turn.text.count("<image>") for turn in sample.turns) == len(sample.images)
    assert all(turn.text.strip() for turn in sample.turns)
    assert sample.answers
    assert all(path.is_relative_to(root) and path.is_file() for path in sample.images)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{os.getpid()}.json"
    path.write_bytes(data)
    with pytest.raises(UserError):
        read_conversations(path)


def test_the_ledger_counts_and_stops(tmp_path: Path) -> None:
    ledger = RejectedSamples(max_bad_fraction=0.02)
    ledger.num_rows["train"] = 100
    ledger.add([Rejection("t.json:1", "missing image: 'a'"), Rejection("t.json:2", "missing image: 'b'")], "train")
    ledger.add([Rejection("t.json:2", "missing image: 'b'"), Rejection("t.json:9", "cut: 9 tokens", "cut")], "train")
    ledger.check()
    assert ledger.counts() == {"missing image": 2, "cut": 1}
    ledger.add([Rejection("t.json:3", "not JSON: x")], "train")
    with pytest.raises(UserError, match=r"3 of 100 rows of data\.train") as caught:
        ledger.check()
    assert "2 x missing image" in caught.value.why
    assert "t.json:1: missing image: 'a'" in caught.value.why
    ledger.write(tmp_path / "ledger.jsonl")
    written = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert len(written) == 4
    assert written[2] == {
        "origin": "t.json:9",
        "reason": "cut: 9 tokens",
        "kind": "cut",
        "split": "train",
        "source": "",
    }


def test_rows_that_are_too_long_name_their_options() -> None:
    ledger = RejectedSamples()
    ledger.num_rows["train"] = 2
    ledger.add([Rejection("t.json:1", "too long: the first answer begins at token 9, the limit is 4")], "train")
    with pytest.raises(UserError) as caught:
        ledger.check()
    assert caught.value.fix.startswith("Raise data.max_length, or give data.max_pixels")
    ledger.add([Rejection("t.json:2", "missing image: 'a'")], "train")
    with pytest.raises(UserError) as caught:
        ledger.check()
    assert caught.value.fix.startswith("Mend these rows, or allow more")
