"""One row of a data file into one Sample, or the reason why not.

Data flow: ``sources`` hands in each decoded row; ``RowReader.sample`` returns a Sample or raises ``BadRow``.

Reasons read ``category: detail``, so that the ledger can count by category.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mm.data.sample import IMAGE_MARK, Role, Sample, Turn

_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_KNOWN_KEYS = frozenset({"id", "image", "images", "conversations", "messages", "type", "question_type"})


class BadRow(ValueError):
    """Why a row cannot be used, as ``category: detail``."""


class RowReader:
    """Reads the rows of one file.

    Args:
        image_root: The folder that image paths are relative to and may not leave.
        answers_required: Whether a row without an answer is bad.
    """

    def __init__(self, image_root: Path, answers_required: bool = True) -> None:
        self.num_marked = 0
        self._root = image_root.resolve()
        self._answers_required = answers_required
        self._images: dict[str, Path] = {}

    def sample(self, row: object, origin: str) -> Sample:
        """Check one row and make a Sample of it.

        Raises:
            BadRow: It cannot be used.
        """
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, dict):
            raise BadRow(f"not an object: the row is {_kind(row)}")
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
            raise BadRow("no conversation: neither 'conversations' nor 'messages' is a list with turns")
        row_type = _text(row.get("question_type", "any"), "question_type")
        turns: list[Turn] = []
        images: list[str] = []
        for message in messages:
            if not isinstance(message, dict):
                raise BadRow(f"wrong type: a turn is {_kind(message)}")
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
            raise BadRow(f"unknown role: {name!r}, known are {', '.join(_ROLES)}")
        return _ROLES[name]

    def _closed(self, turns: list[Turn]) -> list[Turn]:
        """The turns, if they ask and answer as they should."""
        if not self._answers_required and turns[-1].role == "user":
            turns = [*turns, Turn("assistant", "", turns[-1].question_type)]
        if not any(turn.role == "assistant" for turn in turns):
            raise BadRow("no answer: the row has no assistant turn")
        seen_question = False
        for turn in turns:
            if not turn.text.strip() and not (turn.role == "assistant" and not self._answers_required):
                raise BadRow(f"empty turn: the {turn.role} says nothing")
            seen_question |= turn.role == "user"
            if turn.role == "assistant" and not seen_question:
                raise BadRow("no question: an assistant turn comes before any user turn")
            if turn.role != "user" and IMAGE_MARK in turn.text:
                raise BadRow(f"misplaced image mark: {IMAGE_MARK} in a turn of the {turn.role}")
        return turns

    def _marked(self, turns: list[Turn], num_images: int) -> tuple[Turn, ...]:
        """One mark per picture: as written, or all in front of the first question where the row has none."""
        num_marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        if num_marks == 0 and num_images:
            self.num_marked += 1
            first = next(i for i, turn in enumerate(turns) if turn.role == "user")
            turns[first] = Turn("user", f"{IMAGE_MARK}\n" * num_images + turns[first].text)
        elif num_marks != num_images:
            raise BadRow(f"marks and images differ: {num_marks} {IMAGE_MARK} marks, {num_images} images")
        return tuple(turns)

    @staticmethod
    def _image_names(row: dict[str, Any]) -> list[str]:
        given = [row[key] for key in ("image", "images") if row.get(key) is not None]
        if len(given) > 1:
            raise BadRow("two image lists: both 'image' and 'images' are given")
        names = given[0] if given else []
        return [_text(name, "image") for name in (names if isinstance(names, list) else [names])]

    def _image(self, name: str) -> Path:
        if name not in self._images:
            self._images[name] = self._confined(name)
        return self._images[name]

    def _confined(self, name: str) -> Path:
        """The file a row names, which must lie in the image root once every link is followed."""
        if "://" in name or name.startswith("data:"):
            raise BadRow(f"image is a URL: {name[:80]!r}, nothing is fetched from the network; download it first")
        try:
            path = (self._root / name).resolve()
            inside, exists = path.is_relative_to(self._root), path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, links in a circle
            raise BadRow(f"impossible image path: {error}") from error
        if not inside:
            raise BadRow(f"image outside the image root: {name!r} leads to {path}")
        if not exists:
            raise BadRow(f"missing image: {name!r} is {'no regular file' if path.exists() else 'not'} in {self._root}")
        return path


def _joined(content: object, images: list[str]) -> str:
    """HF's content parts as text with marks; pictures named in a part are added to ``images``."""
    if not isinstance(content, list):
        raise BadRow(f"wrong type: the text of a turn is {_kind(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part.get("text"), "text"))
        elif kind == "image":
            texts.append(IMAGE_MARK)
            images.extend(_text(part[key], key) for key in ("image", "path", "url") if part.get(key) is not None)
        else:
            raise BadRow(f"unknown content part: {part!r:.80}")
    return "".join(texts)


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"wrong type: {key!r} is {_kind(value)}, not text")
    return value


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "missing"}.get(type(value), f"{value!r:.40}")
