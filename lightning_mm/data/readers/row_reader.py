"""Converts rows to Samples, or says why a row cannot be used.

Data flow: row -> ``RowReader.sample``: ``shapes`` finds the conversation, ``media`` its pictures; both are checked ->
Sample or ``InvalidRow``.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_mm.data.image_source import ImageSource
from lightning_mm.data.readers.image_root import ImageRoot
from lightning_mm.data.readers.invalid_row import InvalidRow, kind_of, require_text
from lightning_mm.data.readers.media import MediaReader
from lightning_mm.data.readers.media_columns import ImageId, image_columns, video_columns
from lightning_mm.data.readers.messages import Conversation, MediaIndex, MessageReader, Tags, as_tools
from lightning_mm.data.readers.plain import as_plain
from lightning_mm.data.readers.shapes import Shape, find_shape, system_prompt, trains
from lightning_mm.data.readers.training_marks import TRAIN_KEYS, refuse_preference
from lightning_mm.data.sample import IMAGE_MARK, VIDEO_MARK, Sample, Turn

_AUDIO_MARK = "<audio>"
_IDS = ("id", "question_id", "questionId", "__key__")
_TOOLS = ("tools", "functions")
_REFERENCES = "references"
_KEPT = ("caption", "captions", _REFERENCES)
"""Columns that stay with the sample though they are read: probe sets and the scores of captions take them."""
_GROUNDING = ("<ref-object>", "<bbox>")


class RowReader:
    """Converts the rows of one source.

    Args:
        image_root: Folder that image paths are relative to and may not leave.
        answers_required: Whether a row without an answer is invalid.
        columns: Our name -> the file's column, where it is not found; LLaMA-Factory's words.
        tags: Names within messages, likewise.
        system: System prompt of rows without one; None for none.
        media: Finds pictures; None for files below ``image_root``.
        kinds: Kinds of shape that the source has (``Shape.kind``); a row of another is invalid. None for any.

    Attributes:
        num_marked: Number of rows that named images without marks.
        shapes: Names of the shapes found, with the number of rows.
        columns_read: Columns that were read.
        ignored: Columns, and keys of messages, that were not read, with the number of rows.
        last_kind: Kind of shape of the row read last; '' if none was found.
    """

    def __init__(
        self,
        image_root: Path,
        answers_required: bool = True,
        *,
        columns: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        system: str | None = None,
        media: MediaReader | None = None,
        kinds: Collection[str] | None = None,
    ) -> None:
        self.num_marked = 0
        self.last_kind = ""
        self.shapes: Counter[str] = Counter()
        self.columns_read: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self._media = media or MediaReader(ImageRoot(image_root))
        self._answers_required, self._kinds = answers_required, kinds
        self._columns, self._tags, self._system = dict(columns or {}), Tags.of(tags or {}), system

    def sample(self, row: object, origin: str) -> Sample:
        """The Sample of one decoded row.

        Args:
            row: The JSON value, or the ``InvalidRow`` that decoding it gave.
            origin: ``file:line`` of the row.

        Raises:
            InvalidRow: It cannot be used.
        """
        try:
            return self._sample(row, origin)
        except RecursionError as error:
            raise InvalidRow("nested too deeply: lists or objects within one another") from error

    def _sample(self, row: object, origin: str) -> Sample:
        self.last_kind = ""
        if isinstance(row, InvalidRow):
            raise row
        if not isinstance(row, dict):
            raise InvalidRow(f"not an object: the row is {kind_of(row)}")
        named = self._renamed(row)
        refuse_preference(named, "response" in self._columns)
        learned = trains(named)
        shape = find_shape(named, self._columns)
        self.last_kind = shape.kind
        if self._kinds is not None and shape.kind not in self._kinds:
            raise InvalidRow(f"another shape: the row is {shape.name}, unlike the first rows of its source")
        found = self._conversation(named, shape)
        read = {*shape.columns, "id", "type", "question_type", _REFERENCES, *TRAIN_KEYS}
        turns = self._with_system(named, found.turns, read)
        tools = self._tools(named, read)
        images = _merged(found.images, image_columns(named, shape.with_ids and not found.images), read, "images")
        videos = _merged(found.videos, video_columns(named), read, "videos")
        turns = turns if learned else [replace(turn, train=False) for turn in turns]
        turns = _refuse_boxes(self._closed(turns), named)
        sample = Sample(
            id=str(next((named[key] for key in _IDS if named.get(key) is not None), origin)),
            turns=self._marked(turns, len(images), len(videos)),
            images=tuple(self._picture(value, f"{origin} image {i}", "image") for i, value in enumerate(images)),
            origin=origin,
            extra={key: as_plain(value) for key, value in named.items() if key not in read or key in _KEPT},
            videos=tuple(self._picture(value, f"{origin} video {i}", "video") for i, value in enumerate(videos)),
            tools=tools,
        )
        self._count(named, shape, read, found)
        return sample

    def _renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with the columns that the user named under our names."""
        if not self._columns:
            return row
        named = {ours: row.get(theirs) for ours, theirs in self._columns.items()}
        taken = {*self._columns, *self._columns.values()}
        return {**{key: value for key, value in row.items() if key not in taken}, **named}

    def _conversation(self, row: Mapping[str, Any], shape: Shape) -> Conversation:
        kind = row.get("question_type")
        reader = MessageReader(self._tags, "any" if kind is None else require_text(kind, "question_type"))
        shape.read(row, reader)
        return reader.found

    def _with_system(self, row: Mapping[str, Any], turns: list[Turn], read: set[str]) -> list[Turn]:
        """The turns behind a system prompt: their own, or else the row's, or else the source's."""
        column, text = system_prompt(row)
        if turns and turns[0].role == "system":
            if column and text.strip() == turns[0].text.strip():
                read.add(column)
            return turns
        read.add(column)
        text = text or self._system or ""
        return [Turn("system", text), *turns] if text.strip() else turns

    def _tools(self, row: Mapping[str, Any], read: set[str]) -> str:
        name = next((name for name in _TOOLS if row.get(name)), "")
        read.add(name)
        return as_tools(row[name]) if name else ""

    def _closed(self, turns: list[Turn]) -> list[Turn]:
        """The turns, checked for order and content; an open question gets an empty answer if allowed."""
        if not self._answers_required and turns and turns[-1].role in ("user", "tool"):
            turns = [*turns, Turn("assistant", "", turns[-1].question_type)]
        if not any(turn.role == "assistant" for turn in turns):
            raise InvalidRow("no answer: the row has no assistant turn")
        seen_question = False
        for turn in turns:
            if (
                not turn.text.strip()
                and not turn.tool_calls
                and not (turn.role == "assistant" and not self._answers_required)
            ):
                raise InvalidRow(f"empty turn: the {turn.role} says nothing")
            seen_question |= turn.role == "user"
            if turn.role == "assistant" and not seen_question:
                raise InvalidRow("no question: an assistant turn comes before any user turn")
            if turn.role != "user" and IMAGE_MARK in turn.text:
                raise InvalidRow(f"misplaced image mark: {IMAGE_MARK} in a turn of the {turn.role}")
        if self._answers_required and not any(turn.train for turn in turns if turn.role == "assistant"):
            raise InvalidRow("nothing to learn: every answer is marked as context only")
        return turns

    def _marked(self, turns: list[Turn], num_images: int, num_videos: int) -> tuple[Turn, ...]:
        """The turns with one mark per image or video: as written, or before the first question where there are none."""
        turns = _with_our_marks(_with_marks_for_numbers(turns, num_images), num_images, num_videos)
        asked = " ".join(turn.text for turn in turns if turn.role == "user")
        if _AUDIO_MARK in asked:
            raise InvalidRow(f"audio: a turn of the user has {_AUDIO_MARK}, and audio is not trained on")
        front = ""
        for mark, number, what in ((IMAGE_MARK, num_images, "images"), (VIDEO_MARK, num_videos, "videos")):
            num_marks = asked.count(mark)
            if num_marks == 0 and number:
                front += f"{mark}\n" * number
            elif num_marks != number:
                raise InvalidRow(f"marks and {what} differ: {num_marks} {mark} marks, {number} {what}")
        if front:
            self.num_marked += 1
            first = next(i for i, turn in enumerate(turns) if turn.role == "user")
            turns[first] = Turn("user", front + turns[first].text)
        return tuple(turns)

    def _picture(self, value: Any, name: str, what: str) -> ImageSource:
        if not isinstance(value, ImageId):
            return self._media.read(value, name, what)
        for candidate in value.names():
            try:
                found = self._media.read(candidate, name, what)
            except InvalidRow as error:
                if not str(error).startswith("missing image"):
                    raise
            else:
                if not isinstance(found, Path) or found.is_file():
                    return found
        raise InvalidRow(f"missing image: no file is named after the id {str(value)!r}, as {value.names()[1]}")

    def _count(self, row: Mapping[str, Any], shape: Shape, read: set[str], found: Conversation) -> None:
        self.shapes[shape.name] += 1
        given = [key for key, value in row.items() if value is not None]
        self.columns_read.update(self._columns.get(key, key) for key in given if key in read)
        self.ignored.update(self._columns.get(key, key) for key in given if key not in read)
        self.ignored.update(found.ignored)


_NUMBER = re.compile(r"<image[ _]?(\d+)>")


def _with_marks_for_numbers(turns: list[Turn], num_images: int) -> list[Turn]:
    """The turns with a mark for ``<image 1>``, ``<image 2>``, ... where each stands once and in order, as in MMMU."""
    numbers = [int(found) for turn in turns if turn.role == "user" for found in _NUMBER.findall(turn.text)]
    plain = any(IMAGE_MARK in turn.text for turn in turns)
    if plain or not numbers or numbers not in (list(range(1, num_images + 1)), list(range(num_images))):
        return turns
    return [replace(turn, text=_NUMBER.sub(IMAGE_MARK, turn.text)) if turn.role == "user" else turn for turn in turns]


_FOREIGN = re.compile(
    r"(?:<\|vision_start\|>)?<\|image_pad\|>(?:<\|vision_end\|>)?|<\|image\|>|<start_of_image>|<ImageHere>|\[IMG\]|"
    r"<\|image_\d+\|>|<image_placeholder>|<IMAGE>|<image/>|<image_soft_token>"
)
"""Marks of pictures that single models use: Qwen, Llama, Gemma, InternLM, Mistral, Phi, DeepSeek."""


def _with_our_marks(turns: list[Turn], num_images: int, num_videos: int) -> list[Turn]:
    """The turns with our marks for those of single models; ``<image>`` for a video (LLaVA-Video) is ``<video>``.

    Raises:
        InvalidRow: There are other marks than pictures.
    """
    asked = " ".join(turn.text for turn in turns if turn.role == "user")
    if num_videos and not num_images and VIDEO_MARK not in asked and asked.count(IMAGE_MARK) == num_videos:
        return [replace(turn, text=turn.text.replace(IMAGE_MARK, VIDEO_MARK)) for turn in turns]
    foreign = _FOREIGN.findall(asked)
    if not foreign or not num_images or IMAGE_MARK in asked:
        return turns
    if len(foreign) != num_images:
        raise InvalidRow(f"marks and images differ: {len(foreign)} {foreign[0]} marks, {num_images} images")
    return [replace(turn, text=_FOREIGN.sub(IMAGE_MARK, turn.text)) if turn.role == "user" else turn for turn in turns]


def _refuse_boxes(turns: list[Turn], row: Mapping[str, Any]) -> list[Turn]:
    """The turns, refused if a box of ``objects`` is to be written into them."""
    marks = [mark for mark in _GROUNDING if any(mark in turn.text for turn in turns)]
    if marks and isinstance(row.get("objects"), dict):
        raise InvalidRow(
            f"boxes to fill in: {' and '.join(marks)} stand for entries of 'objects', which every model writes in its "
            "own way; write names and coordinates into the text as your model does"
        )
    return turns


def _merged(inline: list[Any], of_row: tuple[list[str], list[Any]], read: set[str], what: str) -> list[Any]:
    """What stands for each mark, in order: named in the turns, or the next of the row's own list.

    Args:
        inline: What the turns name; None or an index where they only mark the place.
        of_row: The row's columns, and what they list.
        read: Takes these columns.
        what: "images" or "videos".
    """
    columns, listed = of_row
    read.update(columns)
    if not inline or inline == listed:
        return listed
    open_places = [each is None or isinstance(each, MediaIndex) for each in inline]
    if not any(open_places) and not listed:
        return inline
    if not all(open_places):
        raise InvalidRow(f"two image lists: the turns name {what}, and so does {(columns or ['nothing'])[0]!r}")
    if not any(isinstance(each, MediaIndex) for each in inline) and len(inline) == len(listed):
        return listed
    order = [number if each is None else int(each) for number, each in enumerate(inline)]
    if sorted(order) != list(range(len(listed))):
        raise InvalidRow(f"marks and {what} differ: the turns show {len(inline)} of them, the row lists {len(listed)}")
    return [listed[index] for index in order]
