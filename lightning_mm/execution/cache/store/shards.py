"""Files that many processes append records to and read from at the same time, each process to files of its own.

Data flow: ``store`` -> ``ShardWriter`` -> ``*.shard`` -> ``scan`` -> places of records -> ``read`` -> bytes.

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
import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

SHARD_BYTES = 64 * 2**20
_MAGIC = b"LMMblk1\n"
_HEAD = struct.Struct("<8sI4xQ")
_ENTRY = struct.Struct("<16sQI4x")
_SUM = struct.Struct("<I")
_ALIGN = 64


class Place(NamedTuple):
    """Where a record lies.

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
class Scan:
    """What was found in a shard.

    Args:
        places: By the digest of the key.
        end: The first byte that was not understood: the next scan begins there.
        fault: Why the rest of the shard will never be understood; empty where it may grow.
    """

    places: list[tuple[bytes, Place]] = field(default_factory=list)
    end: int = 0
    fault: str = ""


def block_bytes(lengths: Sequence[int]) -> int:
    """The bytes of a block with records of these lengths."""
    return _head_bytes(len(lengths)) + sum(lengths)


def scan(path: Path, start: int) -> Scan:
    """The records of a shard from byte ``start`` on, without reading them.

    Raises:
        OSError: The file is gone or cannot be read.
    """
    with path.open("rb") as file:
        alive = True
        found = Scan(end=start)
        while True:
            size = os.fstat(file.fileno()).st_size
            while found.end < size and not found.fault and _read_block(file, size, alive, found):
                pass
            if found.end == size or found.fault or not alive:
                return found
            alive = _locked_elsewhere(file.fileno())
            if alive:
                return found


def _read_block(file: BinaryIO, size: int, alive: bool, found: Scan) -> bool:
    """Add one block's records to ``found``; whether there was a whole one."""
    file.seek(found.end)
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        found.fault = "" if alive else "its writer was killed"
        return False
    magic, count, length = _HEAD.unpack(head)
    sound = magic == _MAGIC and 0 < count * _ENTRY.size < length
    entries = file.read(min(count * _ENTRY.size, size)) if sound else b""
    checksum = file.read(_SUM.size) if sound else b""
    if sound and len(checksum) < _SUM.size:
        found.fault = "" if alive else "its writer was killed"
        return False
    if not sound or _SUM.unpack(checksum)[0] != zlib.crc32(entries, zlib.crc32(head)):
        found.fault = "a block's head is damaged"
        return False
    if found.end + length > size and alive:
        return False
    at = found.end + _head_bytes(count)
    for digest, bytes_of, crc in _ENTRY.iter_unpack(entries):
        if at + bytes_of > size:
            found.fault = "its writer was killed"
            return False
        found.places.append((digest, Place(file.name.rpartition("/")[2], at, bytes_of, crc)))
        at += bytes_of
    found.end = at
    return True


def read(path: Path, place: Place) -> Tensor | None:
    """The (bytes,) uint8 of a record, mapped for as long as the tensor lives; None where it is damaged.

    Raises:
        OSError: The file is gone or cannot be read.
    """
    end, first = place.start + place.length, place.start - place.start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < end:
            return None
        pages = mmap.mmap(file.fileno(), end - first, access=mmap.ACCESS_COPY, offset=first)
    pages.madvise(mmap.MADV_WILLNEED)
    data = torch.frombuffer(pages, dtype=torch.uint8)[place.start - first :]
    sound = place.checksum is None or zlib.crc32(data.numpy().data) == place.checksum
    return data if sound else None


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
        self._close: Callable[[], object] = _no_file

    def write(self, records: Sequence[tuple[bytes, Tensor]]) -> tuple[list[tuple[bytes, Place]], int]:
        """Append one block of (digest, record).

        Returns:
            Where the records are, and the first byte behind them.

        Raises:
            OSError: It could not be written; nothing of it is left in the shard.
        """
        fd = self._opened()
        parts = [memoryview(data.numpy().data) for _, data in records]
        head = bytearray(_HEAD.pack(_MAGIC, len(records), block_bytes([len(part) for part in parts])))
        sums = [zlib.crc32(part) for part in parts]
        for (digest, _), part, crc in zip(records, parts, sums, strict=True):
            head += _ENTRY.pack(digest, len(part), crc)
        head += _SUM.pack(zlib.crc32(head))
        head += bytes(-len(head) % _ALIGN)
        places, end = [], self._end + len(head)
        for (digest, _), part, crc in zip(records, parts, sums, strict=True):
            places.append((digest, Place(self.names[-1], end, len(part), crc)))
            end += len(part)
        try:
            for part in (memoryview(head), *parts):
                _append(fd, part)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, self._end)
            raise
        self._end = end
        return places, end

    def close(self) -> None:
        """End the shard that is being written."""
        self._close()
        self._fd = None

    def _opened(self) -> int:
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


def _append(fd: int, part: memoryview) -> None:
    while part:
        part = part[os.write(fd, part) :]


def lock(fd: int, *, shared: bool, wait: bool) -> bool:
    """Lock an open file until it is closed; whether that worked. Held by others, or a file system without locks: no."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _locked_elsewhere(fd: int) -> bool:
    """Whether a writer lives, as far as can be told: where there are no locks, yes."""
    return not lock(fd, shared=True, wait=False)


def _no_file() -> None:
    """Nothing to close."""


def _head_bytes(count: int) -> int:
    length = _HEAD.size + count * _ENTRY.size + _SUM.size
    return length + -length % _ALIGN
