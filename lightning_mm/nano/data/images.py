"""Scenes with exact annotations: one thing, two to five things, or a flag, on a plain colored background.

Categories, answers and backgrounds are drawn from shuffled cycles, so that no frequent answer can be guessed.

Data flow: things of one split -> ``SceneComposer`` -> ``SceneImage`` (pixels, boxes, background) -> ``questions``.
``openmoji`` and ``tuxpaint`` use ``dominant_color`` of a cut-out.

Shapes: a box is (left, top, right, bottom) in pixels of the image, right and bottom exclusive, tight around the thing;
RGB in 0..255; hue in degrees; saturation and value in 0..1.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from lightning_mm.nano.data.catalog import UNASKED, Thing

BACKGROUNDS = {
    "red": (214, 62, 56), "orange": (242, 146, 44), "yellow": (250, 224, 92), "green": (104, 182, 92), "blue": (92,
    156, 224), "purple": (146, 104, 190), "pink": (246, 166, 198), "brown": (146, 102, 68), "grey": (160, 160, 160),
    "white": (250, 250, 250),
}  # fmt: skip
_HUES = (  # 38 to 48 degrees is ambiguous between yellow and orange: no name
    ("red", 0, 12), ("orange", 16, 38), ("yellow", 48, 64), ("green", 68, 165),
    ("blue", 190, 240), ("purple", 255, 300), ("pink", 305, 340), ("red", 352, 360),
)  # fmt: skip


def dominant_color(cutout: Image.Image, *, share: float = 0.75) -> str | None:
    """The color name that covers at least ``share`` of a cut-out, or None.

    Args:
        cutout: RGBA image; nearly black pixels (the outline) are not counted.
        share: Minimum fraction of the opaque pixels with this color, 0 to 1.
    """
    rgba = np.asarray(cutout)
    solid = rgba[..., 3] > 200
    hsv = np.asarray(cutout.convert("RGB").convert("HSV"), dtype=np.float64)[solid] / 255.0
    hsv = hsv[hsv[:, 2] > 0.2]
    if len(hsv) < 50:
        return None
    names = _color_names(hsv[:, 0] * 360.0, hsv[:, 1], hsv[:, 2])
    best, count = max(((name, int((names == name).sum())) for name in BACKGROUNDS), key=lambda pair: pair[1])
    return best if count >= share * len(hsv) else None


def _color_names(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Color name per pixel; an empty string where the name is ambiguous."""
    names = np.full(hue.shape, "", dtype="<U6")
    for name, low, high in _HUES:
        names[(hue >= low) & (hue < high)] = name
    names[(hue >= 12) & (hue < 48) & (value < 0.72)] = "brown"
    reddish = (hue >= 330) | (hue < 8)
    names[reddish & (saturation < 0.6) & (value > 0.85)] = "pink"
    names[saturation < 0.12] = ""  # ambiguous between grey and white
    names[(saturation < 0.12) & (value >= 0.35) & (value < 0.75)] = "grey"
    names[(saturation < 0.08) & (value > 0.94)] = "white"
    return names


Item = TypeVar("Item")


class ShuffledCycle(Generic[Item]):
    """Draws items in a seeded random order, each once before any is drawn again.

    Args:
        items: The items.
        rng: Random generator of the order.
    """

    def __init__(self, items: Sequence[Item], rng: random.Random) -> None:
        assert items
        self._items, self._rng = tuple(items), rng
        self._left: list[Item] = []

    def draw(self, avoid: Sequence[Item] = ()) -> Item:
        """The next item that is not in ``avoid``; skipped items stay next in order."""
        if not any(item not in avoid for item in self._left):
            fresh = list(self._items)
            self._rng.shuffle(fresh)
            self._left = fresh + self._left
        for i in reversed(range(len(self._left))):
            if self._left[i] not in avoid:
                return self._left.pop(i)
        raise AssertionError(f"every item of {self._items} is avoided")


Box = tuple[int, int, int, int]
MAX_THINGS = 5
_SIDES = {1: (0.75, 0.98), 2: (0.36, 0.47), 3: (0.32, 0.42), 4: (0.29, 0.38), 5: (0.27, 0.34)}
"""Number of things -> range of a thing's longest side, as a share of the image's side."""


@dataclass(frozen=True)
class PlacedThing:
    """A thing and its box in the image."""

    thing: Thing
    box: Box

    @property
    def center(self) -> float:
        """Horizontal center in pixels."""
        return (self.box[0] + self.box[2]) / 2


@dataclass(frozen=True, eq=False)
class SceneImage:
    """An image and its annotations.

    Args:
        pixels: RGB image, square.
        placed: Every thing in the image.
        background: Name of the background's color.
        kind: ``single``, ``scene`` or ``flag``.
        target: The thing that is counted, or the first one.
    """

    pixels: Image.Image
    placed: tuple[PlacedThing, ...]
    background: str
    kind: str
    target: Thing

    @property
    def things(self) -> tuple[Thing, ...]:
        """The different things in the image, in the order they were chosen."""
        return tuple(dict.fromkeys(each.thing for each in self.placed))

    def count(self, thing: Thing) -> int:
        """How often a thing occurs in the image."""
        return sum(each.thing is thing for each in self.placed)


class SceneComposer:
    """Chooses things evenly over the categories and composes images of them.

    Args:
        things: Things of one split.
        rng: Random generator of every choice.
        size: Side of an image in pixels.
    """

    def __init__(self, things: Sequence[Thing], rng: random.Random, size: int) -> None:
        self.things, self._rng, self._size = tuple(things), rng, size
        by_category: dict[str, list[Thing]] = {}
        for thing in things:
            by_category.setdefault(thing.category, []).append(thing)
        self._categories = ShuffledCycle(sorted(by_category), rng)
        self._decks = {category: ShuffledCycle(members, rng) for category, members in by_category.items()}
        self._grounds = ShuffledCycle(sorted(BACKGROUNDS), rng)
        self._copies = ShuffledCycle(range(1, MAX_THINGS + 1), rng)

    def pick(self, *, apart_from: Sequence[Thing] = (), category: str | None = None, countable: bool = False) -> Thing:
        """A thing that shares no group with ``apart_from``.

        Args:
            apart_from: Things already chosen.
            category: Category of the thing; None takes the categories in turn.
            countable: Whether it must be a countable noun.
        """
        groups = {thing.group for thing in apart_from}
        chosen = category or self._categories.draw()
        barred = [thing for thing in self.things if thing.group in groups or (countable and thing.number != "one")]
        if all(thing in barred for thing in self.things if thing.category == chosen):
            return self.pick(apart_from=apart_from, countable=countable)
        return self._decks[chosen].draw(avoid=barred)

    def single(self, *, with_category: bool = False) -> SceneImage:
        """One large thing; ``with_category`` leaves out things whose category is never asked for."""
        category = self._categories.draw(avoid=UNASKED if with_category else ())
        thing = self.pick(category=category)
        return self._compose([thing], "single", turn=True)

    def flag(self) -> SceneImage:
        """One large flag, never mirrored."""
        return self._compose([self.pick()], "flag", turn=False)

    def crowd(self) -> SceneImage:
        """One to five copies of one thing and others beside them: two to five things in all."""
        target = self.pick(countable=True)
        copies = self._copies.draw()
        others = self._rng.randint(1 if copies == 1 else 0, min(2, MAX_THINGS - copies))
        return self._compose([target] * copies + self._different(target, others), "scene", turn=True)

    def gathering(self, *, most: int = 4) -> SceneImage:
        """Two to ``most`` different things, one of each."""
        first = self.pick()
        return self._compose([first, *self._different(first, self._rng.randint(1, most - 1))], "scene", turn=True)

    def scene(self, things: Sequence[Thing]) -> SceneImage:
        """The given things, sized as in a scene of at least two."""
        return self._compose(things, "scene", turn=True, sides=_SIDES[max(2, len(things))])

    def _different(self, first: Thing, count: int) -> list[Thing]:
        chosen = [first]
        for _ in range(count):
            chosen.append(self.pick(apart_from=chosen))
        return chosen[1:]

    def _compose(
        self, things: Sequence[Thing], kind: str, *, turn: bool, sides: tuple[float, float] | None = None
    ) -> SceneImage:
        """Draw a background in a color of none of the things, then each thing at a random size and place."""
        own = {thing.color for thing in things} if turn else set()
        background = self._grounds.draw(avoid=[name for name in BACKGROUNDS if name in own])
        pixels = _background(BACKGROUNDS[background], self._size, self._rng)
        cutouts = [self._sized(thing, sides or _SIDES[len(things)], turn) for thing in things]
        boxes = self._places([cutout.size for cutout in cutouts])
        for cutout, box in zip(cutouts, boxes, strict=True):
            pixels.paste(cutout, box[:2], cutout)
        placed = tuple(PlacedThing(thing, box) for thing, box in zip(things, boxes, strict=True))
        return SceneImage(pixels, placed, background, kind, things[0])

    def _sized(self, thing: Thing, sides: tuple[float, float], turn: bool) -> Image.Image:
        cutout = thing.cutout
        side = self._rng.uniform(*sides) * self._size
        scale = side / max(cutout.size)
        width, height = (max(1, round(length * scale)) for length in cutout.size)
        cutout = cutout.resize((width, height), Image.Resampling.LANCZOS)
        mirrored = turn and self._rng.random() < 0.5
        return cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else cutout

    def _places(self, sizes: Sequence[tuple[int, int]]) -> list[Box]:
        """A box for each size, none touching another, by rejection sampling."""
        for _ in range(1000):
            boxes: list[Box] = []
            for width, height in sizes:
                for _ in range(30):
                    left, top = self._rng.randint(0, self._size - width), self._rng.randint(0, self._size - height)
                    box = (left, top, left + width, top + height)
                    if not any(_boxes_touch(box, other) for other in boxes):
                        boxes.append(box)
                        break
                else:
                    break
            if len(boxes) == len(sizes):
                return boxes
        raise AssertionError(f"no place for things of sizes {sizes} in {self._size} pixels")


def _boxes_touch(a: Box, b: Box, gap: int = 2) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def _background(color: tuple[int, int, int], size: int, rng: random.Random) -> Image.Image:
    """A plain color that darkens slightly in one of four directions; the hue does not change."""
    base = np.array(color, dtype=np.float64) * rng.uniform(0.97, 1.02)
    light = np.linspace(1.0, rng.uniform(0.92, 1.0), size)[:, None].repeat(size, axis=1)
    light = np.rot90(light, rng.randrange(4))
    return Image.fromarray(np.minimum(np.round(base * light[..., None]), 255).astype(np.uint8), "RGB")
