"""How much may be written into a folder of identities, and making room by removing what nobody uses.

Data flow: sizes of all shards, free disk -> ``Room.claim`` -> bytes that may be written; shards removed.
"""

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage
from typing import NamedTuple

from lightning_mm.execution.cache.store.shards import lock

_IN_USE = "in_use"


class Shard(NamedTuple):
    """A shard on disk: when it was last read or written, its bytes, where it is."""

    used: float
    size: int
    path: Path


class Claim(NamedTuple):
    """What may be written.

    Args:
        room: In bytes.
        bound: What bounds it, in words.
        removed: Shards that were removed for it.
    """

    room: int
    bound: str
    removed: int


def shards_of(folder: Path) -> Iterator[Shard]:
    """The shards in ``folder``; none where it is gone."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.name.endswith(".shard"):
                    yield Shard(entry.stat().st_mtime, entry.stat().st_size, Path(entry.path))


class Room:
    """The bounds of a folder.

    Args:
        root: Holds a folder of shards for each identity.
        limit_bytes: The most that all of them may take.
        free_share: The most that they may take of what the disk would have free without them.
    """

    def __init__(self, root: Path, limit_bytes: int, free_share: float) -> None:
        self.root, self.limit_bytes, self.free_share = root, limit_bytes, free_share

    def claim(self, need: int, own: Path) -> Claim:
        """Bytes that may be written: ``need``, where removing shards that no process uses can make it so.

        Args:
            need: Bytes that are to be written.
            own: The folder whose shards stay: to remove from a cycle what was read longest ago is to remove what is
                read next.

        Raises:
            OSError: The disk does not tell.
        """
        folders = [Path(entry.path) for entry in os.scandir(self.root) if entry.is_dir()]
        shards = [shard for folder in folders for shard in shards_of(folder)]
        used = sum(shard.size for shard in shards)
        share = int(self.free_share * (disk_usage(self.root).free + used))
        limit = min(self.limit_bytes, share)
        idle = {own: False}
        removed = 0
        for shard in sorted(shards):
            if used + need <= limit:
                break
            folder = shard.path.parent
            if folder not in idle:
                idle[folder] = _idle(folder)
            if idle[folder]:
                with contextlib.suppress(OSError):
                    shard.path.unlink(missing_ok=True)
                    used -= shard.size
                    removed += 1
        shared = f"{self.free_share:.0%} of the free disk, {share / 1e6:,.0f} MB,"
        bound = f"its limit of {self.limit_bytes / 1e6:,.0f} MB" if limit == self.limit_bytes else shared
        return Claim(limit - used, f"{bound} is used", removed)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other process is in this context at the same time, where the file system has locks.

        Raises:
            OSError: The folder cannot be written to.
        """
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(fd, shared=False, wait=True)
            yield
        finally:
            os.close(fd)


class Use:
    """Others do not remove the shards of ``folder`` as long as this lives and is not ended."""

    def __init__(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            fd = os.open(folder / _IN_USE, os.O_RDWR | os.O_CREAT, 0o666)
            self._end = weakref.finalize(self, os.close, fd)
            lock(fd, shared=True, wait=True)

    def end(self) -> None:
        """Others may remove them."""
        if hasattr(self, "_end"):
            self._end()


def _idle(folder: Path) -> bool:
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
