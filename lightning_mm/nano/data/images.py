"""Scenes with exact annotations: one to five things, as they are or tinted, or a flag, on a plain colored background.

Categories, names, numbers of things and backgrounds are drawn from shuffled cycles, so that no frequent answer can be
guessed; the hand of a thing is drawn evenly from those that have it.

Data flow: things of one split -> ``SceneComposer`` -> ``SceneImage`` (boxes, background) -> ``questions``;
``SceneImage.draw`` -> pixels.

Shapes: a box is (left, top, right, bottom) in pixels of the image, right and bottom exclusive, tight around the thing.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from lightning_mm.nano.data.catalog import UNASKED, Thing
from lightning_mm.nano.data.colors import BACKGROUNDS, plain_ground, tinted
from lightning_mm.nano.data.cycles import ShuffledCycle

Box = tuple[int, int, int, int]
MAX_THINGS = 5
_SIDES = {1: (0.75, 0.98), 2: (0.36, 0.47), 3: (0.32, 0.42), 4: (0.29, 0.38), 5: (0.27, 0.34)}
"""Number of things -> range of a thing's longest side, as a share of the image's side."""
_LARGE, _SMALL = (0.42, 0.55), (0.18, 0.28)
_PALE = ("white", "grey")
_MIN_CONTRAST = 60.0
"""Least distance in RGB between a background and the mean color of a thing on it."""
_TALLIES = ((1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2), (1, 4), (4, 1))
KINDS = ("single", "crowd", "tally", "gathering", "tinted", "pair")
"""Kinds of scenes, but for flags."""


@dataclass(frozen=True)
class PlacedThing:
    """A thing and its box in the image.

    Args:
        thing: The thing.
        box: Its box.
        tint: Color it is tinted with; None where it is as it was drawn.
        mirrored: Whether left and right are exchanged.
    """

    thing: Thing
    box: Box
    tint: str | None = None
    mirrored: bool = False

    @property
    def color(self) -> str | None:
        """Its tint, or its own dominant color, if it has one."""
        return self.tint or self.thing.color

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]

    @property
    def center(self) -> float:
        """Horizontal center in pixels."""
        return (self.box[0] + self.box[2]) / 2

    @property
    def middle(self) -> float:
        """Vertical center in pixels."""
        return (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, eq=False)
class SceneImage:
    """An image and its annotations.

    Args:
        placed: Every thing in the image.
        background: Name of the background's color.
        kind: One of ``KINDS``, or ``flag`` or ``scene``.
        size: Side of the square image in pixels.
        seed: Random seed of the background's light.
    """

    placed: tuple[PlacedThing, ...]
    background: str
    kind: str
    size: int
    seed: int

    @property
    def target(self) -> Thing:
        """The thing that is counted, or the first one."""
        return self.placed[0].thing

    @property
    def things(self) -> tuple[Thing, ...]:
        """The different things in the image, in the order they were chosen."""
        return tuple(dict.fromkeys(each.thing for each in self.placed))

    def count(self, thing: Thing) -> int:
        """How often a thing occurs in the image."""
        return sum(each.thing is thing for each in self.placed)

    def draw(self) -> Image.Image:
        """The RGB image."""
        picture = plain_ground(BACKGROUNDS[self.background], self.size, random.Random(self.seed))
        for each in self.placed:
            cutout = tinted(each.thing.cutout, each.tint) if each.tint else each.thing.cutout
            cutout = cutout.resize(each.size, Image.Resampling.LANCZOS)
            if each.mirrored:
                cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            picture.paste(cutout, each.box[:2], cutout)
        return picture


class SceneComposer:
    """Chooses things evenly over the categories and composes images of them.

    Things of a category that is asked for come twice as often as others, three times as often where they are alone.

    Args:
        things: Things of one split.
        rng: Random generator of every choice.
        size: Side of an image in pixels.
    """

    def __init__(self, things: Sequence[Thing], rng: random.Random, size: int) -> None:
        self._rng, self._size = rng, size
        self._named: dict[str, dict[str, list[Thing]]] = {}
        for thing in things:
            self._named.setdefault(thing.category, {}).setdefault(thing.name, []).append(thing)
        self._categories = self._category_cycle(2)
        self._alone = self._category_cycle(3)
        self._names = {category: ShuffledCycle(sorted(names), rng) for category, names in self._named.items()}
        self._grounds = ShuffledCycle(sorted(BACKGROUNDS), rng)
        self._tints = ShuffledCycle(sorted(BACKGROUNDS), rng)
        self._copies = ShuffledCycle((*range(1, MAX_THINGS + 1), MAX_THINGS), rng)
        self._tallies = ShuffledCycle(_TALLIES, rng)
        self._tint_single = ShuffledCycle((True, False), rng)
        self._makers: dict[str, Callable[[], SceneImage]] = {
            "single": self.single, "crowd": self.crowd, "tally": self.tally, "gathering": self.gathering,
            "tinted": self.tinted, "pair": self.pair,
        }  # fmt: skip

    def _category_cycle(self, asked: int) -> ShuffledCycle[str]:
        weighted = [name for name in sorted(self._named) for _ in range(1 if name in UNASKED else asked)]
        return ShuffledCycle(weighted, self._rng)

    def make(self, kind: str) -> SceneImage:
        """A scene of a kind of ``KINDS``."""
        return self._makers[kind]()

    def pick(self, *, apart_from: Sequence[Thing] = (), category: str | None = None, countable: bool = False) -> Thing:
        """A thing that shares no group with ``apart_from``, in any of its hands.

        Args:
            apart_from: Things already chosen.
            category: Category of the thing; None takes the categories in turn. Another one is taken where it has none.
            countable: Whether it must be a countable noun.
        """
        groups = {thing.group for thing in apart_from}
        chosen = category or self._categories.draw()
        barred = {
            name
            for name, (thing, *_) in self._named[chosen].items()
            if thing.group in groups or (countable and thing.number != "one")
        }
        if len(barred) == len(self._named[chosen]):
            return self.pick(apart_from=apart_from, countable=countable)
        return self._rng.choice(self._named[chosen][self._names[chosen].draw(avoid=barred)])

    def single(self) -> SceneImage:
        """One large thing, half of them tinted."""
        thing = self.pick(category=self._alone.draw())
        tint = self._tints.draw() if self._tint_single.draw() else None
        return self._compose([thing], "single", tints=[tint])

    def flag(self, flag: Thing) -> SceneImage:
        """One large flag, never mirrored."""
        return self._compose([flag], "flag", turn=False)

    def crowd(self) -> SceneImage:
        """One to five copies of one thing and others beside them: two to five things in all."""
        target = self.pick(countable=True)
        copies = self._copies.draw()
        others = self._rng.randint(1 if copies == 1 else 0, min(2, MAX_THINGS - copies))
        return self._compose([target] * copies + self._different(target, others), "crowd")

    def tally(self) -> SceneImage:
        """Two things, one of them more often than the other: three to five in all."""
        first = self.pick(countable=True)
        second = self.pick(apart_from=[first], countable=True)
        of_first, of_second = self._tallies.draw()
        return self._compose([first] * of_first + [second] * of_second, "tally")

    def gathering(self) -> SceneImage:
        """Two to four different things, one of each."""
        first = self.pick()
        return self._compose([first, *self._different(first, self._rng.randint(1, 3))], "gathering")

    def tinted(self) -> SceneImage:
        """Two to four different things, each in a color of its own."""
        first = self.pick()
        things = [first, *self._different(first, self._rng.randint(1, 3))]
        tints: list[str | None] = []
        for _ in things:
            barred = _PALE if any(tint in _PALE for tint in tints) else ()
            tints.append(self._tints.draw(avoid=[*(tint for tint in tints if tint), *barred]))
        return self._compose(things, "tinted", tints=tints)

    def pair(self) -> SceneImage:
        """A large and a small thing, one left of the other."""
        first = self.pick()
        things = [first, *self._different(first, 1)]
        while True:
            image = self._compose(things, "pair", sides=[_LARGE, _SMALL])
            one, other = image.placed
            if one.box[2] <= other.box[0] or other.box[2] <= one.box[0]:
                return image

    def scene(self, things: Sequence[Thing]) -> SceneImage:
        """The given things, sized as in a scene of at least two."""
        return self._compose(things, "scene", sides=[_SIDES[max(2, len(things))]] * len(things))

    def _different(self, first: Thing, count: int) -> list[Thing]:
        chosen = [first]
        for _ in range(count):
            chosen.append(self.pick(apart_from=chosen))
        return chosen[1:]

    def _compose(
        self,
        things: Sequence[Thing],
        kind: str,
        *,
        turn: bool = True,
        tints: Sequence[str | None] | None = None,
        sides: Sequence[tuple[float, float]] | None = None,
    ) -> SceneImage:
        """Choose a background in a color of none of the things, then a size and a place for each."""
        tints = tints or [None] * len(things)
        background = self._grounds.draw(avoid=_too_alike(things, tints))
        ranges = sides or [_SIDES[len(things)]] * len(things)
        boxes = self._places(
            [self._scaled(thing.cutout.size, side) for thing, side in zip(things, ranges, strict=True)]
        )
        placed = tuple(
            PlacedThing(thing, box, tint, turn and self._rng.random() < 0.5)
            for thing, box, tint in zip(things, boxes, tints, strict=True)
        )
        return SceneImage(placed, background, kind, self._size, self._rng.randrange(2**32))

    def _scaled(self, size: tuple[int, int], side: tuple[float, float]) -> tuple[int, int]:
        scale = self._rng.uniform(*side) * self._size / max(size)
        return max(4, round(size[0] * scale)), max(4, round(size[1] * scale))

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


def _too_alike(things: Sequence[Thing], tints: Sequence[str | None]) -> set[str]:
    """Names of backgrounds that one of the things would not stand out from."""
    names = {tint or thing.color for thing, tint in zip(things, tints, strict=True)}
    barred = {name for name in BACKGROUNDS if name in names or (name in _PALE and names & set(_PALE))}
    for thing, tint in zip(things, tints, strict=True):
        if tint is None:
            barred |= {name for name, color in BACKGROUNDS.items() if math.dist(color, thing.mean) < _MIN_CONTRAST}
    assert len(barred) < len(BACKGROUNDS), f"no background for {[thing.key for thing in things]}"
    return barred


def _boxes_touch(a: Box, b: Box, gap: int = 2) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap
