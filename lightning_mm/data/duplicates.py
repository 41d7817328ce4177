"""Rows that occur twice, in one split or in training and held-out data, found by their content.

Data flow: ``RowTable`` -> ``row_contents`` (in worker processes: digests of text and of the bytes of pictures) ->
``repeated`` within a split, ``Overlap`` between two.

Shapes: N rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import xxhash

from lightning_mm.core.processes import run_in_processes
from lightning_mm.data.image_source import ImageSource
from lightning_mm.data.row_table import RowTable
from lightning_mm.data.sample import Sample

_ROWS_OF_A_JOB = 512
_EXAMPLES = 3
_MOST_BYTES = 64 << 20
"""Bytes of a file that are compared, besides its size."""


@dataclass(frozen=True)
class RowContent:
    """Digests of one row.

    Args:
        row: Of its questions and answers, and of its pictures.
        pictures: Of the bytes of each picture and video.
        origin: ``file:line``.
    """

    row: bytes
    pictures: tuple[bytes, ...]
    origin: str


@dataclass(frozen=True)
class Overlap:
    """What held-out data and training data share.

    Args:
        num_rows: Held-out rows.
        rows: Held-out rows that are training rows too: the same text and pictures.
        pictures: Held-out rows with a picture that a training row has too, with any text.
        examples: Origins of some of ``rows``, each with that of a training row.
    """

    num_rows: int
    rows: int
    pictures: int
    examples: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, held_out: Sequence[RowContent], train: Sequence[RowContent]) -> "Overlap":
        """The overlap of two splits."""
        origins = {each.row: each.origin for each in reversed(train)}
        seen = {picture for each in train for picture in each.pictures}
        same = [(each.origin, origins[each.row]) for each in held_out if each.row in origins]
        pictures = sum(not seen.isdisjoint(each.pictures) for each in held_out)
        return cls(len(held_out), len(same), pictures, tuple(same[:_EXAMPLES]))


def repeated(rows: Sequence[RowContent]) -> int:
    """Number of rows whose content an earlier row has."""
    return len(rows) - len({each.row for each in rows})


def row_contents(samples: RowTable, num_workers: int) -> list[RowContent]:
    """Digests of all rows of a table.

    Args:
        samples: N rows.
        num_workers: Processes that read the pictures; 0 and 1 read in this one.
    """
    digest = lru_cache(maxsize=100_000)(_digest)  # many rows may show one picture

    def read(start: int) -> list[RowContent]:
        return [_content(sample, digest) for sample in samples[start : start + _ROWS_OF_A_JOB]]

    starts = [(start,) for start in range(0, len(samples), _ROWS_OF_A_JOB)]
    parts = run_in_processes(read, starts, num_workers, "comparing rows")
    return [each for part in parts for each in part]


def _content(sample: Sample, digest: Callable[[ImageSource], bytes]) -> RowContent:
    pictures = (*map(digest, sample.images), *map(digest, sample.videos))
    turns = [(turn.role, " ".join(turn.text.split()), turn.reasoning, turn.tool_calls) for turn in sample.turns]
    return RowContent(xxhash.xxh3_128_digest(repr((turns, sample.tools, pictures)).encode()), pictures, sample.origin)


def _digest(image: ImageSource) -> bytes:
    """Digest of a picture; of a long video, its size and first bytes; of a folder of frames, its files."""
    if not isinstance(image, Path):
        return xxhash.xxh3_128_digest(image.read_bytes())
    if image.is_dir():
        return xxhash.xxh3_128_digest(b"".join(_digest(frame) for frame in sorted(image.iterdir()) if frame.is_file()))
    with image.open("rb") as file:
        return xxhash.xxh3_128_digest(file.read(_MOST_BYTES) + str(image.stat().st_size).encode())
