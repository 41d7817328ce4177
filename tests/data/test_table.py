"""The table on disk holds what the readers gave, is made once for the same content, and anew for other content."""

import json
import os
import pickle
import random
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.data import table
from lightning_mm.data.image_source import ImageBytes, StoredImage, image_file, open_arrow
from lightning_mm.data.images import load
from lightning_mm.data.picture_check import check_pictures
from lightning_mm.data.readers import json_rows, row_files
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.data.readers.source import Part
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.row_table import RowTable, TablePart
from lightning_mm.data.sample import Rejection, Sample, Turn
from lightning_mm.data.split import Split, SplitOptions, open_split
from lightning_mm.data.table import store_table

Open = Callable[..., Split]


@pytest.fixture
def split(tmp_path: Path) -> Open:
    def make(path: Path | str, rejected: RejectedSamples | None = None, **options: Any) -> Split:
        options = {"cache": tmp_path / "cache", **options}
        return open_split(
            "train", str(path), SplitOptions(**options), RejectedSamples(0.5) if rejected is None else rejected
        )

    return make


def rows(number: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": str(index),
            "image": f"{index % 3}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat, {index}?"},
                {"from": "gpt", "value": f"Ünd {index}.", "type": "t"},
            ],
            "boxes": [index, None, {"a": 1.5}],
            **more,
        }
        for index in range(number)
    ]


def write(folder: Path, content: list[dict[str, Any]], name: str = "t.json") -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(3):
        if not (folder / f"{index}.png").exists():
            Image.new("RGB", (20 + index, 30)).save(folder / f"{index}.png")
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder / name


def test_rows_are_what_the_reader_gives(tmp_path: Path, split: Open) -> None:
    file = write(tmp_path, rows(50))
    table, read = split(file).samples, read_conversations(file).samples
    assert [replace(sample, source="") for sample in table] == list(read)
    assert table[-1].sizes == ((21, 30),)
    assert [sample.id for sample in table[1::20]] == ["1", "21", "41"]
    assert table.num_images().tolist() == [1] * 50
    assert table.answer_counts() == {("t", f"Ünd {index}."): 1 for index in range(50)}


class _Given:
    """Samples that stand for a source."""

    def __init__(self, samples: Sequence[Sample | Rejection]) -> None:
        from lightning_mm.data.readers.source import Source

        self.samples, self.source, self.shape, self.files = samples, Source("memory", "memory"), "as given", ()

    def identity(self) -> dict[str, Any]:
        return {"samples": pickle.dumps(self.samples).hex()}

    def parts(self) -> list[Part]:
        return [Part(0, row_files.FilePart())]

    def read(self, part: Any, report: Any) -> Any:
        return iter(self.samples)


_TEXT = st.text(max_size=20)
_IMAGES = st.lists(
    st.one_of(st.binary(max_size=8).map(lambda data: ImageBytes("a.png", data)), st.just(Path("/a/b.png"))), max_size=3
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(
        st.builds(Turn, st.sampled_from(["user", "assistant", "system", "tool"]), _TEXT, _TEXT, st.booleans(), _TEXT),
        max_size=4,
    ),
    images=_IMAGES,
    videos=_IMAGES,
    extra=st.dictionaries(_TEXT, st.one_of(st.integers(), _TEXT, st.none(), st.lists(st.booleans()))),
    tools=_TEXT,
)
def test_any_sample_survives(
    tmp_path: Path, turns: list[Turn], images: list[Any], videos: list[Any], extra: dict[str, Any], tools: str
) -> None:
    sample = Sample("7", tuple(turns), tuple(images), "t:1", extra, tuple(videos), tools)
    stored = store_table(_Given([sample, Rejection("t:2", "why")]), tmp_path)  # type: ignore[arg-type]
    assert [each.reason for each in stored.rejections] == ["why"]
    (part,) = stored.parts
    (found,) = _unchecked(RowTable([TablePart(part.file, "", part.num_rows, part.digest)]))
    assert replace(found, images=(), videos=()) == replace(sample, images=(), videos=())
    for before_all, kept in ((images, found.images), (videos, found.videos)):
        assert [each.name for each in kept] == [each.name for each in before_all]
        for before, after in zip(before_all, kept, strict=True):
            assert after == before if isinstance(before, Path) else after.read_bytes() == before.data


def _unchecked(table: RowTable) -> list[Sample]:
    from lightning_mm.data.picture_check import check_pictures

    check_pictures([part.file for part in table.parts], 0, 40.0)
    return list(table)


def test_half_a_surrogate_pair_is_a_reason(tmp_path: Path) -> None:
    turns = (Turn("user", "What?"), Turn("assistant", "broken \ud83d"))
    stored = store_table(_Given([Sample("1", turns, origin="t:1")]), tmp_path)  # type: ignore[arg-type]
    assert (stored.num_read, stored.num_rows) == (1, 0)
    assert [each.reason for each in stored.rejections] == ["not text: the assistant holds half of a surrogate pair"]


def test_pictures_in_the_table(tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((40, 30)).save(tmp_path / "a.png")
    image = ImageBytes("inside.png", (tmp_path / "a.png").read_bytes())
    sample = Sample("1", (Turn("user", "<image>"), Turn("assistant", "a")), (tmp_path / "a.png", image), "t:1")
    stored = store_table(_Given([sample]), tmp_path / "cache")  # type: ignore[arg-type]
    (found,) = _unchecked(RowTable([TablePart(stored.parts[0].file, "", 1, "")]))
    assert found.sizes == ((40, 30), (40, 30))
    file, inside = found.images
    assert isinstance(inside, StoredImage)
    assert load(inside).image.tobytes() == load(file).image.tobytes()
    assert image_file(inside).read_bytes() == image.data
    assert image_file(file) == tmp_path / "a.png"
    opened = datasets.Dataset.from_file(str(stored.parts[0].file))
    assert opened[0]["images_bytes"] == [None, image.data]


def test_a_table_is_made_once_for_its_content(tmp_path: Path, split: Open) -> None:
    content = rows(9)
    file = write(tmp_path / "a", content)
    first = split(file)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    os.utime(file, (1, 1))
    again = split(file)
    assert again.tables == first.tables
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    elsewhere = split(write(tmp_path / "b", content))
    assert elsewhere.samples.fingerprint == first.samples.fingerprint
    assert elsewhere.samples[0].images[0].read_bytes() == first.samples[0].images[0].read_bytes()


@pytest.mark.parametrize("change", ["order", "answer", "picture", "number"])
def test_other_content_is_another_table(change: str, tmp_path: Path, split: Open) -> None:
    content = rows(9)
    first = split(write(tmp_path, content)).samples
    if change == "order":
        random.Random(0).shuffle(content)
    elif change == "answer":
        content[3]["conversations"][1]["value"] = "Other."
    elif change == "picture":
        content[3]["image"] = "1.png"
    else:
        content.pop()
    second = split(write(tmp_path, content)).samples
    assert second.fingerprint != first.fingerprint
    assert [sample.id for sample in second] == [row["id"] for row in content]


def test_parts_of_a_list_are_found_once(tmp_path: Path, split: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "PART_BYTES", 500_000)
    path = write(tmp_path, rows(3000, more="x" * 500))
    first = split(path)
    assert len(first.tables[0].parts) > 2
    monkeypatch.setattr(json_rows, "list_places", lambda *_: pytest.fail("looked for parts again"))
    again = split(path)
    assert again.tables == first.tables
    assert [sample.origin for sample in again.samples] == [f"t.json:1[{index}]" for index in range(3000)]


def test_a_row_that_falls_out_changes_the_fingerprint(tmp_path: Path, split: Open) -> None:
    file = write(tmp_path, rows(9))
    before = split(file).samples.fingerprint
    (tmp_path / "2.png").unlink()
    after = split(file).samples
    assert (len(after), after.fingerprint != before) == (6, True)


def test_a_name_that_is_not_utf8(tmp_path: Path, split: Open) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    file = write(folder, rows(3))
    table = split(file).samples
    assert [load(sample.images[0]).image.size for sample in table] == [(20, 30), (21, 30), (22, 30)]


def _in_other_process(table: RowTable, index: int, queue: Any) -> None:
    queue.put(table[index])


def test_a_table_goes_to_other_processes(tmp_path: Path, split: Open) -> None:
    table = split(write(tmp_path, rows(9))).samples
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_other_process, args=(table, 5, queue))
    process.start()
    assert queue.get(timeout=60) == table[5]
    process.join()


def test_a_cache_that_cannot_be_written(tmp_path: Path, split: Open) -> None:
    (tmp_path / "full").write_text("a file")
    with pytest.raises(UserError, match=r"The table of .* cannot be written") as caught:
        split(write(tmp_path, rows(3)), cache=tmp_path / "full" / "cache")
    assert "--data.cache_dir" in caught.value.fix


def test_a_relative_path_is_another_table_in_another_folder(
    tmp_path: Path, split: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder, rows(3))
        monkeypatch.chdir(tmp_path / folder)
        assert split("t.json").samples[0].images[0].is_relative_to(tmp_path / folder)  # type: ignore[union-attr]


@pytest.mark.parametrize("fault", ["link", "id"])
def test_what_lies_beside_the_rows_is_looked_for_again(fault: str, tmp_path: Path, split: Open) -> None:
    file = write(tmp_path / "data", rows(3))
    picture = tmp_path / "data" / "2.png"
    kept = picture.rename(tmp_path / "elsewhere.png")
    if fault == "id":
        questions = [{"image_id": each, "question": f"What, {each}?", "answer": "A."} for each in range(3)]
        file.write_text(json.dumps(questions))
    else:
        picture.symlink_to(kept)
    before = split(file)
    assert (len(before.samples), before.tables[0].num_read) == (2, 3)
    assert split(file).samples.parts == before.samples.parts
    picture.unlink(missing_ok=True)
    kept.rename(picture)
    after = split(file).samples
    assert [sample.images[0].name for sample in after] == ["0.png", "1.png", "2.png"]
    assert [sample.sizes for sample in after] == [((20, 30),), ((21, 30),), ((22, 30),)]
    assert [sample.images[0].name for sample in before.samples] == ["0.png", "1.png"]


def test_processes_of_one_start_look_once(tmp_path: Path, split: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, rows(3))
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").symlink_to("/dev/null")
    first = split(file)
    monkeypatch.setattr(table, "_SEEN", set())  # as in another rank, which waited at the lock
    monkeypatch.setattr(table, "_write_part", lambda *_: pytest.fail("converted again"))
    assert split(file).tables == first.tables


def test_a_split_that_was_refused_is_refused_again(tmp_path: Path, split: Open) -> None:
    file = write(tmp_path, [*rows(66), {"id": "bad"}])
    rejected = RejectedSamples(0.01)
    for _ in range(2):
        with pytest.raises(UserError, match=r"1 of 67 rows of data\.train cannot be used"):
            split(file, rejected)


def test_rows_of_two_sources_with_one_name_are_two(tmp_path: Path) -> None:
    files = [str(write(tmp_path / folder, [*rows(3), {"id": "bad"}])) for folder in ("a", "b")]
    rejected = RejectedSamples(0.5)
    open_split("train", files, SplitOptions(cache=tmp_path / "cache"), rejected)
    assert (rejected.num_rows["train"], rejected.num_dropped) == (8, 2)


def test_half_a_surrogate_pair_in_any_text(tmp_path: Path, split: Open) -> None:
    whole, half = "\U0001f600", "\ud83d"
    image = {"bytes": b64encode((write(tmp_path, rows(3)).parent / "0.png").read_bytes()).decode()}

    def row(text: str) -> list[dict[str, Any]]:
        call = {"function": {"name": "look", "arguments": {"at": text}}}
        called = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        answered = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "Yes."}]
        return [{"messages": called}, {"messages": answered, "image": {**image, "path": f"{text}.png"}}]

    (tmp_path / "t.json").write_text(json.dumps([*row(whole), *row(half)]))
    rejected = RejectedSamples(0.5)
    made = split(tmp_path / "t.json", rejected).samples
    assert [sample.images[0].name if sample.images else "" for sample in made] == ["", f"{whole}.png", "?.png"]
    assert [each.reason for each in rejected] == ["not text: the assistant holds half of a surrogate pair"]


def test_a_row_that_is_nested_too_deeply_is_a_reason(tmp_path: Path, split: Open) -> None:
    deep, flat = rows(2)
    for _ in range(600):
        deep["image"] = {"image": deep["image"]}
    flat["image"] = {"image": {"url": flat["image"]}}
    write(tmp_path, rows(2))
    (tmp_path / "t.json").write_text(json.dumps([flat, deep]))
    rejected = RejectedSamples(0.5)
    assert [sample.id for sample in split(tmp_path / "t.json", rejected).samples] == ["1"]
    assert [each.reason.partition(":")[0] for each in rejected] == ["nested too deeply"]


def test_names_that_are_not_utf8(tmp_path: Path, split: Open) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    file = write(folder, rows(3)).rename(folder / os.fsdecode(b"t\xff.json"))
    (folder / "1.png").unlink()
    rejected = RejectedSamples(0.5)
    table = split(file, rejected).samples
    assert [sample.origin for sample in table] == [r"t\udcff.json:1[0]", r"t\udcff.json:1[2]"]
    rejected.write(tmp_path / "ledger.jsonl")
    assert json.loads((tmp_path / "ledger.jsonl").read_text())["reason"].startswith("missing image")


def test_long_texts_are_cut_into_batches(tmp_path: Path, split: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_BYTES_AT_ONCE", 10_000)
    made = split(write(tmp_path, rows(20, mask="x" * 4000)))
    batches = pa.ipc.open_stream(pa.memory_map(str(made.tables[0].parts[0].file)))
    assert [batch.num_rows for batch in batches] == [3] * 6 + [2]


def test_rows_in_use_by_part(tmp_path: Path, split: Open) -> None:
    """Counts of answers are those of the samples, over several parts, one of which has no row in use."""
    whole = split(write(tmp_path, rows(40))).samples
    kept = whole.rows[(whole.rows < 3) | (whole.rows > 30)]
    table = RowTable(_cut(whole.parts[0], tmp_path), kept)
    expected = Counter((sample.turns[1].question_type, sample.turns[1].text) for sample in table)
    assert len(expected) == len(kept) == 12
    assert table.answer_counts() == expected
    assert [len(own) for _, own in table.rows_by_part()] == [3, 0, 9]


def _cut(part: TablePart, folder: Path) -> list[TablePart]:
    """One part as three files, of 10, 15 and 15 rows."""
    content, made = open_arrow(part.file), []
    for number, (start, length) in enumerate(((0, 10), (10, 15), (25, 15))):
        file = folder / f"cut-{number}.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, content.schema) as writer:
            writer.write_table(content.slice(start, length))
        made.append(TablePart(file, part.source, length, str(number)))
    check_pictures([each.file for each in made], 0, 40.0)
    return made
