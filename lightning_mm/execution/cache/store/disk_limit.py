"""How much the cache may take on disk, and making room by removing the shards that were used longest ago.

Data flow: sizes of all shards, free disk -> ``DiskLimit.reserve`` -> bytes that may be written; shards removed.
"""

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage
from typing import NamedTuple

from lightning_mm.execution.cache.store.shards import list_shards, lock

_IN_USE = "in_use"
"""A file of each identity's folder, locked by every process that has opened it."""


class Reservation(NamedTuple):
    """What may be written.

    Args:
        num_bytes: How much.
        bound: What bounds it, in words.
        num_evicted: Shards that were removed for it.
    """

    num_bytes: int
    bound: str
    num_evicted: int


class DiskLimit:
    """The bounds of a folder that holds a folder of shards for each identity.

    Args:
        root: The folder.
        limit_bytes: The most that all of them may take.
        free_share: The most that they may take of what the disk would have free without them.
    """

    def __init__(self, root: Path, limit_bytes: int, free_share: float) -> None:
        self.root, self.limit_bytes, self.free_share = root, limit_bytes, free_share

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes out of this context, where the file system has locks.

        Raises:
            OSError: The folder cannot be written to.
        """
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(fd, shared=False, wait=True)
            yield
        finally:
            os.close(fd)

    def reserve(self, num_bytes: int, own: Path) -> Reservation:
        """Remove shards that no process uses until ``num_bytes`` may be written, as far as there are such shards.

        Args:
            num_bytes: Bytes that are to be written.
            own: The folder whose shards stay: what was read longest ago in a cycle is what is read next.

        Raises:
            OSError: The disk does not tell how much is free.
        """
        folders = [Path(entry.path) for entry in os.scandir(self.root) if entry.is_dir()]
        shards = [shard for folder in folders for shard in list_shards(folder)]
        used = sum(shard.size for shard in shards)
        share = int(self.free_share * (disk_usage(self.root).free + used))
        limit = min(self.limit_bytes, share)
        is_idle = {own: False}
        num_evicted = 0
        for shard in sorted(shards):
            if used + num_bytes <= limit:
                break
            folder = shard.path.parent
            if folder not in is_idle:
                is_idle[folder] = _is_idle(folder)
            if is_idle[folder]:
                with contextlib.suppress(OSError):
                    shard.path.unlink(missing_ok=True)
                    used -= shard.size
                    num_evicted += 1
        bound = f"its limit of {self.limit_bytes / 1e6:,.0f} MB"
        if limit != self.limit_bytes:
            bound = f"{self.free_share:.0%} of the free disk, {share / 1e6:,.0f} MB,"
        return Reservation(limit - used, f"{bound} is used", num_evicted)


class FolderInUse:
    """Keeps other processes from removing the shards of ``folder`` as long as it lives and is not ended."""

    def __init__(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            fd = os.open(folder / _IN_USE, os.O_RDWR | os.O_CREAT, 0o666)
            self._end = weakref.finalize(self, os.close, fd)
            lock(fd, shared=True, wait=True)

    def end(self) -> None:
        """Let others remove them."""
        if hasattr(self, "_end"):
            self._end()


def _is_idle(folder: Path) -> bool:
    """Whether no living process uses the folder."""
    try:
        fd = os.open(folder / _IN_USE, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        return lock(fd, shared=False, wait=False)
    finally:
        os.close(fd)
