"""Rows of JSON files, one after the other in constant memory, each with the line it begins at.

Data flow: path -> ``compression.open_bytes`` -> ``list_rows`` (a list: a window slides over its text), ``line_rows``
(JSONL) or ``stream_rows`` (objects of several lines, one after the other) -> rows, each a JSON value or an
``InvalidRow``. ``list_places`` and ``stream_places`` find where reading may begin in the middle of a file.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lightning_mm.core.errors import UserError
from lightning_mm.data.readers.compression import open_bytes
from lightning_mm.data.readers.invalid_row import InvalidRow

MAX_ROW_CHARACTERS = 32_000_000
"""Limit on a row, pictures in base64 included; a longer one is no row of a dataset."""
_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_SPACE = " \n\r\t"


def iter_json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row with its origin; a row that is not valid JSON as an ``InvalidRow``.

    Args:
        path: A ``.json`` list or a ``.jsonl`` file.

    Raises:
        UserError: A JSON list is not valid or not UTF-8.
    """
    return (list_rows if first_character(path) == "[" else line_rows)(path, path.name)


def first_character(path: Path) -> str:
    """The first character of a file behind white space; '' if there is none."""
    with open_bytes(path) as file:
        head = file.read(1 << 16).removeprefix(_BOM).lstrip()
    return head[:1].decode("latin-1")


class _Decoder(json.JSONDecoder):
    """JSON decoder that rejects NaN and Infinity."""

    def __init__(self) -> None:
        super().__init__(parse_constant=self._note)
        self.constants: list[str] = []

    def _note(self, name: str) -> None:
        self.constants.append(name)

    def row(self, text: str, start: int = 0) -> tuple[Any, int]:
        """The row at ``start`` and where it ends; an ``InvalidRow`` in its place if it ends but breaks a rule."""
        self.constants.clear()
        row, end = self.raw_decode(text, start)
        if self.constants:
            row = InvalidRow(f"not JSON: {self.constants[0]} is no JSON number")
        elif end - start > MAX_ROW_CHARACTERS:
            row = InvalidRow(f"row too large: {end - start} characters, the limit is {MAX_ROW_CHARACTERS}")
        return row, end


def line_rows(
    path: Path, name: str, start: int = 0, stop: int | None = None, line: int = 1
) -> Iterator[tuple[str, Any]]:
    """Rows of a file with one row per line.

    Args:
        path: The file.
        name: What it is called in origins.
        start: Byte to begin at, the first of a line; for files that are not compressed.
        stop: Byte to end before; None for the end of the file.
        line: Number of the first line that is read.
    """
    decoder, at = _Decoder(), start
    with open_bytes(path) as file:
        if start:
            file.seek(start)
        while (stop is None or at < stop) and (content := file.readline(4 * MAX_ROW_CHARACTERS + 2)):
            at += len(content)
            row: Any = None
            if len(content) > 4 * MAX_ROW_CHARACTERS:
                at += _skip_line(file, content)
                row = InvalidRow(f"row too large: the line is over {4 * MAX_ROW_CHARACTERS} bytes")
            elif text := (content.removeprefix(_BOM) if line == 1 else content).strip():
                row = _line_row(decoder, text)
            if row is not None or content.strip():
                yield f"{name}:{line}", row
            line += 1


def _skip_line(file: IO[bytes], content: bytes) -> int:
    """Read to the end of the line that ``content`` is the beginning of; returns the number of bytes."""
    skipped = 0
    while content and not content.endswith(b"\n"):
        content = file.readline(_CHUNK)
        skipped += len(content)
    return skipped


def _line_row(decoder: _Decoder, line: bytes) -> Any:
    try:
        text = line.decode("utf-8").strip()
        row, end = decoder.row(text)
    except UnicodeDecodeError as error:
        return InvalidRow(f"not UTF-8: byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return InvalidRow(f"not JSON: {error}")
    return row if end == len(text) else InvalidRow(f"not JSON: more text after the row, at character {end + 1}")


@dataclass(frozen=True)
class Place:
    """Where reading may begin: the start of a file, or directly behind one of its elements.

    Args:
        index: Index of the element that comes next.
        line: Line, from 1.
        byte: Byte of the file.
        character: Character of the text, a byte order mark not counted.
        line_start: Character that begins the line.
    """

    index: int = 0
    line: int = 1
    byte: int = 0
    character: int = 0
    line_start: int = 0


_START = Place()


class _Window:
    """A part of a text file that slides over it.

    Args:
        file: The file.
        path: What it is called in errors.
        place: Where it begins.

    Attributes:
        text: The part that is in memory.
        at: Position in ``text``.
        line: Line of that position, from 1.
        num_bytes: Bytes of the file that were read.
    """

    def __init__(self, file: IO[bytes], path: Path, place: Place = _START) -> None:
        self.path = path
        self._file, self._decode = file, codecs.getincrementaldecoder("utf-8-sig")()
        if place.byte:
            file.seek(place.byte)
        self.num_bytes, self._ended = place.byte, False
        self.text, self.at, self.line = "", 0, place.line
        self._counted = 0  # lines are counted up to here
        self._dropped, self._line_start = place.character, place.line_start  # what is before the window

    @property
    def character(self) -> int:
        """The position in the whole text."""
        return self._dropped + self.at

    def place(self, index: int) -> Place:
        """The position, behind which the element ``index`` comes."""
        line = self.count_lines()
        left = len(self._decode.getstate()[0]) + len(self.text[self.at :].encode())
        return Place(index, line, self.num_bytes - left, self.character, self._line_start)

    def fill(self, size: int) -> None:
        """Have at least ``size`` characters from the position on, or all that are left."""
        while not self._ended and len(self.text) - self.at < size:
            chunk = self._file.read(max(_CHUNK, size - (len(self.text) - self.at)))
            try:
                self.text += self._decode.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                place = self.num_bytes + error.start - len(self._decode.getstate()[0])
                raise UserError(
                    f"{self.path} is not UTF-8.", f"Byte {place}: {error.reason}.", "Save it as UTF-8."
                ) from error
            self.num_bytes += len(chunk)
            self._ended = not chunk

    def peek(self) -> str:
        """The next character behind white space, which becomes the position; '' at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text) or self._ended:
                return self.text[self.at : self.at + 1]
            self.fill(1)

    def count_lines(self) -> int:
        """The line of the position; drops the text before it."""
        breaks = self.text.count("\n", self._counted, self.at)
        if breaks:
            self.line += breaks
            self._line_start = self._dropped + self.text.rindex("\n", self._counted, self.at) + 1
        self._counted = self.at
        if self.at > _CHUNK:
            self.text, self._dropped = self.text[self.at :], self._dropped + self.at
            self.at = self._counted = 0
        return self.line

    def value(self, decoder: _Decoder) -> Any:
        """The JSON value at the position, which moves behind it.

        Raises:
            ValueError: It is not JSON; places count from the beginning of the file.
            RecursionError: It is nested too deeply.
        """
        self.fill(_CHUNK // 4)
        while True:
            have = len(self.text) - self.at
            try:
                row, end = decoder.row(self.text, self.at)
            except ValueError as error:
                if self._ended or have >= 8 * MAX_ROW_CHARACTERS:
                    raise self._placed(error) from error
            else:
                goes_on = isinstance(row, (int, float)) and self.text[end : end + 1] not in (*_SPACE, ",", "]", "}")
                if self._ended or (end < len(self.text) and not goes_on):
                    self.at = end
                    return row
            self.fill(2 * have + 1)

    def _placed(self, error: ValueError) -> ValueError:
        if not isinstance(error, json.JSONDecodeError):
            return error
        before = self.text[: error.pos]
        line = self.line + before.count("\n", self._counted)
        start = self._dropped + before.rindex("\n") + 1 if "\n" in before[self._counted :] else self._line_start
        place = self._dropped + error.pos
        return ValueError(f"{error.msg}: line {line} column {place - start + 1} (char {place})")


def list_rows(path: Path, name: str, place: Place = _START, stop: int | None = None) -> Iterator[tuple[str, Any]]:
    """Elements of a JSON list, each with its first line and its index.

    Args:
        path: The file.
        name: What it is called in origins.
        place: Where to begin, one of ``list_places``.
        stop: Index of the element to end before; None for the end of the file.

    Raises:
        UserError: It is not a JSON list, or not UTF-8.
    """
    with open_bytes(path) as file:
        for index, line, row in _list_elements(_Window(file, path, place), place.index, stop):
            yield f"{name}:{line}[{index}]", row


def stream_rows(path: Path, name: str, place: Place = _START, stop: int | None = None) -> Iterator[tuple[str, Any]]:
    """JSON objects that follow one another, each over any number of lines.

    Args:
        path: The file.
        name: What it is called in origins.
        place: Where to begin, one of ``stream_places``.
        stop: Index of the object to end before; None for the end of the file.

    Raises:
        UserError: What follows is not JSON, or not UTF-8.
    """
    with open_bytes(path) as file:
        for _, line, row in _stream_elements(_Window(file, path, place), place.index, stop):
            yield f"{name}:{line}", row


def list_places(path: Path, part_bytes: int) -> list[Place]:
    """Where the parts of a list begin, about as many bytes apart; a broken list has none behind its first fault."""
    return _places(path, part_bytes, _list_elements)


def stream_places(path: Path, part_bytes: int) -> list[Place]:
    """``list_places`` for objects that follow one another."""
    return _places(path, part_bytes, _stream_elements)


_Elements = Iterator[tuple[int, int, Any]]
"""Index, first line and value of each element."""


def _places(path: Path, part_bytes: int, elements: Callable[[_Window, int, int | None], _Elements]) -> list[Place]:
    found = [_START]
    with open_bytes(path) as file, suppress(UserError):  # whoever reads the last part meets the fault again
        window = _Window(file, path)
        for index, _, _ in elements(window, 0, None):
            if window.num_bytes - found[-1].byte >= part_bytes and window.peek() not in ("]", ""):
                found.append(window.place(index + 1))
    return found


def _list_elements(window: _Window, index: int, stop: int | None) -> _Elements:
    decoder = _Decoder()
    assert window.peek() == ("," if index else "[")
    while index != stop:
        window.at += 1
        if window.peek() == "]":
            break
        line = window.count_lines()
        try:
            row = window.value(decoder)
            if window.peek() not in (",", "]"):
                raise ValueError(f"Expecting ',' delimiter at character {window.character}")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{window.path} is not JSON.",
                f"Element {index}, which begins at line {line}: {error}.",
                "Mend it there, or write one row per line (JSONL), where one bad row does not spoil the rest.",
            ) from error
        yield index, line, row
        index += 1
        if window.peek() == "]":
            break
    else:
        return
    window.at += 1
    if window.peek():
        raise UserError(f"{window.path} is not JSON.", "There is more text after the list.", "Keep one list per file.")


def _stream_elements(window: _Window, index: int, stop: int | None) -> _Elements:
    decoder = _Decoder()
    while index != stop and window.peek():
        line = window.count_lines()
        try:
            row = window.value(decoder)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{window.path} is not JSON.", f"The row that begins at line {line}: {error}.", "Mend it there."
            ) from error
        yield index, line, row
        index += 1
