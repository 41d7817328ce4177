"""Questions whose answers follow from the boxes of a picture.

Data flow: ``studio`` hands in a Picture; a Question (type, text, answer) goes to ``build``.

Wrong things to ask about are drawn from the same split as right ones, evenly, half of them from the category of what
is shown: neither a name nor a category gives an answer away. Yes and no, left and right come from decks, so they are
even.

English for the questions: articles, plurals, lists and small numbers.

Data flow: ``questions`` hands in the names of things; sentences come out.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_mm.data.english import COUNT_WORDS, plural
from lightning_mm.nano.data.catalog import Number, Thing
from lightning_mm.nano.data.images import Deck, Picture, Placed, Studio


def noun(name: str, number: Number = "one") -> str:
    """The name with its article, where it takes one: "a cat", "an hourglass", "bread", "grapes"."""
    if number != "one":
        return name
    return f"{'an' if name[0] in 'aeiou' or name.startswith('hour') else 'a'} {name}"


def counted(name: str, number: Number, count: int) -> str:
    """A noun phrase for ``count`` of a thing: "a cat", "three cats", "bread"."""
    return noun(name, number) if count == 1 else f"{COUNT_WORDS[count]} {plural(name)}"


def listed(phrases: Sequence[str]) -> str:
    """Phrases joined as in "a cat, a dog and an apple"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def answer(phrase: str) -> str:
    """An answer as it is scored: a capital first, a full stop last."""
    return phrase[0].upper() + phrase[1:] + "."


PHRASES = {
    "animal": "an animal",
    "food": "food",
    "vehicle": "a vehicle",
    "household": "a household object",
}
"""The categories that are asked for: those with enough drawings that a held-out number means something."""


@dataclass(frozen=True)
class Question:
    """One question with its answer; ``extra`` holds what else the row should say (both captions of a pair)."""

    type: str
    text: str
    answer: str
    extra: Mapping[str, str] = field(default_factory=dict)


class Examiner:
    """Asks about pictures of one split.

    Args:
        studio: Where other things to ask about are picked.
        rng: Every choice is drawn from it.
    """

    def __init__(self, studio: Studio, rng: random.Random) -> None:
        self._studio, self._rng = studio, rng
        self._truth = {kind: Deck((True, False), rng) for kind in ("yes_no", "presence", "caption_match", "left_right")}
        self._alike = Deck((True, False), rng)
        self._of_thing = Deck((True, False), rng)

    def ask(self, kind: str, picture: Picture) -> Question | None:
        """A question of a type about a picture; None where the picture cannot answer it without doubt."""
        asks = {
            "caption": self._caption,
            "category": self._category,
            "yes_no": self._presence,
            "presence": self._presence,
            "count": self._count,
            "left_right": self._left_right,
            "colour": self._colour,
            "caption_match": self._caption_match,
        }
        question = asks[kind](picture)
        return Question(kind, question.text, question.answer, question.extra) if question else None

    def _caption(self, picture: Picture) -> Question | None:
        thing = picture.target
        return Question("caption", "What is in the picture?", answer(noun(thing.name, thing.number)))

    def _category(self, picture: Picture) -> Question | None:
        if picture.target.category not in PHRASES:
            return None
        choices = list(PHRASES.values())
        text = f"Is this {', '.join(choices[:-1])} or {choices[-1]}?"
        # Without the article: half of the answers would begin alike, and greedy decoding would prefer those.
        named = PHRASES[picture.target.category].removeprefix("an ").removeprefix("a ")
        return Question("category", text, answer(named))

    def _presence(self, picture: Picture) -> Question | None:
        true = self._truth["yes_no" if picture.kind == "single" else "presence"].draw()
        shown = self._rng.choice(picture.things)
        thing = shown if true else self._another(shown, picture)
        verb = "Are" if thing.number == "many" else "Is"
        return Question("presence", f"{verb} there {noun(thing.name, thing.number)} in the picture?", _yes(true))

    def _another(self, shown: Thing, picture: Picture) -> Thing:
        """A thing that is not in the picture; every second time of the category of ``shown``."""
        category = shown.category if self._alike.draw() else None
        return self._studio.pick(apart_from=picture.things, category=category)

    def _count(self, picture: Picture) -> Question | None:
        thing = picture.target
        if thing.number != "one":
            return None
        return Question("count", f"How many {plural(thing.name)} are there?", answer(COUNT_WORDS[picture.count(thing)]))

    def _left_right(self, picture: Picture) -> Question | None:
        alone = [each for each in picture.placed if picture.count(each.thing) == 1]
        pairs = [(a, b) for a in alone for b in alone if a.box[2] <= b.box[0]]
        if not pairs:
            return None
        left, right = self._rng.choice(pairs)
        is_left = self._truth["left_right"].draw()
        asked, other = (left, right) if is_left else (right, left)
        verb = "Are" if asked.thing.number == "many" else "Is"
        text = f"{verb} the {asked.thing.name} left or right of the {other.thing.name}?"
        return Question("left_right", text, "Left." if is_left else "Right.")

    def _colour(self, picture: Picture) -> Question | None:
        coloured = [each for each in picture.placed if each.thing.colour and picture.count(each.thing) == 1]
        if not coloured or not self._of_thing.draw():
            return Question("colour", "What colour is the background?", answer(picture.background))
        return _colour_of(self._rng.choice(coloured))

    def _caption_match(self, picture: Picture) -> Question | None:
        if len(picture.things) > 3:
            return None
        things = list(picture.things)
        self._rng.shuffle(things)
        at = self._rng.randrange(len(things))
        numbers = [picture.count(thing) for thing in things]
        swap = self._another_like(things[at], picture, numbers[at])
        swapped = [*things[:at], swap, *things[at + 1 :]]
        captions = [
            listed([counted(thing.name, thing.number, count) for thing, count in zip(row, numbers, strict=True)])
            for row in (things, swapped)
        ]
        true = self._truth["caption_match"].draw()
        text = f'Does "{captions[0] if true else captions[1]}" describe the picture?'
        return Question("caption_match", text, _yes(true), {"caption": captions[0], "caption_swapped": captions[1]})

    def _another_like(self, shown: Thing, picture: Picture, count: int) -> Thing:
        category = shown.category if self._alike.draw() else None
        return self._studio.pick(apart_from=picture.things, category=category, countable=count > 1)


def _colour_of(each: Placed) -> Question:
    thing = each.thing
    assert thing.colour is not None
    verb = "are" if thing.number == "many" else "is"
    return Question("colour", f"What colour {verb} the {thing.name}?", answer(thing.colour))


def _yes(true: bool) -> str:
    return "Yes." if true else "No."
