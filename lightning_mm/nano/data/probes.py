"""Rows of probes.json: scenes in pairs whose captions exchange one noun, for probing hidden states.

The two images of a pair show equally many things in the same arrangement, and nothing in common. The false caption of
each is its own with one thing of the other's: over the pair every word is as often true as false, so words alone do not
give the label away. A thing that is alone is left or right of the center, equally often.

Data flow: things of val -> rows with ``caption``, ``caption_swapped``, ``boxes`` and ``group``, and images ->
``build``.
"""

import random
from collections.abc import Iterator, Sequence

from lightning_mm.nano.data.catalog import OTHER, Thing
from lightning_mm.nano.data.cycles import ShuffledCycle
from lightning_mm.nano.data.images import SceneComposer, SceneImage
from lightning_mm.nano.data.questions import QuestionAnswer, count_phrase, format_answer, join_phrases, with_article
from lightning_mm.nano.data.rows import Made, make_row

ARRANGEMENTS = ((1,), (1,), (1,), (1,), (1, 1), (1, 1), (2,), (1, 1, 1), (2, 1), (2, 1, 1))
"""Copies of each thing in an image; two fifths of the images show one thing."""
MIN_OFFSET = 0.12
"""Minimum horizontal offset of a single thing from the center, as a share of the image's side."""
_QUESTION = "Which things are in this picture?"


def probe_rows(things: Sequence[Thing], count: int, seed: int, size: int) -> Iterator[Made]:
    """``count`` rows and their images, pair by pair.

    Args:
        things: Things that may be shown; those of no category are left out.
        count: Number of images, even.
        seed: Random seed of the whole build.
        size: Side of an image in pixels.
    """
    assert count % 2 == 0
    rng = random.Random(f"{seed}:probes")
    maker = _PairGenerator([thing for thing in things if thing.category != OTHER], rng, size)
    for number in range(0, count, 2):
        for place, (question, image) in enumerate(maker.pair()):
            name = f"probes-{number + place:05d}"
            row = make_row(name, name, image, question)
            yield {**row, "group": f"pair-{number // 2:05d}"}, image


class _PairGenerator:
    """Generates pairs; every choice is balanced."""

    def __init__(self, things: Sequence[Thing], rng: random.Random, size: int) -> None:
        self._rng, self._size = rng, size
        self._composer = SceneComposer(things, rng, size)
        self._arrangements = ShuffledCycle(ARRANGEMENTS, rng)
        self._sides, self._alike = ShuffledCycle((True, False), rng), ShuffledCycle((True, False), rng)

    def pair(self) -> list[tuple[QuestionAnswer, SceneImage]]:
        """Two images, each with its caption and the false caption that has one thing of the other image."""
        copies = self._arrangements.draw()
        at = self._rng.randrange(len(copies))
        one = self._cast(copies, [], {})
        category = {at: one[at].category} if self._alike.draw() else {}
        casts = [one, self._cast(copies, one, category)]
        images = [self._image(cast, copies) for cast in casts]
        phrases = [
            [count_phrase(thing.name, thing.number, n) for thing, n in zip(cast, copies, strict=True)] for cast in casts
        ]
        made = []
        for number, image in enumerate(images):
            right, wrong = list(phrases[number]), list(phrases[number])
            wrong[at] = phrases[1 - number][at]
            caption, swapped = (
                f"{join_phrases(said)} on {with_article(f'{image.background} background')}" for said in (right, wrong)
            )
            extra = {"caption": caption, "caption_swapped": swapped}
            made.append((QuestionAnswer("caption", _QUESTION, format_answer(caption), extra=extra), image))
        return made

    def _cast(self, copies: Sequence[int], others: Sequence[Thing], categories: dict[int, str]) -> list[Thing]:
        """Different things for an arrangement, none sharing a group with ``others``."""
        chosen: list[Thing] = []
        for place, count in enumerate(copies):
            apart = [*others, *chosen]
            category = categories.get(place)
            chosen.append(self._composer.pick(apart_from=apart, category=category, countable=count > 1))
        return chosen

    def _image(self, cast: Sequence[Thing], copies: Sequence[int]) -> SceneImage:
        things = [thing for thing, count in zip(cast, copies, strict=True) for _ in range(count)]
        if len(things) > 1:
            return self._composer.scene(things)
        left = self._sides.draw()
        while True:
            image = self._composer.scene(things)
            off = image.placed[0].center / self._size - 0.5
            if abs(off) >= MIN_OFFSET and (off < 0) == left:
                return image
