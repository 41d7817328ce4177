"""A store of records: what waits in memory, what is on disk, and what happens when something goes wrong.

Data flow: ``put`` -> a block in memory -> a shard on disk -> ``get``, here and in every process that opened the same
identity. To lose a record is never a fault: what is missing, damaged, removed or not written yet is a miss.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_atomically
from lightning_mm.execution.cache.store.disk_limit import DiskLimit, FolderInUse
from lightning_mm.execution.cache.store.encoding import RoundingError, StorageDtype, decode_record, encode_record
from lightning_mm.execution.cache.store.shards import (
    RecordIndex,
    RecordLocation,
    ShardWriter,
    block_bytes,
    read_record,
)

BLOCK_BYTES = 4 * 2**20
BLOCK_SECONDS = 5.0
_TOUCH_SECONDS = 60.0
_FORMAT = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

log = logging.getLogger("lightning_mm")


@dataclass
class StoreStats:
    """What happened to a store in this process.

    Args:
        hits: Records that were asked for and found.
        misses: Records that were asked for and not there.
        written: Records that this process put on disk.
        evicted: Shards of other identities that this process removed to make room.
        corrupt: Records, or ends of shards, that are damaged.
        rounding: How far lossy tensors are from what was given, over all records put or read here, each once.
    """

    hits: int = 0
    misses: int = 0
    written: int = 0
    evicted: int = 0
    corrupt: int = 0
    rounding: RoundingError = field(default_factory=RoundingError)

    @property
    def relative_error(self) -> float:
        """Root mean square error of what is stored, over the root mean square of what was given."""
        return self.rounding.relative


class RecordStore:
    """Tensors by key, shared by all processes that opened the same identity; made by ``open``.

    A store belongs to one thread. Its copies in the workers of a DataLoader, pickled or forked, only read. An empty
    store is false, as any collection is: ask ``is None`` where there may be no store.

    Args:
        folder: Holds the shards of the identity.
        limit: The bounds of the folder above it.
        dtype: How lossy tensors are stored.
        lossy: Their names.
    """

    def __init__(self, folder: Path, limit: DiskLimit, dtype: StorageDtype, lossy: Collection[str]) -> None:
        self.folder = folder
        self.stats = StoreStats()
        self.stopped = ""
        """Why nothing more is written; empty while records are taken."""
        self._limit, self._dtype, self._lossy = limit, dtype, lossy
        self._pid: int | None = os.getpid()
        self._in_use = FolderInUse(folder)
        self._writer = ShardWriter(folder)
        self._index = RecordIndex(folder, self._damaged)
        self._pending: dict[bytes, Tensor] = {}
        self._pending_bytes = 0
        self._pending_since = 0.0
        self._touched: dict[str, float] = {}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        identity: Mapping[str, Any],
        *,
        limit_bytes: int,
        dtype: StorageDtype,
        free_share: float = 0.5,
        lossy: Collection[str] = ("hidden",),
    ) -> "RecordStore":
        """The records of one identity.

        Args:
            folder: Holds a folder for each identity.
            identity: All that the records depend on besides their key, as JSON values; how they are stored is added.
            limit_bytes: The most that all identities in ``folder`` may take.
            dtype: How floating tensors named in ``lossy`` are stored; all others are stored exactly.
            free_share: The most that they may take of what the disk would have free without them.
            lossy: Names of tensors.

        Raises:
            UserError: The folder cannot be made.
        """
        whole = {"identity": dict(identity), "dtype": dtype, "lossy": sorted(lossy), "format": _FORMAT}
        canonical = json.dumps(whole, sort_keys=True, allow_nan=False, separators=(",", ":"))
        root = Path(folder).absolute()
        own = root / hashlib.sha256(canonical.encode()).hexdigest()[:32]
        why = ""
        try:
            own.mkdir(parents=True, exist_ok=True)
            if not (own / "identity.json").exists():
                write_atomically(own / "identity.json", json.dumps(whole, indent=2, sort_keys=True))
        except OSError as error:
            why = error.strerror or str(error)
            if error.errno not in _NO_ROOM:
                raise UserError(f"The cache folder {root} cannot be used.", why, "Name another folder.") from error
        store = cls(own, DiskLimit(root, limit_bytes, free_share), dtype, lossy)
        if why:
            store._stop(why)
        store.refresh()
        return store

    def __len__(self) -> int:
        return len(self._index) + len(self._pending)

    def __contains__(self, key: str) -> bool:
        digest = _digest(key)
        return digest in self._pending or self._index.find(digest, self._own_shard) is not None

    @property
    def bytes(self) -> int:
        """What the identity takes on disk, as far as this process has seen."""
        return self._index.num_bytes

    def get(self, key: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor] | None:
        """The record, in memory of its own; None where it is not there.

        Args:
            key: Any string.
            dtype: What lossy tensors are decoded to; all others are as they were given.
        """
        digest = _digest(key)
        if digest in self._pending:
            self.stats.hits += 1
            return decode_record(self._pending[digest], dtype)[0]
        while (location := self._index.find(digest, self._own_shard)) is not None:
            data = self._read(location)
            if data is None:
                self._index.drop(digest)
                continue
            record, rounding = decode_record(data, dtype)
            if location.checksum is not None:
                self._index.set_verified(digest)
                if location.shard not in self._writer.names:  # what this process has put was counted then
                    self.stats.rounding = self.stats.rounding.plus(rounding)
            self.stats.hits += 1
            return record
        self.stats.misses += 1
        return None

    def put(self, key: str, record: Mapping[str, Tensor]) -> bool:
        """Keep a record, on disk with the next block; whether it was taken. A sound one that is there stays."""
        assert self._pid == os.getpid(), "copies of a store only read"
        digest = _digest(key)
        if self.stopped or digest in self._pending or self._holds(key):
            return False
        if not self._pending:
            self._pending_since = time.monotonic()
        data, rounding = encode_record(record, self._dtype, self._lossy)
        self.stats.rounding = self.stats.rounding.plus(rounding)
        self._pending[digest] = data
        self._pending_bytes += len(data)
        if self._pending_bytes >= BLOCK_BYTES or time.monotonic() - self._pending_since > BLOCK_SECONDS:
            self.flush()
        return True

    def flush(self) -> None:
        """Put on disk what waits in memory, as far as there is room: then other processes see it."""
        if not self._pending or self._pid != os.getpid():
            return
        records = list(self._pending.items())
        try:
            with self._limit.exclusive():
                reservation = self._limit.reserve(block_bytes([len(data) for _, data in records]), self.folder)
                while records and block_bytes([len(data) for _, data in records]) > reservation.num_bytes:
                    records.pop()
                if records:
                    locations, end = self._writer.append(records)
        except OSError as error:
            self._stop(error.strerror or str(error))
            return
        self.stats.evicted += reservation.num_evicted
        self.stats.written += len(records)
        if records:
            self._index.add(locations, self._own_shard, end)
        if len(records) < len(self._pending):
            self._stop(reservation.bound)
        self._forget_pending()

    def refresh(self) -> None:
        """See what other processes have written and removed."""
        self._index.refresh(self._own_shard)

    def close(self) -> None:
        """Write what waits, tell what rounding has lost, and let others make room; ``get`` still works."""
        self.flush()
        self.stopped = self.stopped or "the store is closed"
        self._writer.close()
        self._in_use.end()
        if self.stats.written and self._pid == os.getpid():
            error = self.stats.relative_error
            what = f"{self.stats.written} records written in {self._dtype}, {error:.2%} RMS from what was given"
            log.info("model.cache: %s (%s)", what, self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit": self._limit, "dtype": self._dtype, "lossy": self._lossy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
        self._pid = None

    @property
    def _own_shard(self) -> str:
        """The shard that this process writes; in a copy, none."""
        return self._writer.names[-1] if self._writer.names and self._pid == os.getpid() else ""

    def _holds(self, key: str) -> bool:
        """Whether the record is on disk and sound: copies of this store have not told where they found damage."""
        digest = _digest(key)
        while (location := self._index.get(digest)) is not None:
            if self._read(location) is not None:
                return True
            self._index.drop(digest)
        return False

    def _read(self, location: RecordLocation) -> Tensor | None:
        path = self.folder / location.shard
        try:
            data = read_record(path, location)
        except OSError:
            return None
        if data is None:
            self._damaged(f"a record of {location.shard} does not have its checksum; it counts as missing")
        elif time.monotonic() - self._touched.get(location.shard, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[location.shard] = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(path)
        return data

    def _damaged(self, what: str) -> None:
        self.stats.corrupt += 1
        log.warning("%s: %s", self.folder, what)

    def _stop(self, why: str) -> None:
        self.stopped = why
        self._forget_pending()
        self._writer.close()
        log.warning("%s: no more records are written, those that are there are used (%s)", self.folder, why)

    def _forget_pending(self) -> None:
        self._pending.clear()
        self._pending_bytes = 0


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()
