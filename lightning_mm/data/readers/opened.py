"""A source that was looked at: its files, its shape, and the samples of each of its parts.

Data flow: ``source.open_source`` -> ``OpenSource`` -> ``parts`` -> ``read`` (in workers) -> Sample or Rejection.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError
from lightning_mm.data.readers.fetching import Fetcher
from lightning_mm.data.readers.image_root import ImageRoot
from lightning_mm.data.readers.invalid_row import InvalidRow
from lightning_mm.data.readers.json_rows import Place
from lightning_mm.data.readers.media import MediaReader
from lightning_mm.data.readers.row_files import FilePart, JsonPart, RowFile
from lightning_mm.data.readers.row_reader import RowReader
from lightning_mm.data.readers.source_spec import ReadOptions, Source
from lightning_mm.data.sample import Rejection, Sample

READER_VERSION = 4
"""Raised when the same files give other samples than before."""


@dataclass(frozen=True)
class Part:
    """A piece of a source.

    Args:
        file: Index of its file.
        piece: Which piece of the file.
    """

    file: int
    piece: FilePart

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Part":
        """The part that ``asdict`` made a mapping of."""
        piece = given["piece"]
        if "place" in piece:
            return cls(given["file"], JsonPart(**{**piece, "place": Place(**piece["place"])}))
        return cls(given["file"], FilePart(**piece))


@dataclass
class PartReport:
    """What reading found, besides samples.

    Args:
        ignored: Columns, and keys of messages, that were not read, with the number of rows.
        shapes: Shapes, with the number of rows.
        num_marked: Number of rows that named images without marks.
    """

    ignored: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    num_marked: int = 0

    def add(self, reader: RowReader) -> None:
        """Add what a reader counted."""
        self.ignored.update(reader.ignored)
        self.shapes.update(reader.shapes)
        self.num_marked += reader.num_marked


@dataclass(frozen=True)
class OpenSource:
    """A source that can be read; picklable.

    Args:
        source: What was named.
        options: How it is read.
        row_files: Its files, in order.
        image_root: Folder that picture names are relative to.
        shape: Where its conversations are, in words.
        kinds: Kinds of shape that its first rows have; () for any.
    """

    source: Source
    options: ReadOptions
    row_files: tuple[RowFile, ...]
    image_root: Path
    shape: str = ""
    kinds: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file whose content decides the rows; pictures in folders are not among them."""
        return tuple(dict.fromkeys(path for file in self.row_files for path in file.files))

    def identity(self) -> dict[str, Any]:
        """All that the rows depend on besides the content of the files, as JSON."""
        source = {
            key: value
            for key, value in asdict(self.source).items()
            if key not in ("path", "weight", "repeats", "first", "limit", "sampling")
        }
        options = {key: value for key, value in asdict(self.options).items() if key != "cache"}
        return {
            "reader": READER_VERSION,
            "source": {**source, "columns": dict(source["columns"]), "tags": dict(source["tags"])},
            "options": options,
            "image_root": os.fsencode(self.image_root.resolve()).hex(),  # rows hold absolute paths
            "files": [file.identity() for file in self.row_files],
            "kinds": list(self.kinds),
        }

    def parts(self) -> list[Part]:
        """Pieces of the source, in order; each can be read on its own."""
        return [Part(index, piece) for index, file in enumerate(self.row_files) for piece in file.parts()]

    def reader(self) -> RowReader:
        """Converts the rows of this source."""
        root = ImageRoot(self.image_root, self.options.follow_links, self.options.must_exist)
        fetcher = Fetcher(self.options.cache) if self.options.fetch and self.options.cache is not None else None
        return RowReader(
            self.image_root,
            self.options.answers_required,
            columns=self.source.columns,
            tags=self.source.tags,
            system=self.source.system,
            media=MediaReader(root, fetcher),
            kinds=self.kinds or None,
        )

    def read(self, part: Part, report: PartReport) -> Iterator[Sample | Rejection]:
        """The rows of a part in order, in constant memory.

        Args:
            part: One of ``parts()``.
            report: Takes the counts of the part when it ends.

        Raises:
            UserError: The file cannot be read on.
        """
        reader = self.reader()
        for origin, row in self.row_files[part.file].rows(part.piece):
            try:
                yield replace(reader.sample(row, origin), source=self.source.name)
            except InvalidRow as error:
                yield Rejection(origin, str(error))
        report.add(reader)


def check_any(path: object, samples: bool, rejections: Iterable[Rejection], num_rows: int) -> None:
    """Refuse a source of which no row can be used.

    Raises:
        UserError: There is no sample.
    """
    if samples:
        return
    if not num_rows:
        raise UserError(f"{path} is empty.", "It holds no row.", "Name a file with at least one conversation.")
    rejections = list(rejections)
    first = "\n    ".join(f"{each.origin}: {each.reason}" for each in rejections[:5])
    raise UserError(
        f"None of the {num_rows} rows of {path} can be used.",
        f"The first of them:\n    {first}",
        _fix([each.reason for each in rejections]),
    )


def _fix(reasons: Sequence[str]) -> str:
    if all("is a URL" in reason for reason in reasons):
        fix = _LINKS
    elif all(reason.startswith("missing image") for reason in reasons):
        fix = _IMAGE_ROOT
    elif any(reason.startswith(("no conversation", "not an object")) for reason in reasons):
        fix = _ROWS
    else:
        fix = "Mend the rows as the reasons say"
    return f"{fix}; docs/data-forms.md lists what is read."


_LINKS = "Give --data.fetch true, which downloads the pictures once, or download them and name the files"
_IMAGE_ROOT = "Give --data.image_root, or image_root of the source, the folder that names of pictures are relative to"
_ROWS = (
    'Rows look like {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, '
    '{"from": "gpt", "value": "A cat."}]}; columns of other names are named by the columns of the source'
)
