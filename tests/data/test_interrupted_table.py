"""A conversion that is killed goes on where it was, and its worker processes end with it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_mm.data.readers import row_files
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.split import Split, SplitOptions, open_split

SLOW_READER = """
import sys, time
from lightning_mm.data import split
from lightning_mm.data.readers import opened, row_files
from lightning_mm.data.rejected_samples import RejectedSamples

row_files.PART_BYTES = 1_000_000
read = opened.OpenSource.read

def slowly(self, part, report):
    for each in read(self, part, report):
        time.sleep(0.002)
        yield each

opened.OpenSource.read = slowly
split._num_processes = lambda: 2
split.open_split("train", sys.argv[1], split.SplitOptions(cache=sys.argv[2]), RejectedSamples())
"""


def rows(number: int) -> list[dict[str, object]]:
    said = [{"from": "human", "value": "What is it, in some more words?"}, {"from": "gpt", "value": "That. " * 2000}]
    return [{"id": str(index), "conversations": said} for index in range(number)]


def opened(file: Path, cache: Path) -> Split:
    return open_split("train", str(file), SplitOptions(cache=cache), RejectedSamples())


def has_ended(process: str) -> bool:
    """Whether a process is gone, or waits for its new parent to notice that it is."""
    deadline = time.monotonic() + 3  # torch alone would look after 5 s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_a_table_that_was_cut_otherwise_is_made_anew(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a table in parts of one size, and the rest in parts of another, would lose rows or double them."""
    file, cache = tmp_path / name, tmp_path / "cache"
    lines = [json.dumps(row) for row in rows(500)]
    file.write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]")
    monkeypatch.setattr(row_files, "PART_BYTES", 3_000_000)
    opened(file, cache)
    (report,) = cache.rglob("part-00001.json")
    report.unlink()
    monkeypatch.setattr(row_files, "PART_BYTES", 1_000_000)
    assert [sample.id for sample in opened(file, cache).samples] == [str(index) for index in range(500)]


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_conversion_goes_on(by: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "t.jsonl", tmp_path / "cache"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(1000)))
    monkeypatch.setattr(row_files, "PART_BYTES", 1_000_000)
    process = subprocess.Popen([sys.executable, "-c", SLOW_READER, str(file), str(cache)])
    deadline = time.monotonic() + 60
    while len(list(cache.rglob("part-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
    process.send_signal(by)
    assert process.wait(timeout=5) == -by
    done = {path: path.stat().st_mtime_ns for path in cache.rglob("part-*.json")}
    assert 3 <= len(done) < 10
    whole = opened(file, cache)
    assert [sample.id for sample in whole.samples] == [str(index) for index in range(1000)]
    assert [sample.origin for sample in whole.samples] == [f"t.jsonl:{index + 1}" for index in range(1000)]
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list(cache.rglob("*.tmp"))
    assert opened(file, tmp_path / "other").samples.fingerprint == whole.samples.fingerprint
    assert len(workers.split()) == 2
    assert all(map(has_ended, workers.split()))
