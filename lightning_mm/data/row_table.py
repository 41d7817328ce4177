"""Rows of stored tables as a sequence of Samples: what loaders index, in constant memory.

Data flow: ``StoredTable`` and the rows in use of it -> ``RowTable`` -> ``Sample``, made when it is asked for.

Shapes: N rows in use of all tables together.
"""

import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from lightning_mm.data.image_source import ImageSource, StoredImage, open_arrow
from lightning_mm.data.picture_check import checked_part, is_checked
from lightning_mm.data.sample import Sample, Turn

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class TablePart:
    """One file of a table.

    Args:
        file: Arrow file.
        source: Name of the source that it belongs to.
        num_rows: Rows in it.
        digest: Of the content of its rows.
    """

    file: Path
    source: str
    num_rows: int
    digest: str


class RowTable(Sequence[Sample]):
    """Samples of one or several sources, in their order.

    Args:
        parts: Files with the rows.
        rows: (N,) rows in use, counted over all parts; None: all of them.
    """

    def __init__(self, parts: Sequence[TablePart], rows: Indices | None = None) -> None:
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(part.num_rows for part in parts)]).tolist()
        self.rows = np.arange(self._starts[-1], dtype=np.int64) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "RowTable": ...
    def __getitem__(self, index: int | slice) -> "Sample | RowTable":
        if isinstance(index, slice):
            return RowTable(self.parts, self.rows[index])
        row = int(self.rows[index])
        number = bisect_right(self._starts, row) - 1
        return _sample(self.parts[number], row - self._starts[number])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowTable) and self.parts == other.parts and np.array_equal(self.rows, other.rows)

    __hash__ = None  # type: ignore[assignment]

    @property
    def fingerprint(self) -> int:
        """Digest of the content and order of all rows in use, wherever their files are."""
        digest = xxhash.xxh3_64(self.rows.tobytes())
        for part in self.parts:
            digest.update(part.digest.encode())
        return digest.intdigest() >> 1  # fits a signed integer

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in their order."""
        return tuple(dict.fromkeys(part.source for part in self.parts))

    def source_of_rows(self) -> NDArray[np.int64]:
        """(N,) index into ``sources`` of each row in use."""
        names = {name: number for number, name in enumerate(self.sources)}
        of_part = np.array([names[part.source] for part in self.parts], dtype=np.int64)
        return of_part[np.searchsorted(self._starts, self.rows, side="right") - 1]

    def rows_by_part(self) -> Iterator[tuple[TablePart, Indices]]:
        """Each part with those of its rows that are in use, ascending, each once."""
        rows = np.unique(self.rows)
        bounds = np.searchsorted(rows, self._starts)
        for start, part, first, last in zip(self._starts, self.parts, bounds, bounds[1:], strict=False):
            yield part, rows[first:last] - start

    def num_images(self) -> NDArray[np.int64]:
        """(N,) number of images and videos of each row in use."""
        counts = [
            pc.add(pc.list_value_length(table["images"]), pc.list_value_length(table["videos"])).to_numpy()
            for table in map(_light, (part.file for part in self.parts))
        ]
        return np.concatenate([np.zeros(0, np.int64), *counts])[self.rows]

    def image_keys(self) -> Indices:
        """(N,) equal for rows with the same pictures (paths of files, or contents); 0 for rows without, or with videos.

        A file and a copy of it have different keys.
        """
        keys = np.zeros(self._starts[-1], dtype=np.int64)
        for start, (part, rows) in zip(self._starts, self.rows_by_part(), strict=False):
            cells = _light(part.file).select(["images", "videos"]).take(pa.array(rows)).to_pylist()
            keys[start + rows] = [_image_key(part.file, *cell) for cell in zip(rows.tolist(), cells, strict=True)]
        return keys[self.rows]

    @property
    def all_videos_checked(self) -> bool:
        """Whether each video was looked at, which some need a package for."""
        return all(checked_part(part.file, "videos").all_decoded for part in self.parts if is_checked(part.file))

    def answer_counts(self) -> Counter[tuple[str, str]]:
        """(question type, answer) -> number of turns that give it and are learned, over the rows in use."""
        total: Counter[tuple[str, str]] = Counter()
        for part, rows in self.rows_by_part():
            turns = pc.list_flatten(_light(part.file)["turns"].take(pa.array(rows)))
            table = pa.table({name: pc.struct_field(turns, name) for name in ("role", "type", "text", "train")})
            answers = table.filter((pc.field("role") == "assistant") & pc.field("train"))
            counted = answers.group_by(["type", "text"]).aggregate([([], "count_all")])
            for kind, text, count in zip(*(column.to_pylist() for column in counted.columns), strict=True):
                total[kind, text] += count
        return total


@lru_cache(maxsize=4096)
def _light(file: Path) -> pa.Table:
    """The table without the contents of images, which a row need not copy."""
    return open_arrow(file).drop_columns(["images_bytes", "videos_bytes"])


def _sample(part: TablePart, row: int) -> Sample:
    cells = _light(part.file).slice(row, 1).to_pylist()[0]
    turns = tuple(
        Turn(turn["role"], turn["text"], turn["type"], turn["train"], turn["reasoning"], turn["tool_calls"])
        for turn in cells["turns"]
    )
    return Sample(
        id=cells["id"],
        turns=turns,
        images=_images(part.file, row, cells["images"], "images"),
        origin=cells["origin"],
        extra=json.loads(cells["extra"]) if cells["extra"] else {},
        videos=_images(part.file, row, cells["videos"], "videos"),
        tools=cells["tools"],
        source=part.source,
        sizes=checked_part(part.file).sizes_of(row) if cells["images"] else (),
    )


def _image_key(file: Path, row: int, cells: dict[str, list[dict[str, bytes]]]) -> int:
    """Digest of the pictures of a row; 0 where it has none, or videos."""
    if cells["videos"] or not cells["images"]:
        return 0
    digest = xxhash.xxh3_64()
    for image in _images(file, row, cells["images"], "images"):
        digest.update(b"/" + (os.fsencode(image) if isinstance(image, Path) else image.read_bytes()))
    return (digest.intdigest() >> 1) or 1


def _images(file: Path, row: int, cells: list[dict[str, bytes]], column: str) -> tuple[ImageSource, ...]:
    return tuple(
        StoredImage(file, row, number, os.fsdecode(cell["path"]), column)  # type: ignore[arg-type]
        if cell["stored"]
        else Path(os.fsdecode(cell["path"]))
        for number, cell in enumerate(cells)
    )
