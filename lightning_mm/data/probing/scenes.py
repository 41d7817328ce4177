"""What is known about one picture: a caption, captions that are wrong about it, the things in it and where they are.

Data flow: a checked ``Sample`` with the keys that its row held beside the conversation -> ``scene`` -> ``drawing``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mm.data.probing.descriptions import description
from lightning_mm.data.rows import BadRow
from lightning_mm.data.sample import IMAGE_MARK, Sample

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


class Unused(ValueError):
    """Why a sound row says nothing that a probe could ask."""


def scene(sample: Sample) -> Scene:
    """What a row knows about its picture.

    Raises:
        BadRow: What it says cannot be so.
        Unused: It is a conversation that tells nothing that can be asked.
    """
    if len(sample.images) != 1:
        raise Unused("rows without exactly one picture")
    told = sample.extra
    captions = _captions(told.get("caption"), "caption")
    false_captions = _captions(told.get("false_captions", told.get("caption_swapped")), "false_captions")
    objects = _objects(told.get("objects", told.get("boxes")))
    captions = captions or description(sample)
    if not captions and objects is None:
        raise Unused("rows with neither caption nor objects")
    if set(map(str.casefold, captions)) & set(map(str.casefold, false_captions)):
        raise BadRow("false caption is the true one: the same text is in 'caption' and in 'false_captions'")
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
            raise BadRow(f"wrong type: {key!r} is {text!r:.40}, not text")
        if IMAGE_MARK in text:
            raise BadRow(f"misplaced image mark: {IMAGE_MARK} in {key!r}")
        captions.append(" ".join(text.split()))
    return tuple(captions)


def _objects(told: object) -> tuple[SceneObject, ...] | None:
    if told is None:
        return None
    if not isinstance(told, list) or not all(isinstance(each, dict) for each in told):
        raise BadRow(f"wrong type: objects are {told!r:.40}, not a list of objects")
    return tuple(_object(each) for each in told)


def _object(told: Mapping[str, Any]) -> SceneObject:
    named = ((level, told.get(level)) for level in LEVELS)
    kinds = {level: " ".join(name.split()) for level, name in named if isinstance(name, str) and name.strip()}
    if "name" not in kinds:
        raise BadRow(f"object without a name: {dict(told)!r:.80}")
    return SceneObject(kinds, None if told.get("box") is None else _box(told["box"]))


def _box(told: object) -> Box:
    edges = told if isinstance(told, list | tuple) else ()
    if len(edges) != 4 or not all(isinstance(e, int | float) and math.isfinite(e) for e in edges):
        raise BadRow(f"impossible box: {told!r:.60} is not [x0, y0, x1, y1] in pixels")
    left, top, right, bottom = map(float, edges)
    if max(edges) <= 1:
        raise BadRow(
            f"normalised box: {told!r:.60} ends within the first pixel; it is [x0, y0, x1, y1] in pixels: "
            "multiply by the picture's width and height"
        )
    if not (left < right and top < bottom):
        raise BadRow(
            f"impossible box: {told!r:.60} has no area as [x0, y0, x1, y1]; if it is [x, y, width, height], "
            "give [x, y, x + width, y + height]"
        )
    return left, top, right, bottom
