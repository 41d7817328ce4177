"""Where each record of a folder of shards lies, kept up with what other processes write and remove.

Data flow: shards -> ``scan`` -> ``Catalogue`` -> places, by the digest of the key.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lightning_mm.execution.cache.store.room import shards_of
from lightning_mm.execution.cache.store.shards import Place, scan

# A miss looks for new records where looking has so far taken less than this share of the time.
_SHARE_OF_TIME = 0.05


class Catalogue:
    """The places of one folder.

    Args:
        folder: Holds the shards.
        damaged: Told what can never be read.
    """

    def __init__(self, folder: Path, damaged: Callable[[str], None]) -> None:
        self._folder, self._damaged = folder, damaged
        self._places: dict[bytes, Place] = {}
        self._spares: dict[bytes, list[Place]] = {}
        self._ends: dict[str, int] = {}
        self._refreshed = self._took = 0.0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    @property
    def num_bytes(self) -> int:
        """What the shards take, as far as was seen."""
        return sum(self._ends.values())

    def find(self, digest: bytes, writing: str) -> Place | None:
        """Where the record is; the folder is looked at again where it is not known and looking is cheap."""
        if digest not in self._places and self._took <= _SHARE_OF_TIME * (time.monotonic() - self._refreshed):
            self.refresh(writing)
        return self._places.get(digest)

    def add(self, places: Iterable[tuple[bytes, Place]], shard: str, end: int) -> None:
        """Note records down; ``end`` is the first byte of the shard that was not looked at."""
        for digest, place in places:
            if self._places.setdefault(digest, place) != place:
                self._spares.setdefault(digest, []).append(place)
        self._ends[shard] = end

    def trust(self, digest: bytes) -> None:
        """The record has its checksum: it is not compared again."""
        self._places[digest] = self._places[digest]._replace(checksum=None)

    def drop(self, digest: bytes) -> None:
        """Forget a place; another one of the same record, written by another process, takes over."""
        del self._places[digest]
        if spares := self._spares.get(digest):
            self._places[digest] = spares.pop()

    def refresh(self, writing: str) -> None:
        """See what others have written and removed; ``writing`` is the shard that this process writes."""
        begun = time.monotonic()
        shards = {shard.path.name: shard.size for shard in shards_of(self._folder)}
        if gone := self._ends.keys() - shards.keys():
            self._ends = {shard: end for shard, end in self._ends.items() if shard not in gone}
            for digest in [digest for digest, place in self._places.items() if place.shard in gone]:
                self.drop(digest)
        for shard, size in shards.items():
            if size > self._ends.get(shard, 0) and shard != writing:
                self._take_in(shard, size)
        self._refreshed = time.monotonic()
        self._took = self._refreshed - begun

    def _take_in(self, shard: str, size: int) -> None:
        try:
            found = scan(self._folder / shard, self._ends.get(shard, 0))
        except OSError:
            return
        self.add(found.places, shard, max(found.end, size) if found.fault else found.end)
        if found.fault:
            self._damaged(f"the end of {shard} is lost: {found.fault}")
