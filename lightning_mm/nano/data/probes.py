"""Pictures to look inside a model with: scenes of known things, made in pairs that trade a noun.

Data flow: a Stock of things comes in; rows with ``caption``, ``caption_swapped``, ``boxes`` and ``group``, and their
pictures, go to ``build``.

The two pictures of a pair show as many things in the same arrangement, and nothing alike. The wrong caption of each is
its own with one thing of the other's in it: over the pair every word is as often right as wrong, so a caption's words
tell nothing. One thing alone stands left or right of the middle, as often the one as the other.
"""

import random
from collections.abc import Iterator, Sequence

from lightning_mm.nano.data.catalog import OTHER, Thing
from lightning_mm.nano.data.images import Deck, Picture, Studio
from lightning_mm.nano.data.questions import Question, answer, counted, listed, noun
from lightning_mm.nano.data.rows import Row, Stock, made_row

ARRANGEMENTS = ((1,), (1,), (1,), (1,), (1, 1), (1, 1), (2,), (1, 1, 1), (2, 1), (2, 1, 1))
"""How often each thing of a picture stands in it: two fifths of the pictures show one thing."""
ASIDE = 0.12
"""How far off the middle one thing alone stands at least, as a share of the picture's side."""
_QUESTION = "Which things are in this picture?"


def probe_rows(stock: Stock, count: int, seed: int, size: int) -> Iterator[tuple[Row, Picture]]:
    """``count`` pictures, two and two.

    Args:
        stock: Things that may be drawn; those of no category are not.
        count: An even number.
        seed: Of the whole build.
        size: Side of a picture, in pixels.
    """
    assert count % 2 == 0
    rng = random.Random(f"{seed}:probes")
    maker = _Maker([thing for thing in stock.things if thing.category != OTHER], rng, size)
    for number in range(0, count, 2):
        for place, (question, picture) in enumerate(maker.pair()):
            row = made_row("probes", number + place, picture, [question])
            yield {**row, "group": f"pair-{number // 2:05d}"}, picture


class _Maker:
    """Makes pairs; every choice is dealt evenly."""

    def __init__(self, things: Sequence[Thing], rng: random.Random, size: int) -> None:
        self._rng, self._size = rng, size
        self._studio = Studio(things, rng, size)
        self._arrangements = Deck(ARRANGEMENTS, rng)
        self._sides, self._alike = Deck((True, False), rng), Deck((True, False), rng)

    def pair(self) -> list[tuple[Question, Picture]]:
        """Two pictures, each with its caption and the wrong one in which a thing is the other's."""
        copies = self._arrangements.draw()
        at = self._rng.randrange(len(copies))
        one = self._cast(copies, [], {})
        category = {at: one[at].category} if self._alike.draw() else {}
        casts = [one, self._cast(copies, one, category)]
        pictures = [self._picture(cast, copies) for cast in casts]
        phrases = [
            [counted(thing.name, thing.number, n) for thing, n in zip(cast, copies, strict=True)] for cast in casts
        ]
        made = []
        for number, picture in enumerate(pictures):
            right, wrong = list(phrases[number]), list(phrases[number])
            wrong[at] = phrases[1 - number][at]
            caption, swapped = (
                f"{listed(said)} on {noun(f'{picture.background} background')}" for said in (right, wrong)
            )
            extra = {"caption": caption, "caption_swapped": swapped}
            made.append((Question("caption", _QUESTION, answer(caption), extra), picture))
        return made

    def _cast(self, copies: Sequence[int], others: Sequence[Thing], categories: dict[int, str]) -> list[Thing]:
        """Different things for an arrangement, unlike those of ``others``."""
        chosen: list[Thing] = []
        for place, count in enumerate(copies):
            apart = [*others, *chosen]
            category = categories.get(place)
            chosen.append(self._studio.pick(apart_from=apart, category=category, countable=count > 1))
        return chosen

    def _picture(self, cast: Sequence[Thing], copies: Sequence[int]) -> Picture:
        things = [thing for thing, count in zip(cast, copies, strict=True) for _ in range(count)]
        if len(things) > 1:
            return self._studio.scene(things)
        left = self._sides.draw()
        while True:
            picture = self._studio.scene(things)
            off = picture.placed[0].centre / self._size - 0.5
            if abs(off) >= ASIDE and (off < 0) == left:
                return picture
