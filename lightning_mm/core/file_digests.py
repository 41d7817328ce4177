"""Digests of files by content, remembered while a file does not change.

Data flow: path -> its state -> the digest that is known for it, or its bytes -> XXH3 -> digest.
"""

import json
import os
import time
from pathlib import Path

import xxhash

from lightning_mm.core.io import write_atomically

_SETTLED = 2.0
"""Seconds after which another change gives a file another time, also where a file system keeps whole seconds."""
_BLOCK = 1 << 20


class FileDigests:
    """Digests of files by content; a file is read again only if its size, time or inode changes.

    Args:
        file: Where digests are kept.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._changed = file, False
        try:
            self._known: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def __call__(self, file: Path) -> str:
        """Digest of the file's content."""
        state = file.stat()
        key = f"{os.fsencode(file).hex()} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
        if key in self._known:
            return self._known[key]
        digest = xxhash.xxh3_128()
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        if time.time() - state.st_mtime > _SETTLED:
            self._known[key], self._changed = digest.hexdigest(), True
        return digest.hexdigest()

    def save(self) -> None:
        """Keep what was computed."""
        if self._changed:
            write_atomically(self._file, json.dumps(self._known))
