"""Sources are read in parts, by any process, in constant memory; links and downloads are bounded."""

import gzip
import http.server
import json
import os
import pickle
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.core.decisions import DecisionLog
from lightning_mm.core.errors import UserError
from lightning_mm.data.image_source import ImageBytes
from lightning_mm.data.readers import json_rows, row_files, table_files
from lightning_mm.data.readers.json_rows import iter_json_rows
from lightning_mm.data.readers.row_files import FilePart, JsonPart
from lightning_mm.data.readers.source import OpenSource, PartReport, ReadOptions, Source, open_source, parse_sources
from lightning_mm.data.sample import Rejection, Sample
from tests.helpers.data_forms import COLORS, FORMS, chat, llava, picture, pictures, write_json, write_lines


def opened(given: Any, **options: Any) -> OpenSource:
    (source,) = parse_sources(given)
    return open_source(source, ReadOptions(**options))


def read(source: OpenSource, report: PartReport | None = None) -> list[Any]:
    return [row for part in source.parts() for row in source.read(part, report or PartReport())]


def only(rows: list[Any]) -> Any:
    (row,) = rows
    return row


def reason(row: Any) -> str:
    assert isinstance(row, Rejection)
    return row.reason


def test_parts_are_the_whole_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a process that gets the source and a part by pickle."""
    rows = [{"question": f"Is it {n}?", "answer": str(n), "pad": "é" * (n % 50)} for n in range(2000)]
    frame = pandas.DataFrame(rows)
    write_lines(tmp_path, rows)
    write_json(tmp_path, rows)
    (tmp_path / "stream.json").write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    frame.to_parquet(tmp_path / "train.parquet", row_group_size=100)
    frame.to_feather(tmp_path / "train.feather", chunksize=100)
    for name in ("train.jsonl", "train.json", "stream.json", "train.parquet", "train.feather"):
        monkeypatch.setattr(row_files, "PART_BYTES", 3_000_000_000)
        monkeypatch.setattr(table_files, "PART_BYTES", 3_000_000_000)
        whole = opened(str(tmp_path / name))
        assert len(whole.parts()) == 1
        monkeypatch.setattr(row_files, "PART_BYTES", 20_000)
        monkeypatch.setattr(table_files, "PART_BYTES", 3_000)
        source = opened(str(tmp_path / name))
        sent = pickle.loads(pickle.dumps([(source, part) for part in source.parts()]))
        assert len(sent) > 2 or name in ("train.jsonl", "train.json", "stream.json")  # are read 1 MiB at a time
        assert [row for each, part in sent for row in each.read(part, PartReport())] == read(whole)
        assert [row.turns[1].text for row in read(source)] == [str(n) for n in range(2000)]


def test_jsonl_is_cut_at_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": "Q?", "answer": "a" * 3000} for _ in range(2000)]
    path = write_lines(tmp_path, rows)
    monkeypatch.setattr(row_files, "PART_BYTES", 2_000_000)
    source = opened(path)
    assert len(source.parts()) == 3
    assert [row.origin for row in read(source)] == [f"train.jsonl:{line}" for line in range(1, 2001)]


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(json_value, max_size=12), indent=st.sampled_from([None, 1]), chunk=st.integers(1, 40))
def test_a_window_reads_what_json_reads(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"window{os.getpid()}.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK", chunk)
        read_rows = list(iter_json_rows(path))
    text = path.read_bytes().decode()
    assert [row for _, row in read_rows] == json.loads(text)
    lines = text.split("\n")
    for index, (origin, row) in enumerate(read_rows):
        line = int(origin.partition(":")[2].removesuffix(f"[{index}]"))
        if indent and not isinstance(row, (list, dict)):
            assert json.dumps(row, ensure_ascii=False) in lines[line - 1]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(json_value, min_size=1, max_size=12),
    indent=st.sampled_from([None, 1]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from(["", "\ufeff"]),
    is_list=st.booleans(),
    chunk=st.integers(1, 40),
    size=st.integers(1, 60),
    broken_at=st.none() | st.floats(0, 1),
    broken_by=st.sampled_from([b"", b"\xff", b"}", b" x ", b"NaN "]),
)
def test_parts_of_json_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, line_end: str, mark: str,
    is_list: bool, chunk: int, size: int, broken_at: float | None, broken_by: bytes,
) -> None:  # fmt: skip
    """Rows, their origins, and the error of a file that is broken anywhere."""

    def outcome(parts: list[FilePart]) -> list[Any]:
        found: list[Any] = []
        try:
            for part in parts:
                for origin, row in file.rows(part):
                    found.append((origin, str(row)))
        except UserError as error:
            found.append(str(error))
        return found

    path = tmp_path_factory.getbasetemp() / f"parts{os.getpid()}.json"
    rows = rows if is_list else [{"row": row} for row in rows]
    texts = [json.dumps(row, indent=indent, ensure_ascii=False) for row in rows]
    text = f"[\n{f' ,{chr(10)}'.join(texts)}\n]\n" if is_list else "\n".join(texts)
    content = (mark + text.replace("\n", line_end)).encode()
    if broken_at is not None:
        at = max(len(mark.encode()) + 1, int(broken_at * len(content)))
        content = content[:at] + broken_by + (content[at:] if broken_by else b"")
    path.write_bytes(content)
    file = row_files.JsonList(path, "t") if is_list else row_files.JsonStream(path, "t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK", chunk)
        patch.setattr(row_files, "PART_BYTES", size)
        parts = file.parts()
        found, whole = outcome(parts), outcome([FilePart()])
        if "not UTF-8" in str(whole[-1]):  # met by reading ahead, so a few rows before it may not come
            assert found[-1] == whole[-1]
            number = min(len(found), len(whole)) - 1
            found, whole = found[:number], whole[:number]
        assert found == whole
        if broken_at is None and len(rows) > 3 and len(content) > 5 * (size + 4 * chunk):
            assert len(parts) > 1
        starts = [part.place.byte for part in parts if isinstance(part, JsonPart)]
        assert starts == sorted(set(starts))


def test_faults_of_json_are_placed_as_json_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[\n" + '  {"a": "é"},\n' * 50 + '  {"a": 1 "b": 2}\n]'
    (tmp_path / "t.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="Expecting") as expected:
        json.loads(text)
    monkeypatch.setattr(json_rows, "_CHUNK", 16)
    with pytest.raises(UserError) as caught:
        list(iter_json_rows(tmp_path / "t.json"))
    assert caught.value.why == f"Element 50, which begins at line 52: {expected.value}."
    (tmp_path / "t.json").write_bytes(b"[\n" + b'{"a": 1},\n' * 50 + b'"\xff"]')
    with pytest.raises(UserError, match="Byte 503: invalid start byte"):
        list(iter_json_rows(tmp_path / "t.json"))


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.json.gz", "train.parquet", "train.csv"])
def test_memory_is_constant(tmp_path: Path, name: str) -> None:
    rows = [{"question": "Q?" * 4000, "answer": str(number)} for number in range(4000)]
    text = json.dumps(rows) if ".json" in name and "jsonl" not in name else "\n".join(map(json.dumps, rows))
    if name.endswith("parquet"):
        pandas.DataFrame(rows).to_parquet(tmp_path / name, row_group_size=200)
    elif name.endswith("csv"):
        pandas.DataFrame(rows).to_csv(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(text.encode(), 1) if name.endswith("gz") else text.encode())
    source = opened(str(tmp_path / name))
    del rows, text
    tracemalloc.start()
    assert sum(1 for part in source.parts() for _ in source.read(part, PartReport())) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000  # the content is 32 MB; a window is 1 MB, and parts of it are held twice


def test_what_was_found_is_said(tmp_path: Path) -> None:
    rows = [{**row, "objects": [1], "source": "us"} for row in llava()]
    rows[0]["conversations"][0]["name"] = "Ann"
    path = write_json(tmp_path, rows)
    report = PartReport()
    with DecisionLog().opened() as log:
        source = opened(path)
        read(source, report)
    (said,) = [str(decision) for decision in log]
    assert said == (
        "data.source.train: JSON list, ShareGPT, LLaVA (conversations: from/value) (by the first 3 rows; read: "
        "conversations, id, image; not read: message.name, objects, source)"
    )
    assert report.ignored == {"objects": 3, "source": 3, "message.name": 1}
    assert source.files == (Path(path),)
    assert json.loads(json.dumps(source.identity())) == source.identity()


def test_sources_have_names_of_their_own(tmp_path: Path) -> None:
    given = [
        str(tmp_path / "a" / "x.json"),
        {"path": "b/x.parquet", "weight": 2.0},
        {"path": "c", "name": "x"},
        "d/*.json",
    ]
    sources = parse_sources(given, image_root="pics")
    assert [source.name for source in sources] == ["x", "x-2", "x-3", "d"]
    assert {source.image_root for source in sources} == {"pics"}
    assert parse_sources([asdict(source) for source in sources]) == sources
    assert parse_sources(yaml.safe_load(yaml.safe_dump([asdict(source) for source in sources]))) == sources


def test_settings_of_other_trainers_become_ours(tmp_path: Path) -> None:
    write_json(tmp_path, llava(), "rows.json")
    meta = {"few": {"root": "", "annotation": "rows.json", "data_augment": True, "repeat_time": 0.3, "length": 3}}
    with DecisionLog().opened() as log:
        (source,) = parse_sources(write_json(tmp_path, meta, "meta.json"))
    assert (source.name, source.repeats, source.sampling, source.image_root) == ("few", 1, "first:0.3", str(tmp_path))
    assert "data_augment not applied" in str(next(iter(log)))
    meta["few"]["repeat_time"] = 3
    (source,) = parse_sources(write_json(tmp_path, meta, "meta.json"))
    assert (source.repeats, source.sampling) == (3, None)
    entries = [
        {"json_path": "{rows,more}.json", "sampling_strategy": "first:2"},
        {"json_path": "rows.json", "sampling_strategy": "random:10%"},
        {"json_path": "rows.json", "sampling_strategy": "all"},
    ]
    (tmp_path / "d.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    sources = parse_sources(str(tmp_path / "d.yaml"))
    assert [(Path(each.path).name, each.sampling, each.repeats) for each in sources] == [
        ("rows.json", "first:2", 1.0),
        ("more.json", "first:2", 1.0),
        ("rows.json", "random:10%", 1.0),
        ("rows.json", None, 1.0),
    ]
    info = {"hub": {"hf_hub_url": "org/name", "split": "dev", "subset": "sub", "num_samples": 5}}
    (source,) = parse_sources(write_json(tmp_path, info, "dataset_info.json"))
    assert source == Source("org/name", "hub", split="dev", subset="sub", limit=5)


def test_origins_tell_files_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_lines(tmp_path / folder, [{"question": "Q?", "answer": "a"}], "t.jsonl")
    assert [row.origin for row in read(opened(str(tmp_path / "*" / "t.jsonl")))] == ["a/t.jsonl:1", "b/t.jsonl:1"]


def test_a_row_of_another_shape_is_not_guessed(tmp_path: Path) -> None:
    rows = [{"messages": chat("a")}] * 150 + [{"messages": None, "question": "Q?", "answer": "a"}]
    last = read(opened(write_lines(tmp_path, rows)))[-1]
    assert reason(last) == (
        "another shape: the row is question and answer (question, answer), unlike the first rows of its source"
    )


def test_links_out_of_the_root_are_followed_on_demand(tmp_path: Path) -> None:
    pictures(tmp_path / "store")
    root = tmp_path / "root"
    path = write_json(root, [{"image": "in/red.png", "question": "Q?", "answer": "a"}])
    (root / "in").symlink_to(tmp_path / "store")
    refused = reason(only(read(opened(path))))
    assert refused == (
        f"image outside the image root: 'in/red.png' leads to {tmp_path}/store/red.png by a symbolic link; "
        "data.follow_links allows that"
    )
    (image,) = only(read(opened(path, follow_links=True))).images
    assert image.read_bytes() == (tmp_path / "store/red.png").read_bytes()
    assert image == tmp_path / "root/in/red.png"  # as it is written: a link that is changed later leads elsewhere
    for name in ("../store/red.png", "in/../../store/red.png", str(tmp_path / "store/red.png"), "/etc/hostname"):
        path = write_json(root, [{"image": name, "question": "Q?", "answer": "a"}])
        assert reason(only(read(opened(path, follow_links=True)))).startswith("image outside the image root")


def test_frames_that_are_links_out_of_the_root(tmp_path: Path) -> None:
    pictures(tmp_path / "store")
    root = tmp_path / "root"
    said = [{"from": "human", "value": "<video>Q?"}, {"from": "gpt", "value": "a"}]
    path = write_json(root, [{"video": "clip", "conversations": said}])
    pictures(root / "clip")
    assert only(read(opened(path))).videos == (root / "clip",)
    (root / "clip/more.png").symlink_to(root / "clip/red.png")
    assert only(read(opened(path))).videos == (root / "clip",)
    (root / "clip/out.png").symlink_to(tmp_path / "store/red.png")
    assert "'out.png' of 'clip' leads to" in reason(only(read(opened(path))))
    assert only(read(opened(path, follow_links=True))).videos == (root / "clip",)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    try:
        pictures(folder)
    except OSError:
        pytest.skip("this file system has no such names")
    os.rename(folder / "red.png", Path(os.fsdecode(os.fsencode(folder) + b"/\xfe.png")))
    rows = [{"image": os.fsdecode(b"\xfe.png"), "question": "Q?", "answer": "a"}]
    for path in (write_lines(folder, rows), write_json(folder, rows)):
        sample = only(read(opened(path)))
        assert sample.images[0].read_bytes() == picture("red")
    table = datasets.Dataset.from_list([{"image": picture("red"), "question": "Q?", "answer": "a"}])
    table.to_parquet(tmp_path / "t.parquet")
    os.rename(tmp_path / "t.parquet", folder / "t.parquet")
    assert only(read(opened(str(folder / "t.parquet")))).images[0].data == picture("red")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a picture, a page, and a file without end."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        kind, content = {
            "/red.png": ("image/png", picture("red")),
            "/page": ("text/html", b"<html></html>"),
            "/large.png": ("image/png", bytes(5000)),
        }.get(self.path, ("", b""))
        self.send_response(200 if kind else 404)
        self.send_header("Content-Type", kind or "text/plain")
        self.send_header("Content-Length", str(len(content) + (self.path == "/cut.png")))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Server.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_links_are_fetched_on_demand_and_once(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lightning_mm.data.readers.fetching.MAX_BYTES", {"image": 4000})
    names = ["red.png", "red.png", "page", "large.png", "gone.png"]
    rows = [{"image": f"{address}/{name}", "question": "Q?", "answer": "a"} for name in names]
    path = write_lines(tmp_path / "data", rows)
    assert {reason(row).partition(":")[0] for row in read(opened(path))} == {"image is a URL"}
    assert Server.asked == []
    source = opened(path, fetch=True, cache=tmp_path / "cache")
    for _ in range(2):
        first, second, page, large, gone = read(source)
        assert first.images == second.images
        assert first.images[0].parent == tmp_path / "cache"
        assert first.images[0].read_bytes() == picture("red")
        assert "the server says it is text/html, not image/..." in reason(page)
        assert "over 0 MB" in reason(large)
        assert "404" in reason(gone)
    assert Server.asked.count("/red.png") == 1


def test_a_dataset_of_the_hub_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of ``huggingface_hub``: snapshots are links to blobs, and no network is used."""
    made = FORMS["folder as on the hub, split by file names"](tmp_path)
    repo = tmp_path / "hub" / "datasets--org--colors"
    commit = "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(Path(made.given).rglob("*.parquet"))):
        blob = repo / "blobs" / str(number)
        link = repo / "snapshots" / commit / file.relative_to(made.given)
        for folder in (blob.parent, link.parent):
            folder.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    rows = read(opened("org/colors"))
    assert [row.turns[1].text for row in rows] == list(COLORS)
    assert all(isinstance(row.images[0], ImageBytes) for row in rows)
    with pytest.raises(UserError, match=r"No data file org/other, and no dataset of this name can be downloaded"):
        opened("org/other")


def test_open_questions_of_every_shape(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "Q?"},
        {"messages": chat("a")[:1]},
        {"prompt": chat("a")[:1]},
        {"question": "Q?", "answer": None},
    ]
    samples = read(opened(write_lines(tmp_path, rows), answers_required=False))
    assert all(isinstance(sample, Sample) and sample.turns[-1].text == "" for sample in samples)
    assert {
        reason(row) for row in read(opened(write_lines(tmp_path, [*rows, {"question": "Q?", "answer": "a"}])))[:-1]
    } == {"no answer: the row has no assistant turn"}
