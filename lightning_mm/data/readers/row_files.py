"""Files of rows: what every format provides, and JSON's formats.

Data flow: path -> ``formats.open_row_file`` -> ``RowFile`` -> ``parts`` -> ``rows`` of each part -> ``row_reader``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lightning_mm.data.readers import json_rows
from lightning_mm.data.readers.compression import compression_of
from lightning_mm.data.readers.json_rows import Place

PART_BYTES = 8_000_000
"""About as much of a file is one part."""


@dataclass(frozen=True)
class FilePart:
    """A piece of a file.

    Args:
        start: Where it begins, in the file's own unit: a byte, a row group, a record batch.
        stop: Where it ends; None for the end of the file.
        first: Line or row number that ``start`` has.
    """

    start: int = 0
    stop: int | None = None
    first: int = 1


@dataclass(frozen=True)
class JsonPart(FilePart):
    """A piece of JSON text; ``start`` and ``stop`` count its elements.

    Args:
        place: Where it begins.
    """

    place: Place = field(default_factory=Place)


@dataclass(frozen=True)
class RowFile(ABC):
    """A file of rows; picklable.

    Args:
        path: The file.
        name: What it is called in origins.
    """

    path: Path
    name: str
    format: ClassVar[str]

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file whose content decides the rows."""
        return (self.path,)

    def identity(self) -> list[str]:
        """All that its rows depend on besides the content of ``files``."""
        return [self.name, self.format]

    def parts(self) -> list[FilePart]:
        """Pieces that can be read on their own, in order."""
        return [FilePart()]

    @abstractmethod
    def rows(self, part: FilePart) -> Iterator[tuple[str, Any]]:
        """Origin and content of each row of a part; ``InvalidRow`` in place of one that cannot be read."""


@dataclass(frozen=True)
class JsonList(RowFile):
    """A JSON list of rows."""

    format = "JSON list"

    def parts(self) -> list[FilePart]:
        """Pieces of whole elements, found in one pass over the text; one where the file is compressed."""
        return _json_parts(self.path, json_rows.list_places)

    def rows(self, part: FilePart) -> Iterator[tuple[str, Any]]:
        return json_rows.list_rows(self.path, self.name, _place(part), part.stop)


@dataclass(frozen=True)
class JsonLines(RowFile):
    """One row per line."""

    format = "JSONL"

    def parts(self) -> list[FilePart]:
        """Pieces of whole lines; one where the file is compressed, whose middle cannot be read alone."""
        if compression_of(self.path) is not None:
            return [FilePart()]
        made: list[FilePart] = []
        start, first, at, line = 0, 1, 0, 1
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                end = block.rfind(b"\n") + 1
                if end and at + end - start >= PART_BYTES:
                    made.append(FilePart(start, at + end, first))
                    start, first = at + end, line + block.count(b"\n")
                at, line = at + len(block), line + block.count(b"\n")
        return [*made, FilePart(start, None, first)]

    def rows(self, part: FilePart) -> Iterator[tuple[str, Any]]:
        return json_rows.line_rows(self.path, self.name, part.start, part.stop, part.first)


@dataclass(frozen=True)
class JsonStream(RowFile):
    """JSON objects that follow one another, each over several lines."""

    format = "JSON objects of several lines"

    def parts(self) -> list[FilePart]:
        """Pieces of whole objects, found in one pass over the text; one where the file is compressed."""
        return _json_parts(self.path, json_rows.stream_places)

    def rows(self, part: FilePart) -> Iterator[tuple[str, Any]]:
        return json_rows.stream_rows(self.path, self.name, _place(part), part.stop)


def _json_parts(path: Path, places_of: Callable[[Path, int], list[Place]]) -> list[FilePart]:
    if compression_of(path) is not None or path.stat().st_size <= PART_BYTES:
        return [FilePart()]
    places = places_of(path, PART_BYTES)
    stops = [*(place.index for place in places[1:]), None]
    return [JsonPart(place.index, stop, place.line, place) for place, stop in zip(places, stops, strict=True)]


def _place(part: FilePart) -> Place:
    return part.place if isinstance(part, JsonPart) else Place()
