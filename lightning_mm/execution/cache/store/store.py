"""A store of records: what waits in memory, what is on disk, and what happens when something goes wrong.

Data flow: ``put`` -> a block in memory -> a shard on disk -> ``get``, here and in every process that opened the same
identity. To lose a record is never a fault: what is missing, damaged, removed or not written yet is a miss.
"""

import contextlib
import errno
import hashlib
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
from lightning_mm.execution.cache.store.catalogue import Catalogue
from lightning_mm.execution.cache.store.identity import folder_of, make
from lightning_mm.execution.cache.store.records import Distance, Kept, decode, encode
from lightning_mm.execution.cache.store.room import Room, Use
from lightning_mm.execution.cache.store.shards import Place, ShardWriter, block_bytes, read

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
        distance: How far lossy tensors are from what was given, over all records put or read here, each once.
    """

    hits: int = 0
    misses: int = 0
    written: int = 0
    evicted: int = 0
    corrupt: int = 0
    distance: Distance = field(default_factory=Distance)

    @property
    def relative_error(self) -> float:
        """Root mean square error of what is kept, over the root mean square of what was given."""
        return self.distance.relative


class RecordStore:
    """Tensors by key, shared by all processes that opened the same identity; made by ``open``.

    A store belongs to one thread. Its copies in the workers of a DataLoader, pickled or forked, only read. An empty
    store is false, as any collection is: ask ``is None`` where there may be no store.

    Args:
        folder: Holds the shards of the identity.
        room: The bounds of the folder above it.
        kept: How lossy tensors are kept.
        lossy: Their names.
    """

    def __init__(self, folder: Path, room: Room, kept: Kept, lossy: Collection[str]) -> None:
        self.folder = folder
        self.stats = StoreStats()
        self.stopped = ""
        """Why nothing more is written; empty while records are taken."""
        self._room, self._kept, self._lossy = room, kept, lossy
        self._pid: int | None = os.getpid()
        self._use = Use(folder)
        self._writer = ShardWriter(folder)
        self._catalogue = Catalogue(folder, self._damaged)
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
        dtype: Kept,
        free_share: float = 0.5,
        lossy: Collection[str] = ("hidden",),
    ) -> "RecordStore":
        """The records of one identity.

        Args:
            folder: Holds a folder for each identity.
            identity: All that the records depend on besides their key, as JSON values; how they are kept is added.
            limit_bytes: The most that all identities in ``folder`` may take.
            dtype: How floating tensors named in ``lossy`` are kept; all others are kept exactly.
            free_share: The most that they may take of what the disk would have free without them.
            lossy: Names of tensors.

        Raises:
            UserError: The folder cannot be made.
        """
        whole = {"identity": dict(identity), "dtype": dtype, "lossy": sorted(lossy), "format": _FORMAT}
        root = Path(folder).absolute()
        own = folder_of(root, whole)
        why = ""
        try:
            make(own, whole)
        except OSError as error:
            why = error.strerror or str(error)
            if error.errno not in _NO_ROOM:
                raise UserError(f"The cache folder {root} cannot be used.", why, "Name another folder.") from error
        store = cls(own, Room(root, limit_bytes, free_share), dtype, lossy)
        if why:
            store._stop(why)
        store.refresh()
        return store

    def __len__(self) -> int:
        return len(self._catalogue) + len(self._pending)

    def __contains__(self, key: str) -> bool:
        digest = _digest(key)
        return digest in self._pending or self._catalogue.find(digest, self._writing) is not None

    @property
    def bytes(self) -> int:
        """What the identity takes on disk, as far as this process has seen."""
        return self._catalogue.num_bytes

    def get(self, key: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor] | None:
        """The record, in memory of its own; None where it is not there.

        Args:
            key: Any string.
            dtype: What lossy tensors are decoded to; all others are as they were given.
        """
        digest = _digest(key)
        if digest in self._pending:
            self.stats.hits += 1
            return decode(self._pending[digest], dtype)[0]
        while (place := self._catalogue.find(digest, self._writing)) is not None:
            data = self._read(place)
            if data is None:
                self._catalogue.drop(digest)
                continue
            record, distance = decode(data, dtype)
            if place.checksum is not None:
                self._catalogue.trust(digest)
                counted = place.shard in self._writer.names
                self.stats.distance = self.stats.distance.plus(Distance() if counted else distance)
            self.stats.hits += 1
            return record
        self.stats.misses += 1
        return None

    def put(self, key: str, record: Mapping[str, Tensor]) -> bool:
        """Keep a record, on disk with the next block; whether it was taken. One that is there is not taken again."""
        assert self._pid == os.getpid(), "copies of a store only read"
        digest = _digest(key)
        if self.stopped or digest in self._pending or digest in self._catalogue:
            return False
        if not self._pending:
            self._pending_since = time.monotonic()
        data, distance = encode(record, self._kept, self._lossy)
        self.stats.distance = self.stats.distance.plus(distance)
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
            with self._room.alone():
                claim = self._room.claim(block_bytes([len(data) for _, data in records]), self.folder)
                while records and block_bytes([len(data) for _, data in records]) > claim.room:
                    records.pop()
                if records:
                    places, end = self._writer.write(records)
        except OSError as error:
            self._stop(error.strerror or str(error))
            return
        self.stats.evicted += claim.removed
        self.stats.written += len(records)
        if records:
            self._catalogue.add(places, self._writing, end)
        if len(records) < len(self._pending):
            self._stop(claim.bound)
        self._forget_pending()

    def refresh(self) -> None:
        """See what other processes have written and removed."""
        self._catalogue.refresh(self._writing)

    def close(self) -> None:
        """Write what waits, tell what rounding has lost, and let others make room; ``get`` still works."""
        self.flush()
        self.stopped = self.stopped or "the store is closed"
        self._writer.close()
        self._use.end()
        if self.stats.written and self._pid == os.getpid():
            error = self.stats.relative_error
            what = f"{self.stats.written} records written in {self._kept}, {error:.2%} RMS from what was given"
            log.info("%s: %s", self.folder, what)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "room": self._room, "kept": self._kept, "lossy": self._lossy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
        self._pid = None

    @property
    def _writing(self) -> str:
        """The shard that this process writes; in a copy, none."""
        return self._writer.names[-1] if self._writer.names and self._pid == os.getpid() else ""

    def _read(self, place: Place) -> Tensor | None:
        path = self.folder / place.shard
        try:
            data = read(path, place)
        except OSError:
            return None
        if data is None:
            self._damaged(f"a record of {place.shard} does not have its checksum; it counts as missing")
        elif time.monotonic() - self._touched.get(place.shard, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[place.shard] = time.monotonic()
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
