"""The data that a user names, opened: files found, format and shape recognized and said.

Data flow: ``data.train`` -> ``parse_sources`` -> ``Source`` -> ``open_source`` (``locate`` finds the files, ``formats``
their readers, the first rows their shape) -> ``OpenSource``.
"""

import difflib
import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lightning_mm.core.choices import refuse_unknown
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.readers.formats import open_row_file
from lightning_mm.data.readers.imagefolder import ImageFolder
from lightning_mm.data.readers.invalid_row import InvalidRow
from lightning_mm.data.readers.locate import Located, locate
from lightning_mm.data.readers.opened import OpenSource, Part, PartReport, check_any
from lightning_mm.data.readers.recipes import sources_of_file
from lightning_mm.data.readers.row_files import FilePart, RowFile
from lightning_mm.data.readers.source_spec import COLUMNS, TAGS, ReadOptions, Source
from lightning_mm.data.sample import Rejection

__all__ = ["OpenSource", "Part", "PartReport", "ReadOptions", "Source", "open_source", "parse_sources"]
_NUM_LOOKED_AT = 100
_OF_THE_SHAPE = ("no conversation", "two ", "preference row", "audio")


def parse_sources(
    given: str | Path | Mapping[str, Any] | Sequence[Any], image_root: str | Path | None = None
) -> tuple[Source, ...]:
    """The sources of an option.

    Args:
        given: A path, a mapping with the fields of ``Source``, or a list of these. A file that lists sources
            (``recipes``) stands for them.
        image_root: Image root of sources that have none of their own.

    Raises:
        UserError: It is none of these, or names no data.
    """
    entries = given if isinstance(given, (list, tuple)) else [given]
    root = None if image_root is None else str(image_root)
    sources = [source for entry in entries for source in _sources_of(entry)]
    if not sources:
        raise UserError("No data is named.", "The list of sources is empty.", "Name a file: --data.train FILE.")
    sources = [replace(each, image_root=root) if each.image_root is None else each for each in sources]
    return tuple(_uniquely_named(sources))


def _local(path: Any) -> str:
    """A path with ~ and file:// resolved, which no shell does behind an equals sign."""
    path = str(path)
    if path.startswith("file://"):
        return unquote(urlsplit(path).path)
    return os.path.expanduser(path) if path.startswith("~/") else path


def _sources_of(entry: Any) -> list[Source]:
    """The sources of one entry."""
    if isinstance(entry, Source):
        return [entry]
    if isinstance(entry, (str, Path)):
        entry = {"path": str(entry)}
    if isinstance(entry, Mapping):
        if not isinstance(entry.get("path"), (str, Path)):
            raise UserError(f"A source has no path: {dict(entry)!r:.200}.", "path names its data.", "Give it a path.")
        path = _local(entry["path"])
        listed = sources_of_file(path)
        if listed is None:
            return [_source({**entry, "path": path})]
        own = {key: value for key, value in entry.items() if key not in ("path", "name")}
        return [_source({**each, **own}) for each in listed]
    raise UserError(
        f"A source is {type(entry).__name__}: {entry!r:.100}.", "It is a path, or an object with one.", "Give a path."
    )


def _source(entry: Mapping[str, Any]) -> Source:
    known = {each.name for each in fields(Source)}
    refuse_unknown(Source, {str(key): None for key in entry if key not in known}, {})
    return Source(**{**entry, "columns": dict(entry.get("columns") or {}), "tags": dict(entry.get("tags") or {})})


def _uniquely_named(sources: list[Source]) -> list[Source]:
    """The sources with names: given, or the stem of the path, with a number where one is taken."""
    made: list[Source] = []
    taken: set[str] = set()
    for source in sources:
        stem = (
            source.name or Path(source.path.rstrip("/").partition("*")[0].rstrip("/")).name.partition(".")[0] or "data"
        )
        numbered = (stem if not number else f"{stem}-{number + 1}" for number in itertools.count())
        name = next(name for name in numbered if name not in taken)
        taken.add(name)
        made.append(replace(source, name=name))
    return made


def open_source(source: Source, options: ReadOptions) -> OpenSource:
    """Look at the first rows of a source, find its files, format and shape, and say what was found.

    Args:
        source: What was named.
        options: How it is read.

    Raises:
        UserError: There is no such data, it is of a kind that is not read, or its rows have no known shape.
    """
    _check_names(source)
    located = locate(source, options.split)
    root = Path(source.image_root) if source.image_root is not None else located.root
    if located.follow_links and source.image_root is None:
        options = replace(options, follow_links=True)
    opened = OpenSource(source, options, tuple(_row_files(source, located, options)), root)
    return _with_shape(opened)


def _check_names(source: Source) -> None:
    for what, given, known in (("columns", source.columns, COLUMNS), ("tags", source.tags, TAGS)):
        if wrong := [name for name in given if name not in known]:
            near = difflib.get_close_matches(wrong[0], known, n=1)
            theirs = "COLUMN" if what == "columns" else "NAME"
            raise UserError(
                f"{what} of {source.path} name {wrong[0]!r}.",
                f"Our names, which come first, are {', '.join(known)}.",
                f"Did you mean {near[0]}?"
                if near
                else f"Write {what}: {{{known[0]}: {theirs}}}, {theirs} as in the file.",
            )


def _row_files(source: Source, located: Located, options: ReadOptions) -> list[RowFile]:
    """Readers of the files, called by as much of their path as tells them apart."""
    made: list[RowFile] = []
    for file, name in zip(located.files, _short_names(located.files), strict=True):
        reader = open_row_file(file, name, source, options)
        if located.is_imagefolder:
            folder = os.path.relpath(file.parent, located.root)
            reader = ImageFolder(file, name, reader, folder, located.pictures)
        made.append(reader)
    return made


def _short_names(files: Sequence[Path]) -> list[str]:
    """The shortest ends of these paths that differ."""
    for depth in itertools.count(1):
        names = ["/".join(file.parts[-depth:]) for file in files]
        names = [name.encode("utf-8", "backslashreplace").decode() for name in names]  # a name need not be UTF-8
        if len(set(names)) == len(names) or depth > max(len(file.parts) for file in files):
            return names
    raise AssertionError


def _with_shape(opened: OpenSource) -> OpenSource:
    """The source with the shape of its first rows, which is logged with the columns that are read, and those not."""
    reader = opened.reader()
    kinds: Counter[str] = Counter()
    rejections: list[Rejection] = []
    columns: dict[str, None] = {}
    rows = (row for file in opened.row_files for row in file.rows(FilePart()))
    number = 0
    for origin, row in itertools.islice(rows, _NUM_LOOKED_AT):
        number += 1
        columns.update(dict.fromkeys(row if isinstance(row, dict) else ()))
        try:
            reader.sample(row, origin)
        except InvalidRow as error:
            rejections.append(Rejection(origin, str(error)))
        kinds.update([reader.last_kind] if reader.last_kind else [])
    _check_columns(opened.source, columns)
    if number == 0 or all(each.reason.startswith(_OF_THE_SHAPE) for each in rejections):
        check_any(opened.source.path, len(rejections) < number, rejections, number)
    shape = ", ".join(name for name, _ in reader.shapes.most_common()) or "unknown"
    if reader.shapes:
        _log(opened, shape, number, reader.columns_read, reader.ignored)
    return replace(opened, shape=shape, kinds=tuple(sorted(kinds)))


def _check_columns(source: Source, columns: Mapping[str, None]) -> None:
    missing = [theirs for theirs in source.columns.values() if columns and theirs not in columns]
    if missing:
        raise UserError(
            f"{source.path} has no column {missing[0]!r}.",
            f"Its columns are {', '.join(map(repr, columns))}.",
            "Name one of these in the columns of the source.",
        )


def _log(opened: OpenSource, shape: str, number: int, read: Counter[str], ignored: Counter[str]) -> None:
    formats = Counter(file.format for file in opened.row_files)
    found = ", ".join(f"{count} files of {name}" if count > 1 else name for name, count in formats.items())
    not_read = f"; not read: {', '.join(sorted(ignored))}" if ignored else ""
    log_decision(
        f"data.source.{opened.source.name or opened.row_files[0].name}",
        f"{found}, {shape}",
        f"by the first {number} rows; read: {', '.join(sorted(read)) or 'nothing'}{not_read}",
    )
