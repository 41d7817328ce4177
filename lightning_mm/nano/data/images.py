"""Pictures with known truth: one thing, a scene of two to five, or a flag, on a plain coloured ground.

Data flow: Things of one split come in; a Picture (pixels, boxes, ground colour) goes to ``questions``.
Legend: a box is (left, top, right, bottom) in pixels of the picture, right and bottom exclusive; it is tight around
what is drawn.

Names for colours: of a background, which we choose, and of a thing, where one colour clearly dominates it.

Data flow: ``openmoji``/``stamps`` ask for the dominant colour of a cut-out; ``studio`` draws backgrounds from
``BACKGROUNDS``.
Legend: RGB in 0..255; hue in degrees; saturation and value in 0..1.

Draws that come out even: a shuffled deck, dealt to the end before it is shuffled again.

Data flow: ``studio``, ``questions`` and ``flags`` draw categories, answers and colours from decks, so no answer can
be had by guessing the most frequent one.
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
_HUES = (  # between 38 and 48 degrees people say yellow and orange alike: such pixels get no name
    ("red", 0, 12), ("orange", 16, 38), ("yellow", 48, 64), ("green", 68, 165),
    ("blue", 190, 240), ("purple", 255, 300), ("pink", 305, 340), ("red", 352, 360),
)  # fmt: skip


def dominant_colour(cutout: Image.Image, *, share: float = 0.75) -> str | None:
    """The colour name that covers at least ``share`` of a cut-out, its black outline left out; None where there is
    none.

    Args:
        cutout: RGBA.
        share: Fraction of the opaque, not nearly black pixels that must bear the name.
    """
    rgba = np.asarray(cutout)
    solid = rgba[..., 3] > 200
    hsv = np.asarray(cutout.convert("RGB").convert("HSV"), dtype=np.float64)[solid] / 255.0
    hsv = hsv[hsv[:, 2] > 0.2]
    if len(hsv) < 50:
        return None
    names = _named(hsv[:, 0] * 360.0, hsv[:, 1], hsv[:, 2])
    best, count = max(((name, int((names == name).sum())) for name in BACKGROUNDS), key=lambda pair: pair[1])
    return best if count >= share * len(hsv) else None


def _named(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Colour name per pixel; an empty string where people would not agree."""
    names = np.full(hue.shape, "", dtype="<U6")
    for name, low, high in _HUES:
        names[(hue >= low) & (hue < high)] = name
    names[(hue >= 12) & (hue < 48) & (value < 0.72)] = "brown"
    reddish = (hue >= 330) | (hue < 8)
    names[reddish & (saturation < 0.6) & (value > 0.85)] = "pink"
    names[saturation < 0.12] = ""  # between grey and white people differ
    names[(saturation < 0.12) & (value >= 0.35) & (value < 0.75)] = "grey"
    names[(saturation < 0.08) & (value > 0.94)] = "white"
    return names


Card = TypeVar("Card")


class Deck(Generic[Card]):
    """Deals its cards in a seeded order, all of them before any comes twice."""

    def __init__(self, cards: Sequence[Card], rng: random.Random) -> None:
        assert cards
        self._cards, self._rng = tuple(cards), rng
        self._left: list[Card] = []

    def draw(self, avoid: Sequence[Card] = ()) -> Card:
        """The next card that is not in ``avoid``; the cards passed over stay on top."""
        if not any(card not in avoid for card in self._left):
            fresh = list(self._cards)
            self._rng.shuffle(fresh)
            self._left = fresh + self._left
        for i in reversed(range(len(self._left))):
            if self._left[i] not in avoid:
                return self._left.pop(i)
        raise AssertionError(f"every card of {self._cards} is avoided")


Box = tuple[int, int, int, int]
MAX_THINGS = 5
_SIDES = {1: (0.75, 0.98), 2: (0.36, 0.47), 3: (0.32, 0.42), 4: (0.29, 0.38), 5: (0.27, 0.34)}
"""Longest side of a thing, as a share of the picture's, by how many there are."""


@dataclass(frozen=True)
class Placed:
    """A thing where it stands."""

    thing: Thing
    box: Box

    @property
    def centre(self) -> float:
        """Horizontal centre, in pixels."""
        return (self.box[0] + self.box[2]) / 2


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels and the whole truth about them.

    Args:
        pixels: RGB, square.
        placed: Every thing in it.
        background: Name of the ground's colour.
        kind: ``single``, ``scene`` or ``flag``.
        target: The thing that was multiplied to be counted, or the single one.
    """

    pixels: Image.Image
    placed: tuple[Placed, ...]
    background: str
    kind: str
    target: Thing

    @property
    def things(self) -> tuple[Thing, ...]:
        """The different things in it, in the order they were chosen."""
        return tuple(dict.fromkeys(each.thing for each in self.placed))

    def count(self, thing: Thing) -> int:
        """How many times a thing stands in it."""
        return sum(each.thing is thing for each in self.placed)


class Studio:
    """Chooses things evenly over the categories and draws them.

    Args:
        things: Those of one split.
        rng: Every choice is drawn from it.
        size: Side of a picture, in pixels.
    """

    def __init__(self, things: Sequence[Thing], rng: random.Random, size: int) -> None:
        self.things, self._rng, self._size = tuple(things), rng, size
        by_category: dict[str, list[Thing]] = {}
        for thing in things:
            by_category.setdefault(thing.category, []).append(thing)
        self._categories = Deck(sorted(by_category), rng)
        self._decks = {category: Deck(members, rng) for category, members in by_category.items()}
        self._grounds = Deck(sorted(BACKGROUNDS), rng)
        self._copies = Deck(range(1, MAX_THINGS + 1), rng)

    def pick(self, *, apart_from: Sequence[Thing] = (), category: str | None = None, countable: bool = False) -> Thing:
        """A thing of a category (dealt evenly unless given) that shares no group with ``apart_from``."""
        groups = {thing.group for thing in apart_from}
        chosen = category or self._categories.draw()
        barred = [thing for thing in self.things if thing.group in groups or (countable and thing.number != "one")]
        if all(thing in barred for thing in self.things if thing.category == chosen):
            return self.pick(apart_from=apart_from, countable=countable)
        return self._decks[chosen].draw(avoid=barred)

    def single(self, *, with_category: bool = False) -> Picture:
        """One thing, large; ``with_category`` leaves out things whose category is not asked for."""
        category = self._categories.draw(avoid=UNASKED if with_category else ())
        thing = self.pick(category=category)
        return self._compose([thing], "single", turn=True)

    def flag(self) -> Picture:
        """One thing, large and never mirrored."""
        return self._compose([self.pick()], "flag", turn=False)

    def crowd(self) -> Picture:
        """One to five of one thing, and others beside it: two to five in all."""
        target = self.pick(countable=True)
        copies = self._copies.draw()
        others = self._rng.randint(1 if copies == 1 else 0, min(2, MAX_THINGS - copies))
        return self._compose([target] * copies + self._different(target, others), "scene", turn=True)

    def gathering(self, *, most: int = 4) -> Picture:
        """Two to ``most`` different things, one of each."""
        first = self.pick()
        return self._compose([first, *self._different(first, self._rng.randint(1, most - 1))], "scene", turn=True)

    def scene(self, things: Sequence[Thing]) -> Picture:
        """These things, each as large as in a scene of two or more."""
        return self._compose(things, "scene", turn=True, sides=_SIDES[max(2, len(things))])

    def _different(self, first: Thing, count: int) -> list[Thing]:
        chosen = [first]
        for _ in range(count):
            chosen.append(self.pick(apart_from=chosen))
        return chosen[1:]

    def _compose(
        self, things: Sequence[Thing], kind: str, *, turn: bool, sides: tuple[float, float] | None = None
    ) -> Picture:
        """Draw: a ground that no thing is of the colour of, then each thing at its own size, place and side."""
        own = {thing.colour for thing in things} if turn else set()
        background = self._grounds.draw(avoid=[name for name in BACKGROUNDS if name in own])
        pixels = _ground(BACKGROUNDS[background], self._size, self._rng)
        cutouts = [self._sized(thing, sides or _SIDES[len(things)], turn) for thing in things]
        boxes = self._places([cutout.size for cutout in cutouts])
        for cutout, box in zip(cutouts, boxes, strict=True):
            pixels.paste(cutout, box[:2], cutout)
        placed = tuple(Placed(thing, box) for thing, box in zip(things, boxes, strict=True))
        return Picture(pixels, placed, background, kind, things[0])

    def _sized(self, thing: Thing, sides: tuple[float, float], turn: bool) -> Image.Image:
        cutout = thing.cutout
        side = self._rng.uniform(*sides) * self._size
        scale = side / max(cutout.size)
        width, height = (max(1, round(length * scale)) for length in cutout.size)
        cutout = cutout.resize((width, height), Image.Resampling.LANCZOS)
        mirrored = turn and self._rng.random() < 0.5
        return cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else cutout

    def _places(self, sizes: Sequence[tuple[int, int]]) -> list[Box]:
        """A place for each, none touching another: thrown at random until all fit."""
        for _ in range(1000):
            boxes: list[Box] = []
            for width, height in sizes:
                for _ in range(30):
                    left, top = self._rng.randint(0, self._size - width), self._rng.randint(0, self._size - height)
                    box = (left, top, left + width, top + height)
                    if not any(_touch(box, other) for other in boxes):
                        boxes.append(box)
                        break
                else:
                    break
            if len(boxes) == len(sizes):
                return boxes
        raise AssertionError(f"no place for things of sizes {sizes} in {self._size} pixels")


def _touch(a: Box, b: Box, gap: int = 2) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def _ground(colour: tuple[int, int, int], size: int, rng: random.Random) -> Image.Image:
    """A plain colour that darkens a little in one of four directions; its hue stays, so its name does."""
    base = np.array(colour, dtype=np.float64) * rng.uniform(0.97, 1.02)
    light = np.linspace(1.0, rng.uniform(0.92, 1.0), size)[:, None].repeat(size, axis=1)
    light = np.rot90(light, rng.randrange(4))
    return Image.fromarray(np.minimum(np.round(base * light[..., None]), 255).astype(np.uint8), "RGB")
