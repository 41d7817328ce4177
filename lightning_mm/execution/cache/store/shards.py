"""Files that many processes append records to and read from at the same time, and the index of what lies in them.

Data flow: ``ShardWriter.append`` -> ``*.shard`` -> ``scan_shard`` -> ``RecordIndex`` -> location -> ``read_record``.

Each process appends to shards of its own: none waits for another, and a file system without locks will do. A database
of all records, such as sqlite, needs locks, and a query per record: 20 % and more of the time of reading a small one.

A shard is a run of blocks: head (magic, number of records, bytes of the block) | one entry per record (digest of its
key, length, checksum) | checksum of all before | zeros up to a multiple of 64 bytes | records, each a multiple of 64
bytes long. A writer holds a lock on its shard as long as it lives: an unfinished block of a living writer is not looked
at, one of a dead writer is torn, and the records that are whole in it are kept.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import struct
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

SHARD_BYTES = 64 * 2**20
"""A shard that is so long gets no more blocks; shards are also what is removed to make room."""
REFRESH_TIME_SHARE = 0.05
"""A miss looks for new records where looking has so far taken less than this share of the time."""
_MAGIC = b"LMMblk1\n"
_HEAD = struct.Struct("<8sI4xQ")
_ENTRY = struct.Struct("<16sQI4x")
_SUM = struct.Struct("<I")
_ALIGN = 64


class ShardFile(NamedTuple):
    """A shard on disk: when it was last read or written (seconds since the epoch), its bytes, where it is."""

    used: float
    size: int
    path: Path


class RecordLocation(NamedTuple):
    """Where the bytes of a record lie.

    Args:
        shard: The file's name.
        start: Its first byte there.
        length: Its bytes.
        checksum: CRC-32 of them; None once it was compared.
    """

    shard: str
    start: int
    length: int
    checksum: int | None


@dataclass
class ShardScan:
    """What was found in a shard.

    Args:
        records: (digest of the key, location) of each record.
        end: The first byte that was not understood: the next scan begins there.
        fault: Why the rest of the shard will never be understood; empty where it may grow.
    """

    records: list[tuple[bytes, RecordLocation]] = field(default_factory=list)
    end: int = 0
    fault: str = ""


def list_shards(folder: Path) -> Iterator[ShardFile]:
    """The shards in ``folder``; none where it is gone."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.name.endswith(".shard"):
                    yield ShardFile(entry.stat().st_mtime, entry.stat().st_size, Path(entry.path))


def block_bytes(lengths: Sequence[int]) -> int:
    """The bytes of a block with records of these lengths."""
    return _head_bytes(len(lengths)) + sum(lengths)


def scan_shard(path: Path, start: int) -> ShardScan:
    """The records of a shard from byte ``start`` on, without reading them.

    Raises:
        OSError: The file is gone or cannot be read.
    """
    with path.open("rb") as file:
        has_writer = True
        found = ShardScan(end=start)
        while True:
            size = os.fstat(file.fileno()).st_size
            while found.end < size and not found.fault and _scan_block(file, size, has_writer, found):
                pass
            if found.end == size or found.fault or not has_writer:
                return found
            # The writer may have ended the block since: once more, now that it is known whether it lives. Where there
            # are no locks, it does.
            has_writer = not lock(file.fileno(), shared=True, wait=False)
            if has_writer:
                return found


def read_record(path: Path, location: RecordLocation) -> Tensor | None:
    """The (bytes,) uint8 of a record, mapped for as long as the tensor lives; None where it is damaged.

    Raises:
        OSError: The file is gone or cannot be read.
    """
    end, first = location.start + location.length, location.start - location.start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < end:
            return None
        pages = mmap.mmap(file.fileno(), end - first, access=mmap.ACCESS_COPY, offset=first)
    pages.madvise(mmap.MADV_WILLNEED)
    data = torch.frombuffer(pages, dtype=torch.uint8)[location.start - first :]
    is_sound = location.checksum is None or zlib.crc32(data.numpy().data) == location.checksum
    return data if is_sound else None


def lock(fd: int, *, shared: bool, wait: bool) -> bool:
    """Lock an open file until it is closed; False where others hold it, or the file system has no locks."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


class ShardWriter:
    """Appends blocks to shards of its own, one after the other, each of about 64 MiB.

    Args:
        folder: Where they go.

    ``names`` are the shards so far; the last one is being written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names: list[str] = []
        self._end = 0
        self._fd: int | None = None
        self._close: Callable[[], object] = lambda: None

    def append(self, records: Sequence[tuple[bytes, Tensor]]) -> tuple[list[tuple[bytes, RecordLocation]], int]:
        """Append one block of (digest of the key, bytes of the record).

        Returns:
            Where the records are, and the end of the block.

        Raises:
            OSError: It could not be written; nothing of it is left in the shard.
        """
        fd = self._open()
        parts = [memoryview(data.numpy().data) for _, data in records]
        checksums = [zlib.crc32(part) for part in parts]
        head = bytearray(_HEAD.pack(_MAGIC, len(records), block_bytes([len(part) for part in parts])))
        for (digest, _), part, checksum in zip(records, parts, checksums, strict=True):
            head += _ENTRY.pack(digest, len(part), checksum)
        head += _SUM.pack(zlib.crc32(head))
        head += bytes(-len(head) % _ALIGN)
        locations, end = [], self._end + len(head)
        for (digest, _), part, checksum in zip(records, parts, checksums, strict=True):
            locations.append((digest, RecordLocation(self.names[-1], end, len(part), checksum)))
            end += len(part)
        try:
            for part in (memoryview(head), *parts):
                while part:
                    part = part[os.write(fd, part) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, self._end)
            raise
        self._end = end
        return locations, end

    def close(self) -> None:
        """End the shard that is being written."""
        self._close()
        self._fd = None

    def _open(self) -> int:
        """The shard to append to: a new one at first, when the old one is long enough, and when somebody removed it."""
        if self._fd is not None and self._end < SHARD_BYTES and os.fstat(self._fd).st_nlink:
            return self._fd
        self.close()
        name = f"{os.getpid()}-{secrets.token_hex(8)}.shard"
        self._fd = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self._close = weakref.finalize(self, os.close, self._fd)
        self.names.append(name)
        self._end = 0
        lock(self._fd, shared=False, wait=False)
        return self._fd


class RecordIndex:
    """Where each record of one folder lies, kept up with what other processes write and remove.

    Args:
        folder: Holds the shards.
        on_damage: Called with what can never be read, in words.
    """

    def __init__(self, folder: Path, on_damage: Callable[[str], None]) -> None:
        self._folder, self._on_damage = folder, on_damage
        self._locations: dict[bytes, RecordLocation] = {}
        self._duplicates: dict[bytes, list[RecordLocation]] = {}
        self._ends: dict[str, int] = {}
        self._refreshed = self._took = 0.0

    def __len__(self) -> int:
        return len(self._locations)

    def get(self, digest: bytes) -> RecordLocation | None:
        """Where the record lies, as far as was seen."""
        return self._locations.get(digest)

    @property
    def num_bytes(self) -> int:
        """What the shards take, as far as was seen."""
        return sum(self._ends.values())

    def find(self, digest: bytes, own_shard: str) -> RecordLocation | None:
        """Where the record lies; where that is not known, and looking is cheap, the folder is looked at again."""
        since = time.monotonic() - self._refreshed
        if digest not in self._locations and self._took <= REFRESH_TIME_SHARE * since:
            self.refresh(own_shard)
        return self._locations.get(digest)

    def add(self, records: Iterable[tuple[bytes, RecordLocation]], shard: str, end: int) -> None:
        """Add records; ``end`` is the first byte of the shard that was not looked at."""
        for digest, location in records:
            if self._locations.setdefault(digest, location) != location:
                self._duplicates.setdefault(digest, []).append(location)
        self._ends[shard] = end

    def set_verified(self, digest: bytes) -> None:
        """Do not compare the record's checksum again: it has it."""
        self._locations[digest] = self._locations[digest]._replace(checksum=None)

    def drop(self, digest: bytes) -> None:
        """Forget a location; another one of the same record, written by another process, takes over."""
        del self._locations[digest]
        if duplicates := self._duplicates.get(digest):
            self._locations[digest] = duplicates.pop()

    def refresh(self, own_shard: str) -> None:
        """See what other processes have written and removed; ``own_shard`` is being written by this one."""
        begun = time.monotonic()
        sizes = {shard.path.name: shard.size for shard in list_shards(self._folder)}
        if gone := self._ends.keys() - sizes.keys():
            self._ends = {shard: end for shard, end in self._ends.items() if shard not in gone}
            for digest in [digest for digest, location in self._locations.items() if location.shard in gone]:
                self.drop(digest)
        for shard, size in sizes.items():
            if size > self._ends.get(shard, 0) and shard != own_shard:
                self._scan(shard, size)
        self._refreshed = time.monotonic()
        self._took = self._refreshed - begun

    def _scan(self, shard: str, size: int) -> None:
        try:
            found = scan_shard(self._folder / shard, self._ends.get(shard, 0))
        except OSError:
            return
        self.add(found.records, shard, max(found.end, size) if found.fault else found.end)
        if found.fault:
            self._on_damage(f"the end of {shard} is lost: {found.fault}")


def _scan_block(file: BinaryIO, size: int, has_writer: bool, found: ShardScan) -> bool:
    """Add one block's records to ``found``; whether there was a whole one."""
    torn = "" if has_writer else "its writer was killed"
    file.seek(found.end)
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        found.fault = torn
        return False
    magic, count, length = _HEAD.unpack(head)
    is_sound = magic == _MAGIC and 0 < count * _ENTRY.size < length
    entries = file.read(min(count * _ENTRY.size, size)) if is_sound else b""
    checksum = file.read(_SUM.size) if is_sound else b""
    if is_sound and len(checksum) < _SUM.size:
        found.fault = torn
        return False
    if not is_sound or _SUM.unpack(checksum)[0] != zlib.crc32(entries, zlib.crc32(head)):
        found.fault = "a block's head is damaged"
        return False
    if found.end + length > size and has_writer:
        return False
    start = found.end + _head_bytes(count)
    for digest, num_bytes, crc in _ENTRY.iter_unpack(entries):
        if start + num_bytes > size:
            found.fault = torn
            return False
        found.records.append((digest, RecordLocation(Path(file.name).name, start, num_bytes, crc)))
        start += num_bytes
    found.end = start
    return True


def _head_bytes(num_records: int) -> int:
    length = _HEAD.size + num_records * _ENTRY.size + _SUM.size
    return length + -length % _ALIGN
