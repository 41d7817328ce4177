"""Questions about a scene whose answers follow from its boxes, and their English phrasing.

Wrong things to ask about come from the same split as right ones, half of them from the category of a shown thing, so
that neither a name nor a category gives the answer away. What has two answers is asked for each equally often.

Data flow: ``SceneImage`` -> ``QuestionGenerator.ask`` -> ``QuestionAnswer`` -> ``rows``.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lightning_mm.data.english import COUNT_WORDS, plural
from lightning_mm.nano.data.catalog import Number, Thing
from lightning_mm.nano.data.colors import BACKGROUNDS
from lightning_mm.nano.data.cycles import ShuffledCycle
from lightning_mm.nano.data.images import MAX_THINGS, PlacedThing, SceneComposer, SceneImage


def with_article(name: str, number: Number = "one") -> str:
    """The name with its article, where it takes one: "a cat", "an hourglass", "bread", "grapes"."""
    if number != "one":
        return name
    return f"{'an' if name[0] in 'aeiou' or name.startswith('hour') else 'a'} {name}"


def count_phrase(name: str, number: Number, count: int) -> str:
    """Noun phrase for ``count`` of a thing: "a cat", "three cats", "bread"."""
    return with_article(name, number) if count == 1 else f"{COUNT_WORDS[count]} {plural(name)}"


def join_phrases(phrases: Sequence[str]) -> str:
    """Phrases joined as in "a cat, a dog and an apple"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def format_answer(phrase: str) -> str:
    """The phrase with a capital first letter and a full stop."""
    return phrase[0].upper() + phrase[1:] + "."


CATEGORY_PHRASES = {
    "animal": "an animal",
    "food": "food",
    "vehicle": "a vehicle",
    "household": "a household object",
}
"""Categories that are asked for, with their phrase: those with enough things for a meaningful held-out score."""
_ONE = {name: format_answer(said.removeprefix("an ").removeprefix("a ")) for name, said in CATEGORY_PHRASES.items()}
# Without the article: half of the answers would begin alike, and greedy decoding would prefer those.
_SEVERAL = {"animal": "Animals.", "food": "Food.", "vehicle": "Vehicles.", "household": "Household objects."}
_CHOICES = "an animal, food, a vehicle or a household object"
_COLORS = tuple(format_answer(color) for color in sorted(BACKGROUNDS))
_YES_NO = ("Yes.", "No.")
_NUMBERS = tuple(format_answer(word) for word in COUNT_WORDS[1 : MAX_THINGS + 1])

ANSWERS: Mapping[str, tuple[str, ...]] = {
    "caption": (),
    "category": tuple(f"{number} {name}" for number in ("one", "several") for name in CATEGORY_PHRASES),
    "colour": _COLORS,
    "colour_bg": _COLORS,
    "count": _NUMBERS,
    "count_all": _NUMBERS[1:],
    "left_right": ("Left.", "Right."),
    "above_below": ("Above.", "Below."),
    "presence": _YES_NO,
    "yes_no": _YES_NO,
    "side_category": tuple(_ONE.values()),
    "side_colour": _COLORS,
    "bind_colour": _COLORS,
    "compare_count": ("first", "second"),
    "compare_size": ("Larger.", "Smaller."),
    "caption_match": _YES_NO,
}
"""Question type -> its answers, equally often asked for; none where the answer is a name. ``compare_count`` is answered
by the thing that the question names first or second, ``category`` of one thing or several."""
NAME_FREE = ("category", "colour_bg", "count_all", "side_category", "side_colour", "compare_size")
"""Question types that no thing's name is needed for."""
TYPES_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "single": ("caption", "yes_no", "colour_bg", "category", "colour"),
    "crowd": ("count", "count_all", "colour_bg", "category", "presence"),
    "tally": ("compare_count", "count", "count_all", "caption_match"),
    "gathering": ("left_right", "above_below", "presence", "side_category", "count_all", "caption_match"),
    "tinted": ("left_right", "above_below", "presence", "side_category", "side_colour", "bind_colour"),
    "pair": ("compare_size", "left_right", "above_below", "side_category", "presence", "caption_match"),
}
"""Kind of scene -> question types asked about it, where the scene has a certain answer."""
SIDES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
MIN_GAP = 0.12
"""How far the outermost thing of a side must be ahead of the next one, center to center, as a share of the image."""
MIN_RATIO = 1.3
"""How much longer the longest side of the larger of two things must be; its area too, squared."""


@dataclass(frozen=True)
class QuestionAnswer:
    """A question with its answer.

    Args:
        type: Question type.
        text: The question.
        answer: The correct answer.
        cell: Which of the type's ``ANSWERS`` it counts for; empty where the type has none.
        extra: Further columns of the row, such as both captions of a pair.
    """

    type: str
    text: str
    answer: str
    cell: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)


class QuestionGenerator:
    """Questions about images of one split.

    Args:
        composer: Composer that other things to ask about are picked from.
        rng: Random generator of every choice.
    """

    def __init__(self, composer: SceneComposer, rng: random.Random) -> None:
        self._composer, self._rng = composer, rng
        self._truth = {kind: ShuffledCycle((True, False), rng) for kind, told in ANSWERS.items() if len(told) == 2}
        self._alike = ShuffledCycle((True, False), rng)
        self._sides = ShuffledCycle(tuple(SIDES), rng)
        self._asks: dict[str, Callable[[SceneImage], QuestionAnswer | None]] = {
            "caption": self._caption, "category": self._category, "colour": self._color, "bind_colour": self._color,
            "colour_bg": self._background, "count": self._count, "count_all": self._count_all,
            "left_right": self._left_right, "above_below": self._above_below,
            "presence": self._presence, "yes_no": self._presence,
            "side_category": self._side_category, "side_colour": self._side_color,
            "compare_count": self._compare_count, "compare_size": self._compare_size,
            "caption_match": self._caption_match,
        }  # fmt: skip

    def ask(self, kind: str, image: SceneImage) -> QuestionAnswer | None:
        """A question of a type about an image; None where the image has no certain answer to it."""
        question = self._asks[kind](image)
        if question is None:
            return None
        cell = question.cell or (question.answer if ANSWERS[kind] else "")
        assert not ANSWERS[kind] or cell in ANSWERS[kind], f"{kind}: {cell}"
        return replace(question, type=kind, cell=cell)

    def _caption(self, image: SceneImage) -> QuestionAnswer:
        thing = image.target
        said = format_answer(with_article(thing.name, thing.number))
        return QuestionAnswer("caption", "What is in the picture?", said)

    def _category(self, image: SceneImage) -> QuestionAnswer | None:
        if len(image.things) > 1 or image.target.category not in CATEGORY_PHRASES:
            return None
        if len(image.placed) == 1:
            text, answer, number = f"Is this {_CHOICES}?", _ONE[image.target.category], "one"
        else:
            text = "Are these animals, food, vehicles or household objects?"
            answer, number = _SEVERAL[image.target.category], "several"
        return QuestionAnswer("category", text, answer, f"{number} {image.target.category}")

    def _background(self, image: SceneImage) -> QuestionAnswer:
        return QuestionAnswer("colour_bg", "What colour is the background?", format_answer(image.background))

    def _color(self, image: SceneImage) -> QuestionAnswer | None:
        """Of a tinted thing only: the colors of drawings are known from their names."""
        tinted = [each for each in image.placed if each.tint]
        if not tinted:
            return None
        each = self._rng.choice(tinted)
        assert each.tint is not None
        verb = "are" if each.thing.number == "many" else "is"
        return QuestionAnswer("colour", f"What colour {verb} the {each.thing.name}?", format_answer(each.tint))

    def _presence(self, image: SceneImage) -> QuestionAnswer:
        true = self._truth["yes_no" if image.kind == "single" else "presence"].draw()
        shown = self._rng.choice(image.things)
        thing = shown if true else self._another(shown, image)
        verb = "Are" if thing.number == "many" else "Is"
        text = f"{verb} there {with_article(thing.name, thing.number)} in the picture?"
        return QuestionAnswer("presence", text, _yes_no(true))

    def _another(self, shown: Thing, image: SceneImage, *, countable: bool = False) -> Thing:
        """A thing that is not in the image, in half of the draws of the category of ``shown``."""
        category = shown.category if self._alike.draw() else None
        return self._composer.pick(apart_from=image.things, category=category, countable=countable)

    def _count(self, image: SceneImage) -> QuestionAnswer:
        counted = image.things if image.kind == "tally" else image.things[:1]
        thing = self._rng.choice(counted)
        text = f"How many {plural(thing.name)} are there?"
        return QuestionAnswer("count", text, format_answer(COUNT_WORDS[image.count(thing)]))

    def _count_all(self, image: SceneImage) -> QuestionAnswer:
        number = format_answer(COUNT_WORDS[len(image.placed)])
        return QuestionAnswer("count_all", "How many things are in the picture?", number)

    def _left_right(self, image: SceneImage) -> QuestionAnswer | None:
        pairs = [(a, b) for a in image.placed for b in image.placed if a.box[2] <= b.box[0]]
        return self._which_side("left_right", pairs, ("left", "right"), "left or right of")

    def _above_below(self, image: SceneImage) -> QuestionAnswer | None:
        pairs = [(a, b) for a in image.placed for b in image.placed if a.box[3] <= b.box[1]]
        return self._which_side("above_below", pairs, ("above", "below"), "above or below")

    def _which_side(
        self, kind: str, pairs: Sequence[tuple[PlacedThing, PlacedThing]], answers: tuple[str, str], said: str
    ) -> QuestionAnswer | None:
        """On which side of one thing another is; the first of each pair is on the side of the first answer."""
        if not pairs:
            return None
        first, second = self._rng.choice(pairs)
        is_first = self._truth[kind].draw()
        asked, other = (first, second) if is_first else (second, first)
        verb = "Are" if asked.thing.number == "many" else "Is"
        text = f"{verb} the {asked.thing.name} {said} the {other.thing.name}?"
        return QuestionAnswer(kind, text, format_answer(answers[0] if is_first else answers[1]))

    def _outermost(self, image: SceneImage) -> tuple[str, PlacedThing] | None:
        """A side, and the thing that is clearly farthest on it."""
        side = self._sides.draw()
        across = side in ("left", "right")
        order = sorted(
            image.placed,
            key=lambda each: each.center if across else each.middle,
            reverse=side in ("right", "bottom"),
        )
        first, second = ((each.center if across else each.middle) for each in order[:2])
        return (side, order[0]) if abs(first - second) > MIN_GAP * image.size else None

    def _side_category(self, image: SceneImage) -> QuestionAnswer | None:
        found = self._outermost(image)
        if found is None or found[1].thing.category not in CATEGORY_PHRASES:
            return None
        text = f"Is the thing {SIDES[found[0]]} {_CHOICES}?"
        return QuestionAnswer("side_category", text, _ONE[found[1].thing.category])

    def _side_color(self, image: SceneImage) -> QuestionAnswer | None:
        found = self._outermost(image)
        if found is None or found[1].tint is None:
            return None
        text = f"What colour is the thing {SIDES[found[0]]}?"
        return QuestionAnswer("side_colour", text, format_answer(found[1].tint))

    def _compare_count(self, image: SceneImage) -> QuestionAnswer:
        fewer, more = sorted(image.things, key=image.count)
        more_first = self._truth["compare_count"].draw()
        named = (more, fewer) if more_first else (fewer, more)
        text = f"Are there more {plural(named[0].name)} or more {plural(named[1].name)}?"
        cell = "first" if more_first else "second"
        return QuestionAnswer("compare_count", text, format_answer(plural(more.name)), cell)

    def _compare_size(self, image: SceneImage) -> QuestionAnswer | None:
        small, large = sorted(image.placed, key=lambda each: max(each.size))
        areas = [width * height for width, height in (small.size, large.size)]
        if max(large.size) < MIN_RATIO * max(small.size) or areas[1] < MIN_RATIO**2 * areas[0]:
            return None
        asked = large if self._truth["compare_size"].draw() else small
        other = small if asked is large else large
        sides = ("left", "right") if asked.center < other.center else ("right", "left")
        text = f"Is the thing on the {sides[0]} larger or smaller than the thing on the {sides[1]}?"
        return QuestionAnswer("compare_size", text, "Larger." if asked is large else "Smaller.")

    def _caption_match(self, image: SceneImage) -> QuestionAnswer | None:
        if len(image.things) > 3:
            return None
        things = list(image.things)
        self._rng.shuffle(things)
        at = self._rng.randrange(len(things))
        numbers = [image.count(thing) for thing in things]
        swap = self._another(things[at], image, countable=numbers[at] > 1)
        swapped = [*things[:at], swap, *things[at + 1 :]]
        captions = [
            join_phrases(
                [count_phrase(thing.name, thing.number, count) for thing, count in zip(row, numbers, strict=True)]
            )
            for row in (things, swapped)
        ]
        true = self._truth["caption_match"].draw()
        text = f'Does "{captions[0] if true else captions[1]}" describe the picture?'
        extra = {"caption": captions[0], "caption_swapped": captions[1]}
        return QuestionAnswer("caption_match", text, _yes_no(true), extra=extra)


def _yes_no(true: bool) -> str:
    return "Yes." if true else "No."
