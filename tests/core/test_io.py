"""Files and folders are whole or as they were before, whatever fails on the way."""

import errno
import logging
import math
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import (
    append_jsonl,
    is_absent_or_empty,
    read_json,
    read_json_rows,
    read_jsonl,
    staged_folder,
    write_atomically,
    write_json,
)


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_content_is_written_to_the_byte(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "a\r\nü\n")
    assert path.read_bytes() == "a\r\nü\n".encode()
    write_atomically(path, b"\xff\0")
    assert files_in(tmp_path) == {"a.txt": b"\xff\0"}


def test_a_file_gets_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "a", "")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_file_leaves_the_old_one_alone(tmp_path, monkeypatch, call, fault):
    def fail(*_):
        raise fault

    (tmp_path / "a").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(call, fail)
        with pytest.raises(type(fault)):
            write_atomically(tmp_path / "a", "new")
    assert files_in(tmp_path) == {"a": b"old"}


def test_text_that_has_no_bytes_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a", "\ud800")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "a", "")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        write_atomically(tmp_path / "file" / "a", "")


def write_and_die(path: Path) -> None:
    """SIGKILL when half of the new content is on disk."""
    os.fsync = lambda fd: (os.ftruncate(fd, 3), os.kill(os.getpid(), signal.SIGKILL))
    write_atomically(path, "new content")


def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_atomically(path, "newer")
    assert path.read_text() == "newer"


def test_threads_that_write_the_same_file_leave_one_of_theirs(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_atomically(tmp_path / "a", str(i) * 10_000), range(8)))
    (only,) = files_in(tmp_path).values()
    assert len(only) == 10_000
    assert len(set(only)) == 1


def test_absent_or_empty(tmp_path):
    assert is_absent_or_empty(tmp_path)
    assert is_absent_or_empty(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert not is_absent_or_empty(tmp_path / "file")
    assert not is_absent_or_empty(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_staged_folder_takes_the_place_of_nothing_or_of_an_empty_one(tmp_path, overwrite, there):
    target = tmp_path / "deep" / "out"
    if there:
        target.mkdir(parents=True)
    with staged_folder(target, overwrite=overwrite) as staged:
        (staged / "a").write_text("new")
        assert is_absent_or_empty(target)
    assert files_in(tmp_path) == {"deep/out/a": b"new"}
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_staged_folder_replaces_one_that_holds_something_only_where_it_may(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(OSError, match="not empty"), staged_folder(target) as staged:
        (staged / "a").write_text("new")
    assert files_in(tmp_path) == {"out/old": b"old"}
    with staged_folder(target, overwrite=True) as staged:
        (staged / "a").write_text("new")
        assert files_in(target) == {"old": b"old"}
    assert files_in(tmp_path) == {"out/a": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("when", ["in the block", "when it takes its place"])
def test_a_failed_staged_folder_leaves_the_old_one(tmp_path, monkeypatch, when):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    if when == "when it takes its place":
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="Input/output"), staged_folder(target, overwrite=True) as staged:
        (staged / "a").write_text("new", encoding="utf-8" if when != "in the block" else fail())
    assert files_in(tmp_path) == {"out/old": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@dataclass
class Fact:
    where: Path
    value: float


def test_json_keeps_what_it_is_given_and_turns_nan_into_null(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, None, True, "ü"], 3: (math.nan, math.inf), "fact": Fact(Path("p"), -math.inf)})
    assert read_json(path) == {"a": [1, 2.5, None, True, "ü"], "3": [None, None], "fact": {"where": "p", "value": None}}


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": "text", "bad": object()})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[" * 100_000, "\x00"])
def test_a_half_written_json_file_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x\.json cannot be read"):
        read_json(path)
    with pytest.raises(UserError, match=r"y\.json is missing"):
        read_json(tmp_path / "y.json")


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "[1, null]"])
def test_rows_of_a_file_that_holds_none_are_none_and_a_broken_one_is_said(tmp_path, caplog, text):
    path = tmp_path / "x.json"
    assert read_json_rows(path) == []
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "lightning_mm"):
        assert read_json_rows(path) == []
    assert ("begun anew" in caplog.text) == (text in ("", "{"))
    write_json(path, [{"step": 1}, 2, {"step": 3}])
    assert read_json_rows(path) == [{"step": 1}, {"step": 3}]


def test_jsonl_appends_and_a_cut_last_line_is_counted(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append_jsonl(path, [{"reason": "a\u2028b"}, {"reason": "c"}])
    append_jsonl(path, [])
    append_jsonl(path, [{"reason": "d"}])
    path.write_text(path.read_text() + '[1]\n{"reason": "cu')
    rows, broken = read_jsonl(path)
    assert [row["reason"] for row in rows] == ["a\u2028b", "c", "d"]
    assert broken == 2
