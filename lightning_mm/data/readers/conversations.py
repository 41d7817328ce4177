"""Reads a file of conversations into Samples; a row that cannot be used becomes a Rejection with its line.

Rows are in a JSON list or one per line (JSONL), in one of two formats:
    LLaVA's   {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}
    HF's      {"images": ["a.jpg"], "messages": [{"role": "user", "content": [{"type": "image"}, ...]}, ...]}

Data flow: path -> ``iter_json_rows`` -> ``RowReader.sample`` -> Sample or ``InvalidRow`` -> ``ConversationFile`` ->
``datamodule``.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.sample import IMAGE_MARK, Rejection, Role, Sample, Turn

_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_KNOWN_KEYS = frozenset({"id", "image", "images", "conversations", "messages", "type", "question_type"})


class InvalidRow(ValueError):
    """Why a row cannot be used, as ``category: detail``, by which rejections are counted."""


class RowReader:
    """Converts the rows of one file.

    Args:
        image_root: Folder that image paths are relative to and may not leave.
        answers_required: Whether a row without an answer is invalid.

    Attributes:
        num_marked: Number of rows that named images without marks.
    """

    def __init__(self, image_root: Path, answers_required: bool = True) -> None:
        self.num_marked = 0
        self._root = image_root.resolve()
        self._answers_required = answers_required
        self._images: dict[str, Path] = {}

    def sample(self, row: object, origin: str) -> Sample:
        """The Sample of one decoded row.

        Args:
            row: The JSON value, or the ``InvalidRow`` that decoding it gave.
            origin: ``file:line`` of the row.

        Raises:
            InvalidRow: It cannot be used.
        """
        if isinstance(row, InvalidRow):
            raise row
        if not isinstance(row, dict):
            raise InvalidRow(f"not an object: the row is {_kind(row)}")
        turns, inline_images = self._turns(row)
        images = self._image_names(row) or inline_images
        return Sample(
            id=str(row.get("id", origin)),
            turns=self._marked(self._closed(turns), len(images)),
            images=tuple(self._image(name) for name in images),
            origin=origin,
            extra={key: value for key, value in row.items() if key not in _KNOWN_KEYS},
        )

    def _turns(self, row: dict[str, Any]) -> tuple[list[Turn], list[str]]:
        messages = row.get("conversations", row.get("messages"))
        if not isinstance(messages, list) or not messages:
            raise InvalidRow("no conversation: neither 'conversations' nor 'messages' is a list with turns")
        row_type = _text(row.get("question_type", "any"), "question_type")
        turns: list[Turn] = []
        images: list[str] = []
        for message in messages:
            if not isinstance(message, dict):
                raise InvalidRow(f"wrong type: a turn is {_kind(message)}")
            role = self._role(message)
            content = message.get("value", message.get("content"))
            text = content if isinstance(content, str) else _joined(content, images)
            question_type = _text(message.get("type", row_type), "type") if role == "assistant" else "any"
            turns.append(Turn(role, text, question_type))
        return turns, images

    @staticmethod
    def _role(message: dict[str, Any]) -> Role:
        name = _text(message.get("from", message.get("role")), "role")
        if name not in _ROLES:
            raise InvalidRow(f"unknown role: {name!r}, known are {', '.join(_ROLES)}")
        return _ROLES[name]

    def _closed(self, turns: list[Turn]) -> list[Turn]:
        """The turns, checked for order and content; an open question gets an empty answer if allowed."""
        if not self._answers_required and turns[-1].role == "user":
            turns = [*turns, Turn("assistant", "", turns[-1].question_type)]
        if not any(turn.role == "assistant" for turn in turns):
            raise InvalidRow("no answer: the row has no assistant turn")
        seen_question = False
        for turn in turns:
            if not turn.text.strip() and not (turn.role == "assistant" and not self._answers_required):
                raise InvalidRow(f"empty turn: the {turn.role} says nothing")
            seen_question |= turn.role == "user"
            if turn.role == "assistant" and not seen_question:
                raise InvalidRow("no question: an assistant turn comes before any user turn")
            if turn.role != "user" and IMAGE_MARK in turn.text:
                raise InvalidRow(f"misplaced image mark: {IMAGE_MARK} in a turn of the {turn.role}")
        return turns

    def _marked(self, turns: list[Turn], num_images: int) -> tuple[Turn, ...]:
        """The turns with one mark per image: as written, or all before the first question where there are none."""
        num_marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        if num_marks == 0 and num_images:
            self.num_marked += 1
            first = next(i for i, turn in enumerate(turns) if turn.role == "user")
            turns[first] = Turn("user", f"{IMAGE_MARK}\n" * num_images + turns[first].text)
        elif num_marks != num_images:
            raise InvalidRow(f"marks and images differ: {num_marks} {IMAGE_MARK} marks, {num_images} images")
        return tuple(turns)

    @staticmethod
    def _image_names(row: dict[str, Any]) -> list[str]:
        given = [row[key] for key in ("image", "images") if row.get(key) is not None]
        if len(given) > 1:
            raise InvalidRow("two image lists: both 'image' and 'images' are given")
        names = given[0] if given else []
        return [_text(name, "image") for name in (names if isinstance(names, list) else [names])]

    def _image(self, name: str) -> Path:
        if name not in self._images:
            self._images[name] = self._confined(name)
        return self._images[name]

    def _confined(self, name: str) -> Path:
        """The path of an image, which must be inside the image root after links are resolved."""
        if "://" in name or name.startswith("data:"):
            raise InvalidRow(f"image is a URL: {name[:80]!r}, nothing is fetched from the network; download it first")
        try:
            path = (self._root / name).resolve()
            inside, exists = path.is_relative_to(self._root), path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, contains NUL, or circular links
            raise InvalidRow(f"impossible image path: {error}") from error
        if not inside:
            raise InvalidRow(f"image outside the image root: {name!r} leads to {path}")
        if not exists:
            raise InvalidRow(
                f"missing image: {name!r} is {'no regular file' if path.exists() else 'not'} in {self._root}"
            )
        return path


def _joined(content: object, images: list[str]) -> str:
    """HF's content parts as text with marks; images named in a part are added to ``images``."""
    if not isinstance(content, list):
        raise InvalidRow(f"wrong type: the text of a turn is {_kind(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part.get("text"), "text"))
        elif kind == "image":
            texts.append(IMAGE_MARK)
            images.extend(_text(part[key], key) for key in ("image", "path", "url") if part.get(key) is not None)
        else:
            raise InvalidRow(f"unknown content part: {part!r:.80}")
    return "".join(texts)


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise InvalidRow(f"wrong type: {key!r} is {_kind(value)}, not text")
    return value


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "missing"}.get(type(value), f"{value!r:.40}")


MAX_ROW_CHARACTERS = 4_000_000
"""Limit on a row; a longer one holds something else, such as an image in base64."""


@dataclass(frozen=True)
class ConversationFile:
    """The content of a file.

    Args:
        samples: Usable rows in file order.
        rejections: Rows that cannot be used.
        num_rows: Number of all rows.
    """

    samples: tuple[Sample, ...]
    rejections: tuple[Rejection, ...]
    num_rows: int


def read_conversations(
    path: Path | str, image_root: Path | str | None = None, *, answers_required: bool = True
) -> ConversationFile:
    """The samples and rejections of a file of conversations.

    Args:
        path: A ``.json`` list or a ``.jsonl`` file.
        image_root: Folder that image paths are relative to and may not leave; None takes the file's own folder.
        answers_required: Whether a row without an answer is rejected; if not, an open question gets an empty answer.

    Raises:
        UserError: There is no such file, it is not JSON, or it has no usable row.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No data file {path}.", *missing_file_reason(path))
    reader = RowReader(Path(image_root) if image_root else path.parent, answers_required)
    samples: list[Sample] = []
    rejections: list[Rejection] = []
    for origin, row in iter_json_rows(path):
        try:
            samples.append(reader.sample(row, origin))
        except InvalidRow as error:
            rejections.append(Rejection(origin, str(error)))
    _check_any(path, samples, rejections)
    if reader.num_marked:
        log_decision(
            "data.image_marks",
            "put in front of the first question",
            f"{reader.num_marked} rows of {path.name} name images but hold no <image> mark",
        )
    return ConversationFile(tuple(samples), tuple(rejections), len(samples) + len(rejections))


def missing_file_reason(path: Path) -> tuple[str, str]:
    """Why and fix of the UserError for a path that is no file."""
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


def iter_json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row with its origin; a row that is not valid JSON as an ``InvalidRow``.

    Args:
        path: A ``.json`` list or a ``.jsonl`` file.

    Raises:
        UserError: A JSON list is not valid or not UTF-8.
    """
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _list_rows(path) if head.startswith(b"[") else _line_rows(path)


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
        return InvalidRow(f"row too large: {len(line)} bytes")
    try:
        text = line.decode("utf-8").strip()
        row, end = decoder.row(text)
    except UnicodeDecodeError as error:
        return InvalidRow(f"not UTF-8: byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return InvalidRow(f"not JSON: {error}")
    return row if end == len(text) else InvalidRow(f"not JSON: more text after the row, at character {end + 1}")


def _list_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Elements of a JSON list, each with its first line and its index."""
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
