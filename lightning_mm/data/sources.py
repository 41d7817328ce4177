"""A file of conversations, row by row, into Samples; what does not fit becomes a ledger entry with its line.

Data flow: ``read(path)`` -> ``Rows`` (samples, rejections) -> ``datamodule``.

Two ways to write a row, in a JSON list or one per line (JSONL):
    LLaVA's   {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}
    HF's      {"images": ["a.jpg"], "messages": [{"role": "user", "content": [{"type": "image"}, ...]}, ...]}
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mm.data.rows import BadRow, RowReader
from lightning_mm.data.sample import Rejection, Sample
from lightning_mm.decisions import decide
from lightning_mm.errors import UserError

MAX_ROW_CHARACTERS = 4_000_000
"""A longer row holds something else than a conversation, such as a picture in base64."""


@dataclass(frozen=True)
class Rows:
    """A file, read.

    Args:
        samples: In file order.
        rejections: The rows that cannot be used.
        num_rows: Both together.
    """

    samples: tuple[Sample, ...]
    rejections: tuple[Rejection, ...]
    num_rows: int


def read(path: Path | str, image_root: Path | str | None = None, *, answers_required: bool = True) -> Rows:
    """Read a file of conversations.

    Args:
        path: A ``.json`` list or a ``.jsonl`` file.
        image_root: The folder that image paths are relative to and may not leave; the file's own folder if None.
        answers_required: Whether a row without an answer is rejected; if not, an open question gets an empty one.

    Raises:
        UserError: No such file, not JSON, or no usable row in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No data file {path}.", *why_no_file(path))
    reader = RowReader(Path(image_root) if image_root else path.parent, answers_required)
    samples: list[Sample] = []
    rejections: list[Rejection] = []
    for origin, row in raw_rows(path):
        try:
            samples.append(reader.sample(row, origin))
        except BadRow as error:
            rejections.append(Rejection(origin, str(error)))
    _check_any(path, samples, rejections)
    if reader.num_marked:
        decide(
            "data.image_marks",
            "put in front of the first question",
            f"{reader.num_marked} rows of {path.name} name images but hold no <image> mark",
        )
    return Rows(tuple(samples), tuple(rejections), len(samples) + len(rejections))


def why_no_file(path: Path) -> tuple[str, str]:
    if path.is_dir():
        return "It is a folder.", "Name the .json or .jsonl file in it."
    return "It does not exist.", "Check the path; it is relative to the folder the command runs in."


def _check_any(path: Path, samples: list[Sample], rejections: list[Rejection]) -> None:
    if samples:
        return
    if not rejections:
        raise UserError(f"{path} is empty.", "It holds no row.", "Name a file with at least one conversation.")
    first = "\n    ".join(f"{r.origin}: {r.reason}" for r in rejections[:5])
    raise UserError(
        f"None of the {len(rejections)} rows of {path} can be used.",
        f"The first of them:\n    {first}",
        'Rows look like {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, '
        '{"from": "gpt", "value": "A cat."}]}.',
    )


def raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row with its origin; a row that is not JSON comes as the BadRow it is."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _list_rows(path) if head.startswith(b"[") else _line_rows(path)


class _Decoder(json.JSONDecoder):
    """JSON as the standard has it: no NaN, no Infinity."""

    def __init__(self) -> None:
        super().__init__(parse_constant=self._note)
        self.constants: list[str] = []

    def _note(self, name: str) -> None:
        self.constants.append(name)

    def row(self, text: str, start: int = 0) -> tuple[Any, int]:
        """The row at ``start`` and where it ends; a BadRow in its place if it breaks a rule but has an end."""
        self.constants.clear()
        row, end = self.raw_decode(text, start)
        if self.constants:
            row = BadRow(f"not JSON: {self.constants[0]} is no JSON number")
        elif end - start > MAX_ROW_CHARACTERS:
            row = BadRow(f"row too large: {end - start} characters, the limit is {MAX_ROW_CHARACTERS}")
        return row, end


def _line_rows(path: Path) -> Iterator[tuple[str, Any]]:
    decoder = _Decoder()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{path.name}:{number}", _line_row(decoder, line)


def _line_row(decoder: _Decoder, line: bytes) -> Any:
    if len(line) > 4 * MAX_ROW_CHARACTERS:
        return BadRow(f"row too large: {len(line)} bytes")
    try:
        text = line.decode("utf-8").strip()
        row, end = decoder.row(text)
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON: {error}")
    return row if end == len(text) else BadRow(f"not JSON: more text after the row, at character {end + 1}")


def _list_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Elements of a JSON list, each with the line it begins at and its index."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8.", f"Byte {error.start}: {error.reason}.", "Save it as UTF-8.") from error
    decoder = _Decoder()
    at, line, counted, index = _skip(text, text.index("[") + 1), 1, 0, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, end = decoder.row(text, at)
            at = _skip(text, end)
            if text[at : at + 1] not in (",", "]"):
                raise ValueError(f"Expecting ',' delimiter at character {at}")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is not JSON.",
                f"Element {index}, which begins at line {line}: {error}.",
                "Mend it there, or write one row per line (JSONL), where one bad row does not spoil the rest.",
            ) from error
        yield f"{path.name}:{line}[{index}]", row
        at, index = _skip(text, at + 1) if text[at] == "," else at, index + 1
    if text[at + 1 :].strip():
        raise UserError(f"{path} is not JSON.", "There is more text after the list.", "Keep one list per file.")


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at
