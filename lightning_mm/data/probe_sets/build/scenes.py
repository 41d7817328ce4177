"""What is known about one picture: a caption, captions that are wrong about it, the things in it and where they are.

Data flow: a checked ``Sample`` with the keys that its row held beside the conversation -> ``scene_of_sample`` -> ``drawing``.

Which answers of a conversation are captions.

Data flow: a Sample without a caption of its own -> ``caption_from_answer`` -> ``scenes``.

The rule: one question, one answer; the question speaks of the picture and asks to describe it (a word of ``_ASKS``, and
not in a sentence such as "Is there a caption?"), or is of the type ``caption``; the answer has two words or more and is
no yes or no. Its first sentence is the caption.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """The caption that an answer is, without its full stop; nothing where no answer is one.

    Example:
        >>> from lightning_mm.data.sample import Turn
        >>> turns = (Turn("user", "Describe the image."), Turn("assistant", "Two dogs on a beach. They play."))
        >>> description(Sample("1", turns))
        ('Two dogs on a beach',)
    """
    users = [turn for turn in sample.turns if turn.role == "user"]
    answers = [turn for turn in sample.turns if turn.role == "assistant"]
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
"""What a thing is called, from the finest to the coarsest: any of them may serve as its class."""


@dataclass(frozen=True)
class SceneObject:
    """A thing in a picture.

    Args:
        kinds: Some of ``LEVELS``, always ``name`` -> what it is called there.
        box: x0, y0, x1, y1 in pixels; None where it is known to be there, but not where, or not how often.
    """

    kinds: Mapping[str, str]
    box: Box | None = None

    @property
    def name(self) -> str:
        return self.kinds["name"]


@dataclass(frozen=True)
class Scene:
    """A picture and what is true and false of it.

    Args:
        id: Of its row.
        image: The file.
        origin: ``file:line`` for messages.
        captions: True ones; none if not known.
        false_captions: Nearly true ones.
        objects: Everything in it; None if not known.
        group: Of pictures that depend on one another, if the row says so: they are never torn apart.
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
        """The one that is used: the first that names a thing that is known to be there, else the first."""
        names = {each.name.casefold() for each in self.objects or ()}
        telling = (caption for caption in self.captions if any(name in caption.casefold() for name in names))
        return next(telling, self.captions[0] if self.captions else "")

    @property
    def family(self) -> str:
        """What no split may tear apart: its group, or it alone."""
        return f"group {self.group}" if self.group else self.id

    @property
    def richness(self) -> int:
        """How much there is to ask about."""
        return 2 * bool(self.captions) + (self.objects is not None)


class NotProbeable(ValueError):
    """Why a sound row says nothing that a probe could ask."""


def scene_of_sample(sample: Sample) -> Scene:
    """What a row knows about its picture.

    Raises:
        BadRow: What it says cannot be so.
        Unused: It is a conversation that tells nothing that can be asked.
    """
    if len(sample.images) != 1:
        raise NotProbeable("rows without exactly one picture")
    told = sample.extra
    captions = _captions(told.get("caption"), "caption")
    false_captions = _captions(told.get("false_captions", told.get("caption_swapped")), "false_captions")
    objects = _objects(told.get("objects", told.get("boxes")))
    captions = captions or caption_from_answer(sample)
    if not captions and objects is None:
        raise NotProbeable("rows with neither caption nor objects")
    if set(map(str.casefold, captions)) & set(map(str.casefold, false_captions)):
        raise InvalidRow("false caption is the true one: the same text is in 'caption' and in 'false_captions'")
    group = told.get("group")
    return Scene(
        sample.id,
        sample.images[0],
        sample.origin,
        captions,
        false_captions,
        objects,
        str(group) if isinstance(group, str | int) else "",
    )


def _captions(told: object, key: str) -> tuple[str, ...]:
    captions = []
    for text in told if isinstance(told, list) else [] if told is None else [told]:
        if not isinstance(text, str) or not text.strip():
            raise InvalidRow(f"wrong type: {key!r} is {text!r:.40}, not text")
        if IMAGE_MARK in text:
            raise InvalidRow(f"misplaced image mark: {IMAGE_MARK} in {key!r}")
        captions.append(" ".join(text.split()))
    return tuple(captions)


def _objects(told: object) -> tuple[SceneObject, ...] | None:
    if told is None:
        return None
    if not isinstance(told, list) or not all(isinstance(each, dict) for each in told):
        raise InvalidRow(f"wrong type: objects are {told!r:.40}, not a list of objects")
    return tuple(_object(each) for each in told)


def _object(told: Mapping[str, Any]) -> SceneObject:
    named = ((level, told.get(level)) for level in LEVELS)
    kinds = {level: " ".join(name.split()) for level, name in named if isinstance(name, str) and name.strip()}
    if "name" not in kinds:
        raise InvalidRow(f"object without a name: {dict(told)!r:.80}")
    return SceneObject(kinds, None if told.get("box") is None else _box(told["box"]))


def _box(told: object) -> Box:
    edges = told if isinstance(told, list | tuple) else ()
    if len(edges) != 4 or not all(isinstance(e, int | float) and math.isfinite(e) for e in edges):
        raise InvalidRow(f"impossible box: {told!r:.60} is not [x0, y0, x1, y1] in pixels")
    left, top, right, bottom = map(float, edges)
    if max(edges) <= 1:
        raise InvalidRow(
            f"normalised box: {told!r:.60} ends within the first pixel; it is [x0, y0, x1, y1] in pixels: "
            "multiply by the picture's width and height"
        )
    if not (left < right and top < bottom):
        raise InvalidRow(
            f"impossible box: {told!r:.60} has no area as [x0, y0, x1, y1]; if it is [x, y, width, height], "
            "give [x, y, x + width, y + height]"
        )
    return left, top, right, bottom
