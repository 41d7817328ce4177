"""Records come back as they were put, by every process, and no fault of the disk is more than a miss.

Faults are real where they can be: a writer killed in the middle of a write, a limit on file sizes that the kernel
enforces, bytes flipped and files removed under a reader.
"""

import errno
import logging
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_mm.core.errors import UserError
from lightning_mm.execution.cache.store import RecordStore, StorageDtype
from lightning_mm.execution.cache.store import store as module

PLENTY = 10**9
IDENTITY = {"weights": "abc", "layers": [8, 15], "prompt": "Was ist das?"}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
OTHERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64)
Open = Callable[..., RecordStore]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens stores in one folder; all are closed at the end."""
    stores: list[RecordStore] = []

    def open_one(
        identity: Any = IDENTITY, limit: int = PLENTY, dtype: StorageDtype = "float32", **more: Any
    ) -> RecordStore:
        stores.append(RecordStore.open(tmp_path, {"it": identity}, limit_bytes=limit, dtype=dtype, **more))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


def record_of(seed: int, rows: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(rows, 33, generator=generator),
        "regions": torch.randint(0, 4, (rows,), generator=generator, dtype=torch.uint8),
        "scale": torch.tensor(seed),
    }


def same(a: dict[str, Tensor] | None, b: dict[str, Tensor]) -> bool:
    return a is not None and a.keys() == b.keys() and all(alike(a[name], b[name]) for name in b)


def alike(a: Tensor, b: Tensor) -> bool:
    """To the bit: NaNs and signs of zeros too."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def bits(x: Tensor) -> bytes:
    return x.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def shards(store: RecordStore) -> list[Path]:
    return sorted(store.folder.glob("*.shard"))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits in any dtype and shape, transposed at times."""
    dtype = draw(st.sampled_from(FLOATS + OTHERS))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    if dtype is torch.bool:
        count = math.prod(shape)
        flat = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    else:
        raw = bytearray(draw(st.binary(min_size=0, max_size=64)) or b"\0") * (math.prod(shape) * dtype.itemsize)
        count = math.prod(shape)
        flat = torch.frombuffer(raw, dtype=dtype, count=count).clone() if count else torch.empty(0, dtype=dtype)
    x = flat.view(shape)
    return x.mT if x.ndim >= 2 and draw(st.booleans()) else x


@settings(max_examples=150, deadline=None)
@given(
    record=st.dictionaries(st.text(max_size=9), tensors(), max_size=4),
    kept=st.sampled_from(["float32", "bfloat16", "int8"]),
    flushed=st.booleans(),
)
def test_round_trip(record: dict[str, Tensor], kept: StorageDtype, flushed: bool) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        RecordStore.open(folder, {}, limit_bytes=PLENTY, dtype=kept, lossy=("nothing of it",)) as store,
    ):
        assert store.put("00ff", record)
        if flushed:
            store.flush()
        assert same(store.get("00ff"), record)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", FLOATS[:-1], ids=str)
def test_lossy_tensors_are_rounded_once_and_decoded(opened: Open, given: torch.dtype, dtype: torch.dtype) -> None:
    hidden = torch.randn(5, 16, dtype=torch.float64).to(given)
    for kept, stored in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        store = opened(str(given), dtype=kept)
        store.put("a", {"hidden": hidden, "other": hidden})
        store.flush()
        expected = hidden if given.itemsize <= stored.itemsize else hidden.to(stored)
        found = store.get("a", dtype)
        assert found is not None
        assert alike(found["hidden"], expected.to(dtype))
        assert alike(found["other"], hidden)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=4, max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_int8_error_is_bounded_row_by_row(rows: list[list[float]]) -> None:
    hidden = torch.tensor(rows)
    with (
        tempfile.TemporaryDirectory() as folder,
        RecordStore.open(folder, {}, limit_bytes=PLENTY, dtype="int8") as store,
    ):
        store.put("a", {"hidden": hidden})
        found = store.get("a")
    assert found is not None
    bound = hidden.double().abs().amax(-1, keepdim=True) / 254
    # Half a step, the rounding of float32 and the smallest scale that float32 has.
    assert ((found["hidden"].double() - hidden).abs() <= bound * (1 + 1e-4) + 127 * 2.0**-149).all()


def test_int8_error_is_told(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    hidden = torch.randn(20, 50, 64, generator=torch.Generator().manual_seed(0))
    writer = opened(dtype="int8")
    for i, each in enumerate(hidden):
        writer.put(str(i), {"hidden": each})
    writer.flush()
    reader = opened(dtype="int8")
    back = torch.stack([(reader.get(str(i)) or {})["hidden"] for i in range(20)])
    [reader.get(str(i)) for i in range(20)]
    true = float((back - hidden).norm() / hidden.norm())
    assert 0.003 < true < 0.01
    assert writer.stats.relative_error == pytest.approx(true, rel=1e-4)
    assert reader.stats.relative_error == pytest.approx(true, rel=1e-4)
    before = writer.stats.rounding
    assert [writer.get(str(i)) is not None for i in range(20)] == [True] * 20
    assert writer.stats.rounding == before, "what is read back is not counted again"
    assert writer.bytes < 20 * (50 * 64 + 50 * 4 + 400)
    with caplog.at_level(logging.INFO, "lightning_mm"):
        writer.close()
    assert f"20 records written in int8, {true:.2%} RMS from what was given" in caplog.text


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_what_is_not_finite_is_kept_as_it_is(opened: Open, kept: StorageDtype, bad: float) -> None:
    hidden = torch.randn(3, 4)
    hidden[1, 2] = bad
    store = opened(dtype=kept)
    store.put("a", {"hidden": hidden})
    assert same(store.get("a"), {"hidden": hidden})
    assert store.stats.relative_error == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8"])
def test_tensors_on_a_device_are_kept_as_on_the_host(opened: Open, kept: StorageDtype) -> None:
    record = record_of(0)
    store = opened(dtype=kept)
    store.put("host", record)
    store.put("device", {name: tensor.cuda() for name, tensor in record.items()})
    assert same(store.get("device"), store.get("host") or {})


def test_tensors_own_their_memory(opened: Open) -> None:
    store, record = opened(), record_of(0)
    store.put("a", record)
    for _ in range(2):
        found = store.get("a")
        assert found is not None
        for tensor in found.values():
            tensor.zero_()
        assert same(store.get("a"), record)
        store.flush()


def test_identities_are_apart_and_say_what_they_are(opened: Open) -> None:
    a, b, rounded, again = opened(1), opened(2), opened(1, dtype="int8"), opened(1)
    a.put("k", record_of(0))
    a.flush()
    assert "k" in again
    assert again.folder == a.folder
    assert "k" not in b
    assert "k" not in rounded, "a run that asks for exact records never gets rounded ones"
    assert '"it": 1' in (a.folder / "identity.json").read_text()


def test_a_key_that_is_there_is_not_written_again(opened: Open) -> None:
    store = opened()
    assert store.put("a", record_of(0))
    assert not store.put("a", record_of(1))
    store.flush()
    assert not store.put("a", record_of(1))
    assert same(store.get("a"), record_of(0))
    assert (len(store), store.stats.written, store.stats.hits, store.stats.misses) == (1, 1, 1, 0)
    assert store.get("b") is None
    assert store.stats.misses == 1


def test_shards_are_closed_when_long_enough(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mm.execution.cache.store.shards.SHARD_BYTES", 20_000)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4_000)
    store = opened()
    for i in range(60):
        store.put(str(i), record_of(i))
    store.flush()
    assert len(shards(store)) == 4
    assert store.bytes == sum(path.stat().st_size for path in shards(store))
    later = opened()
    assert len(later) == 60
    assert all(same(later.get(str(i)), record_of(i)) for i in range(60))


def test_a_reader_sees_what_others_write(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = opened(), opened()
    monkeypatch.setattr("lightning_mm.execution.cache.store.shards.REFRESH_TIME_SHARE", math.inf)
    for i in range(3):
        writer.put(str(i), record_of(i))
        assert reader.get(str(i)) is None
        writer.flush()
        assert same(reader.get(str(i)), record_of(i)), "a miss looks again"
    monkeypatch.setattr("lightning_mm.execution.cache.store.shards.REFRESH_TIME_SHARE", 0)
    writer.put("3", record_of(3))
    writer.flush()
    assert reader.get("3") is None
    reader.refresh()
    assert same(reader.get("3"), record_of(3))


def write_share(folder: str, first: int) -> None:
    module.BLOCK_BYTES = 3_000
    with RecordStore.open(folder, {}, limit_bytes=PLENTY, dtype="float32") as store:
        for i in range(first, first + 100):
            store.put(str(i), record_of(i))


def test_two_processes_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share half of their keys; this one begins when the other one is seen to write."""
    monkeypatch.setattr(module, "BLOCK_BYTES", module.BLOCK_BYTES)
    process = multiprocessing.get_context("spawn").Process(target=write_share, args=(str(tmp_path), 50))
    process.start()
    while not list(tmp_path.rglob("*.shard")):
        time.sleep(0.001)
    write_share(str(tmp_path), 0)
    process.join()
    assert process.exitcode == 0
    with RecordStore.open(tmp_path, {}, limit_bytes=PLENTY, dtype="float32") as store:
        assert len(store) == 150
        assert len(shards(store)) == 2
        assert all(same(store.get(str(i)), record_of(i)) for i in range(150))
        assert store.stats.corrupt == 0


def write_and_die(folder: str) -> None:
    """SIGKILL in the middle of the fifth record of the second block."""
    store = RecordStore.open(folder, {}, limit_bytes=PLENTY, dtype="float32")
    for i in range(10):
        store.put(str(i), record_of(i))
    store.flush()
    for i in range(10, 20):
        store.put(str(i), record_of(i))
    write = os.write
    calls = []

    def half(fd: int, data: memoryview) -> int:
        calls.append(fd)
        if len(calls) < 6:
            return write(fd, data)
        write(fd, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    os.write = half  # type: ignore[assignment]
    store.flush()


def test_a_killed_writer_loses_what_was_not_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with RecordStore.open(tmp_path, {}, limit_bytes=PLENTY, dtype="float32") as store:
        there = [i for i in range(20) if str(i) in store]
        assert there == list(range(14)), "the whole records of a torn block are kept"
        assert all(same(store.get(str(i)), record_of(i)) for i in there)
        store.refresh()
        assert store.stats.corrupt == 1
        assert caplog.text.count("is lost: its writer was killed") == 1
        for i in range(20):
            store.put(str(i), record_of(i))
        store.flush()
        assert store.stats.written == 20 - len(there)
        assert all(same(store.get(str(i)), record_of(i)) for i in range(20))


def test_a_block_that_is_being_written_is_waited_for(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = opened(), opened()
    write = os.write
    looks: list[int] = []

    def slowly(fd: int, data: memoryview) -> int:
        written = write(fd, data[: max(1, len(data) // 3)])
        reader.refresh()
        looks.append(len(reader))
        return written

    for i in range(10):
        writer.put(str(i), record_of(i))
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", slowly)
        writer.flush()
    assert len(looks) > 10
    assert set(looks) == {0, 10}
    assert reader.stats.corrupt == 0


def test_damage_that_another_copy_found_is_mended(opened: Open) -> None:
    """As where the workers of a loader read: the store that writes has not looked at the record."""
    with opened() as writer:
        writer.put("0", record_of(0))
    (path,) = shards(writer)
    whole = bytearray(path.read_bytes())
    whole[whole.index(bits(record_of(0)["hidden"])) + 5] ^= 4
    path.write_bytes(whole)
    store = opened()
    copy = pickle.loads(pickle.dumps(store))
    copy.refresh()
    assert copy.get("0") is None
    assert store.put("0", record_of(0))
    assert not store.put("0", record_of(0))
    store.close()
    assert same(opened().get("0"), record_of(0))


@pytest.mark.parametrize("where", ["record", "head"])
def test_a_flipped_byte_is_a_miss_and_can_be_mended(opened: Open, caplog: pytest.LogCaptureFixture, where: str) -> None:
    writer = opened()
    for i in range(3):
        writer.put(str(i), record_of(i))
    writer.flush()
    (path,) = shards(writer)
    whole = bytearray(path.read_bytes())
    value = bits(record_of(1)["hidden"])
    whole[whole.index(value) + 5 if where == "record" else 30] ^= 4
    path.write_bytes(whole)
    reader = opened()
    left = [0, 2] if where == "record" else []
    for _ in range(2):
        assert [i for i in range(3) if reader.get(str(i)) is not None] == left
    assert (reader.stats.corrupt, len(caplog.records)) == (1, 1)
    assert reader.put("1", record_of(1))
    reader.flush()
    for store in (reader, opened()):
        assert same(store.get("1"), record_of(1))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_is_taken_for_a_record(data: st.DataObject) -> None:
    """Bytes changed, cut off or put behind, anywhere in the file."""
    with tempfile.TemporaryDirectory() as folder:
        with RecordStore.open(folder, {}, limit_bytes=PLENTY, dtype="bfloat16", lossy=()) as store:
            for i in range(4):
                store.put(str(i), record_of(i, rows=2))
                if i % 2:
                    store.flush()
            (path,) = shards(store)
        whole = bytearray(path.read_bytes())
        for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
            whole[at] ^= data.draw(st.integers(1, 255))
        whole = whole[: data.draw(st.integers(0, len(whole)))] + data.draw(st.binary(max_size=40))
        path.write_bytes(whole)
        with RecordStore.open(folder, {}, limit_bytes=PLENTY, dtype="bfloat16", lossy=()) as store:
            for i in range(4):
                found = store.get(str(i))
                assert found is None or same(found, record_of(i, rows=2))


def fill(store: RecordStore, num: int, first: int = 0) -> None:
    for i in range(first, first + num):
        store.put(str(i), record_of(i))
        store.flush()


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mm.execution.cache.store.shards.SHARD_BYTES", 3_000)


@pytest.mark.usefixtures("small_shards")
def test_shards_of_others_read_longest_ago_make_room(opened: Open, tmp_path: Path) -> None:
    old = opened("old")
    fill(old, 12)
    old.close()
    names = shards(old)
    assert len(names) == 4
    order = random.Random(0).sample(names, 4)
    for age, path in enumerate(order):
        os.utime(path, (1000 + age, 1000 + age))
    reader = opened("old")
    oldest = order[0]
    assert all(reader.get(str(i)) is not None for i in range(12)), "reading makes them young again"
    assert oldest.stat().st_mtime > 2000
    for age, path in enumerate(order):
        os.utime(path, (1000 + age, 1000 + age))
    limit = sum(path.stat().st_size for path in names) + 500
    fill(opened("in use", limit=limit), 1)
    assert shards(old) == names, "what a living process reads is not removed"
    reader.close()
    new = opened("new", limit=limit)
    fill(new, 3)
    assert shards(old) == sorted(order[1:])
    assert new.stats.evicted == 1
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.shard")) <= limit
    assert not new.stopped
    assert same(new.get("0"), record_of(0))
    assert reader.get("0") is None or shards(old), "a reader sees misses"


@pytest.mark.usefixtures("small_shards")
def test_removed_under_a_reader(opened: Open) -> None:
    store, other = opened(), opened()
    fill(store, 9)
    other.refresh()
    assert len(other) == 9
    shards(store)[0].unlink()
    for each in (store, other):
        found = [each.get(str(i)) for i in range(9)]
        assert sum(record is None for record in found) == 3
        each.refresh()
        assert len(each) == 6
        assert each.stats.corrupt == 0
    for _ in range(2):
        for path in shards(store):
            path.unlink()
        assert [store.get(str(i)) for i in range(10)] == [None] * 10
        fill(store, 10)
        other.refresh()
        assert all(same(other.get(str(i)), record_of(i)) for i in range(10)), "the shard being written was removed too"


def test_another_copy_takes_over(opened: Open) -> None:
    """Two ranks wrote the same record; one of the two shards is lost."""
    first, second = opened(), opened()
    for store in (first, second):
        store.put("a", record_of(0))
        store.flush()
    for path in shards(first):
        reader = opened()
        assert len(reader) == 1
        aside = path.rename(path.with_suffix(".aside"))
        assert same(reader.get("a"), record_of(0))
        aside.rename(path)


@pytest.mark.parametrize("bound", ["limit", "free disk"])
def test_writing_stops_where_only_this_identity_is_left(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bound: str
) -> None:
    def usage(path: Path) -> Any:
        used = sum(each.stat().st_size for each in path.rglob("*.shard"))
        return type("Usage", (), {"free": 20_000 - used})

    if bound == "limit":
        store = opened(limit=10_000)
    else:
        monkeypatch.setattr("lightning_mm.execution.cache.store.disk_limit.disk_usage", usage)
        store = opened(free_share=0.5)
    for i in range(100):
        store.put(str(i), record_of(i))
        if i % 7 == 6:
            store.flush()
    assert store.stopped.endswith("is used")
    assert caplog.text.count("no more records are written") == 1
    assert 8_500 < store.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.shard")) <= 10_000
    assert len(store) == store.stats.written == sum(same(store.get(str(i)), record_of(i)) for i in range(100))
    assert store.stats.evicted == 0


@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_a_full_disk_stops_writing_and_nothing_else(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, taken: int
) -> None:
    store = opened()
    fill(store, 5)
    (path,) = shards(store)
    size = path.stat().st_size
    write = os.write
    calls = []

    def full(fd: int, data: memoryview) -> int:
        calls.append(fd)
        if len(calls) <= taken:
            return write(fd, data[: len(data) // taken])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        fill(store, 5, first=5)
    assert len(calls) == 1 + taken, "one failure is enough"
    assert path.stat().st_size == size, "what was torn is taken back"
    assert caplog.text.count("no more records are written") == 1
    assert "No space left on device" in store.stopped
    assert not store.put("9", record_of(9))
    for each in (store, opened()):
        assert [i for i in range(10) if same(each.get(str(i)), record_of(i))] == list(range(5))
        assert each.stats.corrupt == 0


def write_under_a_limit(folder: str) -> None:
    """The kernel refuses to let a file grow beyond 20 000 bytes: it takes a part of the write, then none."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with RecordStore.open(folder, {}, limit_bytes=PLENTY, dtype="float32") as store:
        fill(store, 40)
        assert "File too large" in store.stopped
        assert store.stats.written == len(store) > 10
        assert store.bytes <= 20_000 < store.bytes + store.bytes // len(store)


def test_the_kernel_refuses_to_write(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=write_under_a_limit, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 0
    with RecordStore.open(tmp_path, {}, limit_bytes=PLENTY, dtype="float32") as store:
        assert len(store) > 10
        assert all(same(store.get(str(i)), record_of(i)) for i in range(len(store)))
        assert store.stats.corrupt == 0


def test_a_full_disk_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", full)
        with RecordStore.open(tmp_path / "new", {}, limit_bytes=PLENTY, dtype="float32") as store:
            assert not store.put("a", record_of(0))
            assert store.get("a") is None
            assert "No space" in store.stopped
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        RecordStore.open(tmp_path / "file", {}, limit_bytes=PLENTY, dtype="float32")


def test_without_locks(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none."""

    def none(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none)
    writer, reader = opened(), opened()
    fill(writer, 3)
    reader.refresh()
    assert all(same(reader.get(str(i)), record_of(i)) for i in range(3))


class Stored(Dataset[Tensor]):
    def __init__(self, store: RecordStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        found = self.store.get(str(i))
        assert found is not None
        return found["hidden"]


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_read(opened: Open, how: str) -> None:
    store = opened()
    fill(store, 8)
    store.put("waiting", record_of(8))
    loader = DataLoader(Stored(store), batch_size=4, num_workers=1, multiprocessing_context=how)
    hidden = torch.cat(list(loader))
    assert torch.equal(hidden, torch.stack([record_of(i)["hidden"] for i in range(8)]))
    copy = pickle.loads(pickle.dumps(store))
    assert copy.get("waiting") is None
    with pytest.raises(AssertionError, match="copies of a store only read"):
        copy.put("b", record_of(0))
    copy.close()
    store.flush()
    assert same(store.get("waiting"), record_of(8)), "a worker's end does not end the store"


def test_closed_stores_read_on(opened: Open) -> None:
    store = opened()
    fill(store, 2)
    store.put("2", record_of(2))
    store.close()
    assert not store.put("3", record_of(3))
    assert all(same(store.get(str(i)), record_of(i)) for i in range(3))


def test_heads_are_where_the_format_says(opened: Open) -> None:
    store = opened()
    fill(store, 1)
    magic, count, length = struct.unpack_from("<8sI4xQ", shards(store)[0].read_bytes())
    assert (magic, count, length) == (b"LMMblk1\n", 1, shards(store)[0].stat().st_size)
