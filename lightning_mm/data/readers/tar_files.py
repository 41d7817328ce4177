"""Rows of WebDataset tars: the members with one key are a row.

Data flow: tar -> members in order, read as a stream and never extracted -> groups of one key (the name up to the first
dot behind the folder) -> rows: pictures and videos as bytes under their suffix, ``json`` opened, other text as text.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from lightning_mm.core.errors import UserError
from lightning_mm.data.readers.compression import open_bytes
from lightning_mm.data.readers.invalid_row import InvalidRow
from lightning_mm.data.readers.media import ENDINGS, VIDEO_ENDINGS
from lightning_mm.data.readers.row_files import FilePart, RowFile

MAX_MEMBER_BYTES = 2_000_000_000
_NO_END = "it stops without the mark of its end"
_TEXT = frozenset({"txt", "text", "caption", "transcript", "cls", "question", "answer", "prompt", "response"})


@dataclass(frozen=True)
class TarFile(RowFile):
    """A tar of WebDataset."""

    format = "WebDataset tar"

    def rows(self, part: FilePart) -> Iterator[tuple[str, Any]]:
        try:
            with open_bytes(self.path) as content, tarfile.open(fileobj=content, mode="r|", tarinfo=_Member) as tar:
                yield from self._groups(tar)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(
                f"{self.path} cannot be read.", f"The tar is cut off or damaged: {error}.", "Copy it again."
            ) from error

    def _groups(self, tar: tarfile.TarFile) -> Iterator[tuple[str, Any]]:
        key, group = "", dict[str, Any]()
        earlier: set[str] = set()
        for member in tar:
            path = PurePosixPath(member.name)
            stem, _, field = path.name.partition(".")
            if not member.isfile() or not stem or not field or "__MACOSX" in path.parts:
                continue  # folders, links, hidden files
            name = str(path.parent / stem)
            if name != key and group:
                yield f"{self.name}:{key}", _row(key, group)
                group = {}
                earlier.add(key)
            key = name
            if key in earlier:
                group[""] = InvalidRow(
                    f"members apart: those of {key!r} do not follow one another; sort the tar by name"
                )
                continue
            if field.lower() in group:
                group[""] = InvalidRow(f"two members of one name: {member.name!r} comes twice")
            elif member.size > MAX_MEMBER_BYTES:
                group[""] = InvalidRow(f"row too large: {member.name!r} has {member.size} bytes")
            else:
                file = tar.extractfile(member)
                group[field.lower()] = b"" if file is None else file.read()
        if group:
            yield f"{self.name}:{key}", _row(key, group)


class _Member(tarfile.TarInfo):
    """A member whose header is whole: ``tarfile`` takes a damaged one, and a missing end, for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the mark of the end
        except tarfile.HeaderError as error:
            no_end = isinstance(error, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]
            raise tarfile.ReadError(_NO_END if no_end else str(error)) from error


def _row(key: str, group: dict[str, Any]) -> Any:
    """The row of the members of one key; ``InvalidRow`` if one of them cannot be read."""
    if "" in group:
        return group[""]
    row: dict[str, Any] = {"__key__": key}
    media: dict[str, list[Any]] = {"images": [], "videos": []}
    for field, content in group.items():
        ending = field.rpartition(".")[2]
        kind = "images" if f".{ending}" in ENDINGS else "videos" if f".{ending}" in VIDEO_ENDINGS else ""
        if kind:
            media[kind].append({"bytes": content, "path": f"{PurePosixPath(key).name}.{field}"})
            continue
        try:
            value = _opened(ending, content)
        except ValueError as error:
            return InvalidRow(f"not {'JSON' if ending == 'json' else 'UTF-8'}: {field!r} of {key!r}, {error}")
        row.update(_of_json(value, field, row, media) if ending == "json" else {field: value})
    for kind in ("image", *media) if any(media.values()) else ():
        row.pop(kind, None)  # names of the members, whose content is at hand
    return {**row, **{kind: values for kind, values in media.items() if values}}


def _of_json(value: Any, field: str, row: dict[str, Any], media: dict[str, list[Any]]) -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: each for name, each in value.items() if name not in row}
    return {"conversations" if isinstance(value, list) else field: value}


def _opened(ending: str, content: bytes) -> Any:
    if ending == "json":
        return json.loads(content.decode("utf-8-sig"))
    return content.decode("utf-8-sig").strip() if ending in _TEXT else content
