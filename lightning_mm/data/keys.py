"""What a row is known by wherever something is kept of it: what is said, and the bytes of its pictures.

Data flow: Sample -> ``RowKeys`` -> SHA-256 in hexadecimal.
"""

import hashlib
import json
from pathlib import Path

from lightning_mm.data.sample import Sample


class RowKeys:
    """Names rows; a picture file is read once as long as its size and time of change stay."""

    def __init__(self) -> None:
        self._digests: dict[tuple[Path, int, int], str] = {}

    def __call__(self, sample: Sample) -> str:
        """SHA-256 over what is said and over the bytes of the pictures."""
        told = [[turn.role, turn.text] for turn in sample.turns]
        pictures = [self._digest(path) for path in sample.images]
        return hashlib.sha256(json.dumps([told, pictures]).encode()).hexdigest()

    def _digest(self, path: Path) -> str:
        try:
            stat = path.stat()
            place = (path, stat.st_size, stat.st_mtime_ns)
            if place not in self._digests:
                self._digests[place] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            return f"unreadable {path}"  # the collator says so
        return self._digests[place]
