"""Questions about a scene whose answers follow from its boxes, and their English phrasing.

Wrong things to ask about come from the same split as right ones, half of them from the category of a shown thing, so
that neither a name nor a category gives the answer away. Yes and no, left and right are equally frequent.

Data flow: ``SceneImage`` -> ``QuestionGenerator.ask`` -> ``QuestionAnswer`` -> ``rows``.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_mm.data.english import COUNT_WORDS, plural
from lightning_mm.nano.data.catalog import Number, Thing
from lightning_mm.nano.data.images import PlacedThing, SceneComposer, SceneImage, ShuffledCycle


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


@dataclass(frozen=True)
class QuestionAnswer:
    """A question with its answer.

    Args:
        type: Question type.
        text: The question.
        answer: The correct answer.
        extra: Further columns of the row, such as both captions of a pair.
    """

    type: str
    text: str
    answer: str
    extra: Mapping[str, str] = field(default_factory=dict)


class QuestionGenerator:
    """Questions about images of one split.

    Args:
        composer: Composer that other things to ask about are picked from.
        rng: Random generator of every choice.
    """

    def __init__(self, composer: SceneComposer, rng: random.Random) -> None:
        self._composer, self._rng = composer, rng
        self._truth = {
            kind: ShuffledCycle((True, False), rng) for kind in ("yes_no", "presence", "caption_match", "left_right")
        }
        self._alike = ShuffledCycle((True, False), rng)
        self._of_thing = ShuffledCycle((True, False), rng)

    def ask(self, kind: str, image: SceneImage) -> QuestionAnswer | None:
        """A question of a type about an image; None where the image has no certain answer to it."""
        asks = {
            "caption": self._caption,
            "category": self._category,
            "yes_no": self._presence,
            "presence": self._presence,
            "count": self._count,
            "left_right": self._left_right,
            "colour": self._color,
            "caption_match": self._caption_match,
        }
        question = asks[kind](image)
        return QuestionAnswer(kind, question.text, question.answer, question.extra) if question else None

    def _caption(self, image: SceneImage) -> QuestionAnswer | None:
        thing = image.target
        return QuestionAnswer(
            "caption", "What is in the picture?", format_answer(with_article(thing.name, thing.number))
        )

    def _category(self, image: SceneImage) -> QuestionAnswer | None:
        if image.target.category not in CATEGORY_PHRASES:
            return None
        choices = list(CATEGORY_PHRASES.values())
        text = f"Is this {', '.join(choices[:-1])} or {choices[-1]}?"
        # Without the article: half of the answers would begin alike, and greedy decoding would prefer those.
        named = CATEGORY_PHRASES[image.target.category].removeprefix("an ").removeprefix("a ")
        return QuestionAnswer("category", text, format_answer(named))

    def _presence(self, image: SceneImage) -> QuestionAnswer | None:
        true = self._truth["yes_no" if image.kind == "single" else "presence"].draw()
        shown = self._rng.choice(image.things)
        thing = shown if true else self._another(shown, image)
        verb = "Are" if thing.number == "many" else "Is"
        return QuestionAnswer(
            "presence", f"{verb} there {with_article(thing.name, thing.number)} in the picture?", _yes_no(true)
        )

    def _another(self, shown: Thing, image: SceneImage) -> Thing:
        """A thing that is not in the image, in half of the draws of the category of ``shown``."""
        category = shown.category if self._alike.draw() else None
        return self._composer.pick(apart_from=image.things, category=category)

    def _count(self, image: SceneImage) -> QuestionAnswer | None:
        thing = image.target
        if thing.number != "one":
            return None
        return QuestionAnswer(
            "count", f"How many {plural(thing.name)} are there?", format_answer(COUNT_WORDS[image.count(thing)])
        )

    def _left_right(self, image: SceneImage) -> QuestionAnswer | None:
        alone = [each for each in image.placed if image.count(each.thing) == 1]
        pairs = [(a, b) for a in alone for b in alone if a.box[2] <= b.box[0]]
        if not pairs:
            return None
        left, right = self._rng.choice(pairs)
        is_left = self._truth["left_right"].draw()
        asked, other = (left, right) if is_left else (right, left)
        verb = "Are" if asked.thing.number == "many" else "Is"
        text = f"{verb} the {asked.thing.name} left or right of the {other.thing.name}?"
        return QuestionAnswer("left_right", text, "Left." if is_left else "Right.")

    def _color(self, image: SceneImage) -> QuestionAnswer | None:
        colored = [each for each in image.placed if each.thing.color and image.count(each.thing) == 1]
        if not colored or not self._of_thing.draw():
            return QuestionAnswer("colour", "What colour is the background?", format_answer(image.background))
        return _color_question(self._rng.choice(colored))

    def _caption_match(self, image: SceneImage) -> QuestionAnswer | None:
        if len(image.things) > 3:
            return None
        things = list(image.things)
        self._rng.shuffle(things)
        at = self._rng.randrange(len(things))
        numbers = [image.count(thing) for thing in things]
        swap = self._another_like(things[at], image, numbers[at])
        swapped = [*things[:at], swap, *things[at + 1 :]]
        captions = [
            join_phrases(
                [count_phrase(thing.name, thing.number, count) for thing, count in zip(row, numbers, strict=True)]
            )
            for row in (things, swapped)
        ]
        true = self._truth["caption_match"].draw()
        text = f'Does "{captions[0] if true else captions[1]}" describe the picture?'
        return QuestionAnswer(
            "caption_match", text, _yes_no(true), {"caption": captions[0], "caption_swapped": captions[1]}
        )

    def _another_like(self, shown: Thing, image: SceneImage, count: int) -> Thing:
        category = shown.category if self._alike.draw() else None
        return self._composer.pick(apart_from=image.things, category=category, countable=count > 1)


def _color_question(each: PlacedThing) -> QuestionAnswer:
    thing = each.thing
    assert thing.color is not None
    verb = "are" if thing.number == "many" else "is"
    return QuestionAnswer("colour", f"What colour {verb} the {thing.name}?", format_answer(thing.color))


def _yes_no(true: bool) -> str:
    return "Yes." if true else "No."
