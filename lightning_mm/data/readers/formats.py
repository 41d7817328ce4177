"""What kind of file a file is, by its first bytes, and who reads it.

Data flow: path -> ``open_row_file`` -> ``RowFile``; ``UserError`` with what the file really is where it is not read.
"""

import itertools
import re
from pathlib import Path

from lightning_mm.core.errors import UserError
from lightning_mm.data.readers.compression import SUFFIXES, compression_of, open_bytes
from lightning_mm.data.readers.json_rows import stream_rows
from lightning_mm.data.readers.object_rows import JsonObject
from lightning_mm.data.readers.question_files import files_of
from lightning_mm.data.readers.row_files import JsonLines, JsonList, JsonStream, RowFile
from lightning_mm.data.readers.source_spec import ReadOptions, Source
from lightning_mm.data.readers.table_files import ArrowFile, CsvFile, ParquetFile
from lightning_mm.data.readers.tar_files import TarFile

_LISTED = "Give JSON, JSONL, CSV, parquet, Arrow or a WebDataset tar"
_REFUSED: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com", "a Git LFS pointer, not the file itself", "Run git lfs pull in its clone"),
    (b"PK\x03\x04", "a zip archive", "Unzip it, and name the file in it"),
    (b"PK\x05\x06", "an empty zip archive", "Name the file that was meant"),
    (b"Rar!", "a rar archive", "Unpack it, and name the file in it"),
    (b"7z\xbc\xaf", "a 7z archive", "Unpack it, and name the file in it"),
    (b"\x89HDF\r\n", "an HDF5 file", _LISTED),
    (b"\x93NUMPY", "a NumPy array", _LISTED),
    (b"SQLite format 3", "an SQLite database", _LISTED),
    (b"%PDF", "a PDF", _LISTED),
    (b"\xff\xd8\xff", "a JPEG picture", "Name the file with the rows about it"),
    (b"\x89PNG", "a PNG picture", "Name the file with the rows about it"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file", "Save it as CSV"),
    (b"PARE", "a parquet file whose footer is encrypted", "Decrypt it first"),
    (b"FEA1", "a Feather file of version 1", "Write it with version 2"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "Decompress it first"),
    (b"ORC", "an ORC file", _LISTED),
    (b"Obj\x01", "an Avro file", _LISTED),
    (b"\xff\xfe", "text in UTF-16", "Save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "Save it as UTF-8"),
)  # fmt: skip
_JSON = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\[\s*)?[\[{]\s*["\]}]')
"""How rows in JSON begin, which no line with the names of columns does."""
_MARKUP = ((b"<!doctype html", "an HTML page"), (b"<html", "an HTML page"), (b"<?xml", "an XML file"))


def open_row_file(path: Path, name: str, source: Source, options: ReadOptions) -> RowFile:
    """The reader of a file.

    Args:
        path: The file.
        name: What it is called in origins.
        source: What the user named, with its options.
        options: How it is read.

    Raises:
        UserError: It is of a kind that is not read, or empty.
    """
    if not path.is_file():  # a pipe would be waited for, and can be read only once
        raise UserError(f"{path} is not read.", "It is a pipe or a device, not a file.", "Save its content to a file.")
    try:
        with open_bytes(path) as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise UserError(f"{path} cannot be read.", f"{error}.", "Check its permissions.") from error
    _refuse_other_kinds(path, head)
    packed = compression_of(path)
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")) and packed is not None:
        kind = "a parquet" if head.startswith(b"PAR1") else "an Arrow"
        raise UserError(f"{path} is not read.", f"It is {kind} file within {packed}.", "Decompress it first.")
    if head.startswith(b"PAR1"):
        return ParquetFile(path, name)
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return ArrowFile(path, name)
    if head[257:262] == b"ustar":
        return TarFile(path, name)
    if suffix_of(path) in (".csv", ".tsv", ".txt") and not _JSON.match(head):
        tabs = suffix_of(path) == ".tsv" and b"\t" in head.partition(b"\n")[0]
        return CsvFile(path, name, "\t" if tabs else _delimiter(head))
    if b"\0" in head[:512]:
        raise UserError(f"{path} is not read.", "It is a binary file of an unknown kind.", f"{_LISTED}.")
    return _json_file(path, name, head, source, options)


def _delimiter(head: bytes) -> str:
    """What is between the cells of a table: the most frequent of four characters in its first line."""
    first = head.partition(b"\n")[0].decode("utf-8", "replace")
    return max(",\t;|", key=first.count)


def suffix_of(path: Path) -> str:
    """The suffix of a file in lower case, before that of its compression."""
    suffixes = [each.lower() for each in path.suffixes]
    while suffixes and suffixes[-1] in SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    kind, fix = next(((kind, fix) for magic, kind, fix in _REFUSED if head.startswith(magic)), ("", ""))
    lower = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:200].lower()
    if markup := next((kind for start, kind in _MARKUP if lower.startswith(start)), ""):
        page = "Download the file itself: a page about it was saved, or it needs a log-in"
        kind, fix = markup, _LISTED if markup == "an XML file" else page
    if head[:4:2] in (b"[{", b'{"', b"[\n", b"{\n") and head[1:4:2] == b"\0\0":
        kind, fix = "text in UTF-16", "Save it as UTF-8"
    if len(head) > 2 and head[0] == 0x80 and head[1] in range(2, 6):
        kind, fix = "a pickle, which is not read because it can run code", _LISTED
    if head.startswith(b"PK\x03\x04") and path.suffix.lower() in (".xlsx", ".xls"):
        kind, fix = "an Excel workbook", "Save it as CSV"
    if head.startswith(b"PK\x03\x04") and path.suffix.lower() in (".pt", ".pth", ".bin"):
        kind, fix = "a file of torch.save, which is not read because it can run code", _LISTED
    if kind:
        packed = compression_of(path)
        raise UserError(f"{path} is not read.", f"It is {kind}{f', within {packed}' if packed else ''}.", f"{fix}.")


def _json_file(path: Path, name: str, head: bytes, source: Source, options: ReadOptions) -> RowFile:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[":
        return JsonList(path, name)
    if start == b"{":
        try:
            first_two = list(itertools.islice(stream_rows(path, name), 2))
        except UserError:
            lines = head.strip().splitlines()
            if len(lines) > 1 and not lines[0].rstrip().endswith(b"}"):  # one object over many lines, and broken
                raise
            return JsonLines(path, name)
        is_lines = suffix_of(path) in (".jsonl", ".ndjson")
        if len(first_two) == 1 and isinstance(first_two[0][1], dict) and not is_lines:
            others = files_of(path, first_two[0][1])[1:]
            return JsonObject(path, name, options.split, source.split, source.columns, options.answers_required, others)
        if b"\n" in head.strip() and head.strip().splitlines()[0].rstrip() in (b"{", b'{"'):
            return JsonStream(path, name)
    return JsonLines(path, name)
