"""Annotations of one image: captions, false captions, objects and boxes.

An answer of a conversation is a caption if there is one question and one answer; the question mentions the image and
asks for a description (a word of ``_ASKS``, not in a sentence such as "Is there a caption?") or is of type ``caption``;
and the answer has two words or more and is not yes or no. Its first sentence is the caption.

Data flow: ``Sample`` with further keys of its row -> ``scene_of_sample`` (with ``caption_from_answer``) -> ``Scene`` ->
``sampling``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mm.data.image_source import image_file
from lightning_mm.data.readers.conversations import InvalidRow
from lightning_mm.data.sample import IMAGE_MARK, Sample

RULE = (
    "the 'caption' of a row, else the first sentence of the answer where a single question asks to describe the picture"
)
_ASKS = re.compile(
    r"\b(descri|caption|depict|summar|narrat|portray|illustrat|explain|explanation|interpretation|account of|rundown"
    r"|analy[sz]|characteri|clarify|examine|break down|walk through|what (is|are|do you see|can you see) (in|on))",
    re.IGNORECASE,
)
_PICTURE = re.compile(r"\b(image|picture|photo|photograph|scene|snapshot)\b", re.IGNORECASE)
_ASKS_OTHERWISE = re.compile(
    r"\W*(is|are|was|were|do|does|did|has|have|had|why|who|whose|when|where|which|how (many|much|old|often))\b",
    re.IGNORECASE,
)
_YES_OR_NO = re.compile(r"(yes\b|no\s*([,.;:!–—]|$))", re.IGNORECASE)
_SENTENCE = re.compile(r"[^.!?\n]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


def caption_from_answer(sample: Sample) -> tuple[str, ...]:
    """The answer as a caption without its full stop, in a tuple; empty where the answer is not a caption.

    Example:
        >>> from lightning_mm.data.sample import Turn
        >>> turns = (Turn("user", "Describe the image."), Turn("assistant", "Two dogs on a beach. They play."))
        >>> description(Sample("1", turns))
        ('Two dogs on a beach',)
    """
    users = [turn for turn in sample.turns if turn.role == "user"]
    answers = [sample.turns[i] for i in sample.answers]
    if len(users) != 1 or len(answers) != 1:
        return ()
    question = users[0].text.replace(IMAGE_MARK, "")
    asking = (part for part in _SENTENCE.findall(question) if not _ASKS_OTHERWISE.match(part))
    asked = any(_ASKS.search(part) for part in asking) and bool(_PICTURE.search(question))
    answer = answers[0].text.strip()
    first = " ".join(_SENTENCE_END.split(answer)[0].split()).rstrip(".")
    is_caption = (asked or answers[0].question_type == "caption") and not _YES_OR_NO.match(answer)
    return (first,) if is_caption and len(first.split()) >= 2 else ()


Box = tuple[float, float, float, float]
LEVELS = ("name", "group", "category")
"""Levels of an object's name, from the finest to the coarsest; any may be used as class."""


@dataclass(frozen=True)
class SceneObject:
    """An object in an image.

    Args:
        kinds: Level of ``LEVELS`` (always ``name``) -> the object's name at that level.
        box: x0, y0, x1, y1 in pixels; None where the position or the number is not known.
    """

    kinds: Mapping[str, str]
    box: Box | None = None

    @property
    def name(self) -> str:
        return self.kinds["name"]


@dataclass(frozen=True)
class Scene:
    """Annotations of an image.

    Args:
        id: Id of the row.
        image: Path of the image.
        origin: ``file:line`` for messages.
        captions: True captions; empty if not known.
        false_captions: Nearly true captions.
        objects: All objects in the image; None if not known.
        group: Group of images that depend on one another and must not be divided; empty if the row gives none.
    """

    id: str
    image: Path
    origin: str
    captions: tuple[str, ...] = ()
    false_captions: tuple[str, ...] = ()
    objects: tuple[SceneObject, ...] | None = None
    group: str = ""

    @property
    def caption(self) -> str:
        """The caption that is used: the first that names an annotated object, else the first."""
        names = {each.name.casefold() for each in self.objects or ()}
        telling = (caption for caption in self.captions if any(name in caption.casefold() for name in names))
        return next(telling, self.captions[0] if self.captions else "")

    @property
    def family(self) -> str:
        """What no split may divide: the group, or the image alone."""
        return f"group {self.group}" if self.group else self.id

    @property
    def richness(self) -> int:
        """Amount of annotation, to prefer well annotated images."""
        return 2 * bool(self.captions) + (self.objects is not None)


class NotProbeable(ValueError):
    """Why a valid row has nothing that could be probed."""


def scene_of_sample(sample: Sample) -> Scene:
    """Annotations of a sample's image.

    Args:
        sample: A row with exactly one image.

    Raises:
        InvalidRow: An annotation is invalid.
        NotProbeable: There is nothing to probe.
    """
    if len(sample.images) != 1:
        raise NotProbeable("rows without exactly one picture")
    extra = sample.extra
    captions = _captions(extra.get("caption"), "caption")
    false_captions = _captions(extra.get("false_captions", extra.get("caption_swapped")), "false_captions")
    objects = _objects(extra.get("objects", extra.get("boxes")))
    captions = captions or caption_from_answer(sample)
    if not captions and objects is None:
        raise NotProbeable("rows with neither caption nor objects")
    if set(map(str.casefold, captions)) & set(map(str.casefold, false_captions)):
        raise InvalidRow("false caption is the true one: the same text is in 'caption' and in 'false_captions'")
    group = extra.get("group")
    return Scene(
        sample.id,
        image_file(sample.images[0]),
        sample.origin,
        captions,
        false_captions,
        objects,
        str(group) if isinstance(group, str | int) else "",
    )


def _captions(value: object, key: str) -> tuple[str, ...]:
    captions = []
    for text in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(text, str) or not text.strip():
            raise InvalidRow(f"wrong type: {key!r} is {text!r:.40}, not text")
        if IMAGE_MARK in text:
            raise InvalidRow(f"misplaced image mark: {IMAGE_MARK} in {key!r}")
        captions.append(" ".join(text.split()))
    return tuple(captions)


def _objects(value: object) -> tuple[SceneObject, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise InvalidRow(f"wrong type: objects are {value!r:.40}, not a list of objects")
    return tuple(_object(each) for each in value)


def _object(value: Mapping[str, Any]) -> SceneObject:
    named = ((level, value.get(level)) for level in LEVELS)
    kinds = {level: " ".join(name.split()) for level, name in named if isinstance(name, str) and name.strip()}
    if "name" not in kinds:
        raise InvalidRow(f"object without a name: {dict(value)!r:.80}")
    return SceneObject(kinds, None if value.get("box") is None else _box(value["box"]))


def _box(value: object) -> Box:
    edges = value if isinstance(value, list | tuple) else ()
    if len(edges) != 4 or not all(isinstance(e, int | float) and math.isfinite(e) for e in edges):
        raise InvalidRow(f"impossible box: {value!r:.60} is not [x0, y0, x1, y1] in pixels")
    left, top, right, bottom = map(float, edges)
    if max(edges) <= 1:
        raise InvalidRow(
            f"normalised box: {value!r:.60} ends within the first pixel; it is [x0, y0, x1, y1] in pixels: "
            "multiply by the picture's width and height"
        )
    if not (left < right and top < bottom):
        raise InvalidRow(
            f"impossible box: {value!r:.60} has no area as [x0, y0, x1, y1]; if it is [x, y, width, height], "
            "give [x, y, x + width, y + height]"
        )
    return left, top, right, bottom
