"""What is refused is called by its true name, with a way out; the whole message is read."""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_mm.core.errors import UserError
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.data.readers.source import PartReport, ReadOptions, open_source, parse_sources
from lightning_mm.data.sample import Rejection
from tests.helpers.data_forms import chat, llava, picture, pictures, with_bytes


def opened(given: Any, **options: Any) -> list[Any]:
    sources = [open_source(source, ReadOptions(**options)) for source in parse_sources(given)]
    return [row for source in sources for part in source.parts() for row in source.read(part, PartReport())]


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("train.json", "[]")


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, text in members:
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return content.getvalue()


ANSWERED = json.dumps({"question": "Q?", "answer": "a"}).encode()
TAR = tar_of([(f"{index}.json", ANSWERED) for index in range(6)])


def two_answers(path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["Q"]), pa.array(["a"]), pa.array(["b"])], ["question", "answer", "answer"])
    pq.write_table(table, path)


PARQUET = "parquet of the form"
FILES: dict[str, tuple[str, bytes | Callable[[Path], object], str, str]] = {
    "pickle": (
        "a.json",
        pickle.dumps(llava()),
        "It is a pickle, which is not read because it can run code.",
        "Give JSON, ",
    ),
    "HTML": ("a.json", b"\n<!DOCTYPE html>\n<html></html>", "It is an HTML page.", "Download the file itself"),
    "Git LFS": (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n",
        "It is a Git LFS pointer, not the file itself.",
        "Run git lfs pull in its clone.",
    ),
    "zip": ("a.jsonl", zipped, "It is a zip archive.", "Unzip it, and name the file in it."),
    "workbook": ("a.xlsx", zipped, "It is an Excel workbook.", "Save it as CSV."),
    "torch.save": (
        "a.pt",
        zipped,
        "It is a file of torch.save, which is not read because it can run code.",
        "Give JSON, ",
    ),
    "UTF-16": ("a.csv", "a,b".encode("utf-16"), "It is text in UTF-16.", "Save it as UTF-8."),
    "picture": ("a.json", picture("red"), "It is a PNG picture.", "Name the file with the rows about it."),
    "binary": ("a.bin", bytes(64), "It is a binary file of an unknown kind.", "Give JSON, "),
    "pickle in gzip": (
        "a.json.gz",
        gzip.compress(pickle.dumps(1)),
        "It is a pickle, which is not read because it can run code, within gzip.",
        "Give JSON, ",
    ),
    "broken gzip": (
        "a.jsonl.gz",
        gzip.compress(json.dumps(llava()[0]).encode() * 999)[:-12],
        "It is a gzip file whose content is cut off or damaged: ",
        "Copy or download it again.",
    ),
    "broken parquet": (
        "a.parquet",
        b"PAR1" + bytes(20) + b"PAR1",
        "It is parquet by its first bytes",
        "Copy or download it",
    ),
    "broken tar": ("a.tar", b"a" * 257 + b"ustar" + b"b" * 999, "The tar is cut off or damaged: ", "Copy it again."),
    "a tar with a damaged header": (
        "a.tar",
        TAR[:2048] + b"X" * 99 + TAR[2147:],
        "The tar is cut off or damaged: bad checksum.",
        "Copy it again.",
    ),
    "a tar without its end": (
        "a.tar",
        TAR[:4096],
        "The tar is cut off or damaged: it stops without the mark of its end.",
        "Copy it again.",
    ),
    "parquet with a column twice": ("a.parquet", two_answers, "A row has one of each.", "Rename one of them."),
    "a pipe": ("a.json", os.mkfifo, "It is a pipe or a device, not a file.", "Save its content to a file."),
    "lz4": ("a.jsonl.lz4", b"\x04\x22\x4d\x18" + bytes(9), "It is compressed by lz4.", "Decompress it first."),
    "UTF-16 without its mark": (
        "a.json",
        '[{"a": 1}]'.encode("utf-16-le"),
        "It is text in UTF-16.",
        "Save it as UTF-8.",
    ),
    "XML": ("a.xml", b"<?xml version='1.0'?><a/>", "It is an XML file.", "Give JSON, "),
    "broken CSV": (
        "a.csv",
        b'question,answer\nq,"a\n',
        "The row that begins at line 2: unexpected end of data.",
        "Mend it: a cell with delimiters",
    ),
    "columns twice": ("a.csv", b"a,a\n1,2\n", "Its first line names the columns.", "Rename one of them."),
    "empty CSV": ("a.csv", b"question,answer\n", "It holds no row.", "Name a file with at least one"),
    "COCO's boxes": (
        "a.json",
        json.dumps({"images": [{"id": 1}], "annotations": [{"bbox": [1]}]}).encode(),
        "It is one JSON object with lists of rows under 'images', 'annotations'.",
        "Write the list that is meant into a file of its own.",
    ),
    "VQAv2 without answers": (
        "a_questions.json",
        json.dumps({"questions": [{"image_id": 1, "question_id": 2, "question": "q"}]}).encode(),
        "It is VQAv2's file of questions; that of the annotations is not beside it.",
        "Put it there, under the same name with annotations in place of questions.",
    ),
    "broken object": (
        "a.json",
        b'{\n "data": [\n',
        "The row that begins at line 1: Expecting value: line 3",
        "Mend it there.",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_called_what_it_is(tmp_path: Path, name: str) -> None:
    file, content, why, fix = FILES[name]
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    else:
        content(tmp_path / file)
    with pytest.raises(UserError) as caught:
        opened(str(tmp_path / file))
    assert str(tmp_path / file) in caught.value.what
    assert caught.value.why.startswith(why)
    assert caught.value.fix.startswith(fix)


SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "DPO": (
        {"prompt": "Q?", "chosen": "a", "rejected": "b"},
        "preference row: it has 'rejected', and supervised fine-tuning has no use for a rejected answer; to learn "
        "'chosen' alone, name it: columns response=chosen",
    ),
    "OpenAI's DPO": (
        {
            "input": {"messages": chat("a")[:1]},
            "preferred_output": chat("a")[1:],
            "non_preferred_output": chat("b")[1:],
        },
        "preference row: it has 'non_preferred_output', and supervised fine-tuning has no use for a rejected answer",
    ),
    "ms-swift's DPO": (
        {"messages": chat("a"), "rejected_response": "b"},
        "preference row: it has 'rejected_response', and supervised fine-tuning has no use for a rejected answer",
    ),
    "KTO": (
        {"prompt": "Q?", "completion": "a", "label": False},
        "preference row: 'label' says whether the answer is wanted (KTO), and supervised fine-tuning has no use for a "
        "rejected answer; keep the rows where it is true, without 'label'",
    ),
    "two conversations": (
        {"messages": chat("a"), "conversations": chat("b")},
        "two conversations: both 'conversations' and 'messages' are given; name one, as columns messages=conversations",
    ),
    "two answers": (
        {"problem": "Q?", "solution": "So it is 2.", "answer": "2"},
        "two answers: 'answer' and 'solution' may be the answer; name one, as columns response=answer",
    ),
    "two questions": (
        {"question": "Q?", "prompt": "P?", "answer": "2"},
        "two questions: 'question' and 'prompt' may be the question; name one, as columns prompt=question",
    ),
    "text alone": (
        {"text": "Once upon a time."},
        "no conversation: the row is text alone, and nothing says which part of it is the answer",
    ),
    "nothing known": (
        {"a": 1, "b": "c"},
        "no conversation: no 'conversations' or 'messages' with turns, no question with its answer; the row has 'a', "
        "'b'",
    ),
    "audio": ({"messages": chat("a"), "audios": ["a.wav"]}, "audio: the row has 'audios', and audio is not trained on"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_refused_before_all_rows_are_read(tmp_path: Path, name: str) -> None:
    row, reason = SHAPES[name]
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        opened(str(tmp_path / "t.jsonl"))
    assert caught.value.what == f"None of the 1 rows of {tmp_path / 't.jsonl'} can be used."
    assert caught.value.why == f"The first of them:\n    t.jsonl:1: {reason}"


def asked(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a weight": (
        {"messages": chat("a", weight=0.5)},
        "training weight: 'weight' of the turn is 0.5, only 0 (context) and 1 (learned) are obeyed; drop the "
        "key if it means something else",
    ),
    "a weight of the row": (
        {"messages": chat("a"), "loss_weight": 2},
        "training weight: 'loss_weight' of the row is 2, only 0 (context) and 1 (learned) are obeyed; drop the "
        "key if it means something else",
    ),
    "a mask": (
        {"messages": chat("a", mask=True)},
        "unclear training mark: 'mask' of the turn may mean learned or left out; use 'loss': true or false, or drop it",
    ),
    "a mark in other words": (
        {"messages": chat("a", loss="maybe")},
        "unclear training mark: 'loss' of the turn is 'maybe'; use true or false, or drop it",
    ),
    "more marks of other models than pictures": (
        {"image": "red.png", **asked("<|image|><|image|>Q?")},
        "marks and images differ: 2 <|image|> marks, 1 images",
    ),
    "options that are no list": (
        {"question": "Q?", "choices": "['b' 'c']", "answer": 1},
        "options are no list: 'choices' is \"['b' 'c']\"; write it as JSON",
    ),
    "a link without a suffix": (
        {"image_url": "https://example.org/a", "question": "Q?", "answer": "a"},
        "image is a URL: 'https://example.org/a', nothing is fetched from the network; download it first, or give "
        "data.fetch true",
    ),
    "a name longer than one can be": (
        {"image": "x" * 300, "question": "Q?", "answer": "a"},
        f"impossible image path: {'x' * 40!r}... is longer than a file name can be",
    ),
    "marks that differ": (
        {"messages": chat("a", loss=0, weight=1)},
        "training marks differ: loss is False, weight is True",
    ),
    "a user that is learned": (
        {"messages": [{"role": "user", "content": "Q?", "loss": True}, {"role": "assistant", "content": "a"}]},
        "training mark on the user: only turns of the assistant are learned",
    ),
    "nothing learned": (
        {"messages": chat("a", loss=False)},
        "nothing to learn: every answer is marked as context only",
    ),
    "a row that is not learned": (
        {"messages": chat("a"), "train": False},
        "nothing to learn: every answer is marked as context only",
    ),
    "boxes to fill in": (
        {**asked("Find <ref-object>."), "objects": {"ref": ["it"], "bbox": [[1, 2, 3, 4]]}},
        "boxes to fill in: <ref-object> stand for entries of 'objects', which every model writes in its own way; write "
        "names and coordinates into the text as your model does",
    ),
    "a video that is not there": (asked("<video>Q?"), "marks and videos differ: 1 <video> marks, 0 videos"),
    "audio in a part": (
        asked([{"type": "input_audio", "input_audio": {}}]),
        "audio: {'type': 'input_audio', 'input_audio': {}} is audio, which is not trained on",
    ),
    "an audio mark": (asked("<audio>Q?"), "audio: a turn of the user has <audio>, and audio is not trained on"),
    "a link": (
        {"image": "https://example.org/a.jpg", "question": "Q?", "answer": "a"},
        "image is a URL: 'https://example.org/a.jpg', nothing is fetched from the network; download it first, or give "
        "data.fetch true",
    ),
    "base64 that is none": (
        {"image": "data:image/png;base64,????", "question": "Q?", "answer": "a"},
        "invalid base64: the image 't.jsonl:2 image 0' does not decode, Only base64 data is allowed",
    ),
    "two lists of pictures": (
        {"image": "red.png", **asked([{"type": "image", "image": "blue.png"}])},
        "two image lists: the turns name images, and so does 'image'",
    ),
    "an option out of range": (
        {"question": "Q?", "choices": ["x", "y"], "answer": 2},
        "answer is no option: 'answer' is 2, indices of 2 options begin at 0",
    ),
    "an option that may be two": (
        {"question": "Q?", "choices": ["1", "2", "3"], "answer": "2"},
        "answer is no option: 'answer' is '2', which may be B or C of {'A': '1', 'B': '2', 'C': '3'}",
    ),
    "an answer that is yes or true": ({"question": "Q?", "answer": True}, "wrong type: 'answer' is True, not text"),
    "a picture by an id that is not there": (
        {"question": "Q?", "answer": "a", "image_id": 5},
        "missing image: no file is named after the id '5', as 5.jpg",
    ),
    "text alone among others": (
        {"text": "Once upon a time."},
        "no conversation: the row is text alone, and nothing says which part of it is the answer",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_refused_by_its_reason(tmp_path: Path, name: str) -> None:
    row, reason = ROWS[name]
    pictures(tmp_path)
    good = {"messages": chat("a", loss=True, weight=1), "weight": 1, "train": "train2014"}
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [good, row, good]))
    first, second, third = opened(str(tmp_path / "t.jsonl"))
    assert second == Rejection("t.jsonl:2", reason)
    assert first.turns == third.turns


def test_what_only_looks_like_a_refusal_is_read(tmp_path: Path) -> None:
    """Columns of other data that have the names of what is refused above."""
    rows = [
        {"messages": chat("a"), "label": 3, "margin": 0.5, "ranking": 7, "split": "train", "train": "yes"},
        {"messages": chat("a"), "rejected": None, "audio": None, "video": "", "mask": {"bytes": "x"}},
        {"prompt": "Q?", "completion": "<video> is a tag.", "url": "https://example.org", "file_path": "src/a.py"},
        asked("Is <b> a tag?"),
        {"question": "Q?", "answer": "a", "choices": []},
        {"question": "Q?", "answer": "It depends.", "options": "none given"},
        {"question": "Q?", "answer": "a", "figure_url": "https://example.org/a.png", "mask_image": "m.png", "a1": "b"},
        {"question": "What does <|image|> mean?", "answer": "It marks a picture."},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row for row in opened(str(tmp_path / "t.jsonl")) if isinstance(row, Rejection)] == []


def test_named_columns_and_entries_that_are_not_there(tmp_path: Path) -> None:
    path = str(tmp_path / "t.jsonl")
    Path(path).write_text(json.dumps({"a": "Q?", "b": "A."}) + "\n")
    assert opened({"path": path, "columns": {"prompt": "a", "response": "b"}})[0].turns[1].text == "A."
    with pytest.raises(UserError, match=r"has no column 'c'(.|\n)*Its columns are 'a', 'b'"):
        opened({"path": path, "columns": {"prompt": "a", "response": "c"}})
    with pytest.raises(UserError, match=r"columns of .* name 'prmpt'(.|\n)*Did you mean prompt\?"):
        opened({"path": path, "columns": {"prmpt": "a"}})
    with pytest.raises(UserError, match="Source has no argument colums"):
        opened({"path": path, "colums": {}})
    info = {"one": {"file_name": "t.jsonl", "ranking": True}, "two": {"script_url": "x"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    for name, why in (
        ("", "compare answers"),
        ("#two", "only file_name and hf_hub_url"),
        ("#three", "It has one, two"),
    ):
        with pytest.raises(UserError, match=why):
            opened(str(tmp_path / "dataset_info.json") + name)


def test_splits(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict(train_sft=with_bytes(), test_sft=with_bytes()).save_to_disk(tmp_path / "odd")
    with pytest.raises(UserError, match=r"no split for train(.|\n)*train_sft, test_sft(.|\n)*Name the one"):
        opened(str(tmp_path / "odd"))
    assert len(opened({"path": str(tmp_path / "odd"), "split": "train_sft"})) == 3
    datasets.DatasetDict(train=with_bytes(), test=with_bytes().select([0])).save_to_disk(tmp_path / "even")
    assert [len(opened(str(tmp_path / "even"), split=split)) for split in ("train", "validation", "test")] == [3, 1, 1]
    with pytest.raises(UserError, match="no split 'dev'"):
        opened({"path": str(tmp_path / "even"), "split": "dev"})
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.json").write_text(json.dumps(llava("", image=False)))
    pandas.DataFrame({"question": ["Q?"], "answer": ["a"]}).to_csv(tmp_path / "mixed/b.csv")
    with pytest.raises(UserError, match=r"several kinds(.|\n)*1 x \.json, 1 x \.csv"):
        opened(str(tmp_path / "mixed"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="holds no file of rows"):
        opened(str(tmp_path / "bare"))


def test_a_tar_writes_nothing_and_reads_no_link(tmp_path: Path) -> None:
    """Names that lead out of a folder are keys like others: nothing is extracted."""
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, content in (
            ("../../evil.json", json.dumps({"question": "Q?", "answer": "a"}).encode()),
            ("/etc/x.json", json.dumps({"question": "Q?", "answer": "b"}).encode()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("/etc/x.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    rows = opened(str(tmp_path / "t.tar"))
    assert [row.turns[1].text for row in rows] == ["a", "b"]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "t.tar"]


def test_members_apart_are_not_read_as_two_rows(tmp_path: Path) -> None:
    members = [("a.png", picture("red")), ("b.json", ANSWERED), ("a.json", ANSWERED)]
    (tmp_path / "t.tar").write_bytes(tar_of(members))
    _, read, apart = opened(str(tmp_path / "t.tar"))
    assert [turn.text for turn in read.turns] == ["Q?", "a"]
    assert apart == Rejection("t.tar:a", "members apart: those of 'a' do not follow one another; sort the tar by name")


def test_dates_that_python_does_not_have(tmp_path: Path) -> None:
    table = pa.table({"question": ["Q?"], "answer": ["a"], "at": pa.array([2**60], pa.timestamp("ms"))})
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as file:
        file.write_table(table)
    (row,) = opened(str(tmp_path / "t.arrow"))
    assert row.extra["at"] == 2**60


def test_addresses_and_patterns_of_folders(tmp_path: Path) -> None:
    (tmp_path / "my rows").mkdir()
    (tmp_path / "my rows/t.jsonl").write_bytes(ANSWERED)
    assert opened((tmp_path / "my rows/t.jsonl").as_uri())[0].turns[1].text == "a"
    with pytest.raises(UserError, match="It is an address"):
        opened("https://example.org/t.jsonl")
    with pytest.raises(UserError, match="Only folders do"):
        opened(str(tmp_path / "my*"))


def test_a_bomb_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mm.data.readers.json_rows.MAX_ROW_CHARACTERS", 10_000)
    good = json.dumps(llava("", image=False)[0]).encode()
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(good + b"\n" + b" " * 10_000_000 + b"\n" + good))
    read = read_conversations(tmp_path / "t.jsonl.gz")
    assert [each.origin for each in read.samples] == ["t.jsonl.gz:1", "t.jsonl.gz:3"]
    assert [each.reason.partition(":")[0] for each in read.rejections] == ["row too large"]
