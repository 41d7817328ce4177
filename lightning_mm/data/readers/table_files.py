"""Rows of tables: CSV and TSV, parquet, Arrow and Feather files.

Data flow: path -> ``CsvFile``, ``ParquetFile`` or ``ArrowFile`` -> batches, decoded one after the other -> rows.
Columns that ``datasets`` described in the file's metadata are decoded as it does: a class by its name, JSON as its
value; pictures stay bytes.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_mm.core.errors import UserError
from lightning_mm.data.readers.compression import open_bytes
from lightning_mm.data.readers.invalid_row import InvalidRow
from lightning_mm.data.readers.json_rows import MAX_ROW_CHARACTERS
from lightning_mm.data.readers.row_files import PART_BYTES, FilePart, RowFile

_BATCH_ROWS = 64
_INDEX = "__index_level_"
"""Columns of pandas' index."""


@dataclass(frozen=True)
class CsvFile(RowFile):
    """A CSV or TSV file whose first line names the columns; every cell is text, an empty one is missing.

    Args:
        path: The file.
        name: What it is called in origins.
        delimiter: Between the cells.
    """

    delimiter: str = ","
    format = "CSV"

    def rows(self, part: FilePart) -> Iterator[tuple[str, Any]]:
        with open_bytes(self.path) as content:
            text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
            try:
                yield from self._rows(csv.reader(text, delimiter=self.delimiter, strict=True))
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path} is not UTF-8.", f"{error.reason}.", "Save it as UTF-8.") from error
            finally:
                text.detach()

    def _rows(self, cells: Any) -> Iterator[tuple[str, Any]]:
        line = 1
        try:
            columns = [name.strip() for name in _next(cells) or []]
            self._check(columns)
            line = cells.line_num + 1
            while (row := _next(cells)) is not None:
                if row:
                    yield f"{self.name}:{line}", _csv_row(columns, row)
                line = cells.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{self.path} is not {'TSV' if self.delimiter == chr(9) else 'CSV'}.",
                f"The row that begins at line {line}: {error}.",
                "Mend it: a cell with delimiters, quotes or line breaks is in quotes, and quotes in it are doubled.",
            ) from error

    def _check(self, columns: list[str]) -> None:
        if twice := next((name for name in columns if name and columns.count(name) > 1), None):
            raise UserError(
                f"{self.path} has two columns {twice!r}.", "Its first line names the columns.", "Rename one of them."
            )


def _next(cells: Any) -> list[str] | None:
    """The next row; pictures in base64 are longer than the limit that the module begins with."""
    limit = csv.field_size_limit(MAX_ROW_CHARACTERS)
    try:
        return next(cells, None)
    finally:
        csv.field_size_limit(limit)


def _csv_row(columns: list[str], cells: list[str]) -> Any:
    if len(cells) != len(columns):
        return InvalidRow(f"wrong number of cells: {len(cells)}, the file has {len(columns)} columns")
    return {name: cell or None for name, cell in zip(columns, cells, strict=True) if name}


@dataclass(frozen=True)
class ParquetFile(RowFile):
    """A parquet file; a part is some of its row groups."""

    format = "parquet"

    def parts(self) -> list[FilePart]:
        with _named_errors(self.path, "parquet"), self.path.open("rb") as raw, pq.ParquetFile(raw) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        return _grouped([(group.num_rows, group.total_byte_size) for group in groups])

    def rows(self, part: FilePart) -> Iterator[tuple[str, Any]]:
        with _named_errors(self.path, "parquet"), self.path.open("rb") as raw, pq.ParquetFile(raw) as file:
            stop = file.metadata.num_row_groups if part.stop is None else part.stop
            groups = list(range(part.start, stop))
            batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups) if groups else iter(())
            _check_names(file.schema_arrow, self.path)
            yield from _table_rows(batches, file.schema_arrow, self.name, part.first)


@dataclass(frozen=True)
class ArrowFile(RowFile):
    """A file in Arrow's format for files (Feather) or for streams, as ``Dataset.save_to_disk`` writes it."""

    format = "Arrow"

    def parts(self) -> list[FilePart]:
        with _named_errors(self.path, "Arrow"), self.path.open("rb") as content:
            if _is_stream(self.path):
                sizes = [(batch.num_rows, batch.nbytes) for batch in pa.ipc.open_stream(content)]
            else:
                reader = pa.ipc.open_file(content)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
                sizes = [(batch.num_rows, batch.nbytes) for batch in batches]
        return _grouped(sizes)

    def rows(self, part: FilePart) -> Iterator[tuple[str, Any]]:
        with _named_errors(self.path, "Arrow"), self.path.open("rb") as content:
            batches, schema = _batches(content, _is_stream(self.path), part)
            small = (batch.slice(at, _BATCH_ROWS) for batch in batches for at in range(0, batch.num_rows, _BATCH_ROWS))
            _check_names(schema, self.path)
            yield from _table_rows(small, schema, self.name, part.first)


def _batches(content: IO[bytes], is_stream: bool, part: FilePart) -> tuple[Iterator[pa.RecordBatch], pa.Schema]:
    if is_stream:
        stream = pa.ipc.open_stream(content)
        return (
            batch
            for index, batch in enumerate(stream)
            if part.start <= index and (part.stop is None or index < part.stop)
        ), stream.schema
    file = pa.ipc.open_file(content)
    stop = file.num_record_batches if part.stop is None else part.stop
    return (file.get_batch(index) for index in range(part.start, stop)), file.schema


def _is_stream(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6) != b"ARROW1"


class _named_errors:  # noqa: N801 - used as a function
    """Raises what Arrow raises about a damaged file as a ``UserError``."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (pa.ArrowException, OSError)) and not isinstance(error, InvalidRow):
            raise UserError(
                f"{self._path} cannot be read.",
                f"It is {self._kind} by its first bytes, and its content is cut off or damaged: {str(error)[:300]}",
                "Copy or download it again.",
            ) from error


def _grouped(sizes: list[tuple[int, int]]) -> list[FilePart]:
    """Parts of about ``PART_BYTES`` from pieces of these numbers of rows and bytes."""
    made: list[FilePart] = []
    start = rows = size = first = 0
    for index, (num_rows, num_bytes) in enumerate(sizes):
        rows, size = rows + num_rows, size + num_bytes
        if size >= PART_BYTES:
            made.append(FilePart(start, index + 1, first))
            start, first, size = index + 1, rows, 0
    if start < len(sizes):
        made.append(FilePart(start, len(sizes), first))
    return made


def _table_rows(batches: Any, schema: pa.Schema, name: str, first: int) -> Iterator[tuple[str, Any]]:
    decoders = _decoders(schema)
    number = first
    for batch in batches:
        columns = {
            key: _values(batch.column(key), f"{name}: {key!r}") for key in schema.names if not key.startswith(_INDEX)
        }
        for index in range(batch.num_rows):
            cells = {key: values[index] for key, values in columns.items()}
            for key, decode in decoders.items():
                if cells[key] is not None:
                    cells[key] = decode(cells[key])
            yield f"{name}:{number}", cells
            number += 1


def _values(column: pa.Array, name: str) -> list[Any]:
    """The cells of a column; where Python has no such date, the number that is stored."""
    try:
        return cast(list[Any], column.to_pylist())
    except (ValueError, OverflowError, LookupError) as error:  # years after 9999, time zones that are not known
        if pa.types.is_temporal(column.type):
            return cast(list[Any], pc.cast(column, pa.int64()).to_pylist())
        raise UserError(f"{name} cannot be read.", f"{error}.", "Leave the column out.") from error


def _check_names(schema: pa.Schema, path: Path) -> None:
    if twice := next((each for each in schema.names if schema.names.count(each) > 1), None):
        raise UserError(f"{path} has two columns {twice!r}.", "A row has one of each.", "Rename one of them.")


def _decoders(schema: pa.Schema) -> dict[str, Callable[[Any], Any]]:
    """Column -> what makes a value of what is stored, for columns that ``datasets`` described as more than they are."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets  # it takes a second, and few files need it

    try:
        features = datasets.Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError, AttributeError):  # written by another version of datasets
        return {}
    made = {name: _decoder(feature) for name, feature in features.items() if name in schema.names}
    return {name: decode for name, decode in made.items() if decode is not None}


def _decoder(feature: Any) -> Callable[[Any], Any] | None:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return lambda value: feature.int2str(value) if isinstance(value, int) and value >= 0 else None
    if isinstance(feature, getattr(datasets, "Json", ())):  # newer than the oldest that is allowed
        return lambda value: json.loads(value) if isinstance(value, (str, bytes)) else value
    inner = getattr(feature, "feature", None)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        decode = _decoder(inner)
        return None if decode is None else lambda value: [None if each is None else decode(each) for each in value]
    if isinstance(feature, dict):
        decoders = {key: each for key, value in feature.items() if (each := _decoder(value)) is not None}
        if decoders:
            return lambda value: {
                key: decoders[key](each) if key in decoders and each is not None else each
                for key, each in value.items()
            }
    return None
