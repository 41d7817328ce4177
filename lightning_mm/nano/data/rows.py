"""Rows of the three files: train rows carry several questions about one picture, val and test rows one question each.

Data flow: Things and flags of one split come in; rows and their pictures go to ``build``.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mm.data.sample import IMAGE_MARK
from lightning_mm.nano.data.catalog import Thing
from lightning_mm.nano.data.flags import FLAG_TYPES, Country, FlagExaminer
from lightning_mm.nano.data.images import Picture, Studio
from lightning_mm.nano.data.questions import Examiner, Question

Row = dict[str, Any]
TRAIN_TYPES = {
    "single": (("category", "category", "category", "caption"), ("category", "caption", "yes_no", "colour")),
    "crowd": (("count",), ("presence", "colour", "caption_match")),
    "gathering": (("left_right",), ("presence", "colour", "caption_match")),
    "flag": (FLAG_TYPES, FLAG_TYPES),
}
"""Kinds of train pictures: one of the first types is asked first, where no answer before it gives it away."""


@dataclass(frozen=True)
class Stock:
    """What one split may draw: things, flags, and the facts of the flags by key."""

    things: Sequence[Thing]
    flags: Sequence[Thing]
    countries: Mapping[str, Country]


def train_rows(stock: Stock, counts: Mapping[str, int], seed: int, size: int) -> Iterator[tuple[Row, Picture]]:
    """``counts[kind]`` pictures of each kind, in a seeded order, each with two to four questions.

    Args:
        stock: Of the train split.
        counts: Pictures per kind of ``TRAIN_TYPES``.
        seed: Of the whole build.
        size: Side of a picture, in pixels.
    """
    desks = {kind: _Desk(stock, kind, random.Random(f"{seed}:train:{kind}"), size) for kind in TRAIN_TYPES}
    order = [kind for kind in TRAIN_TYPES for _ in range(counts[kind])]
    random.Random(f"{seed}:train:order").shuffle(order)
    for number, kind in enumerate(order):
        picture, questions = desks[kind].several()
        yield made_row("train", number, picture, questions), picture


def single_turn_rows(
    split: str, stock: Stock, quotas: Mapping[str, int], seed: int, size: int
) -> Iterator[tuple[Row, Picture]]:
    """``quotas[type]`` rows of each type, one question each, mixed so that every prefix holds the types in
    proportion."""
    places: list[tuple[float, str]] = []
    for kind, quota in quotas.items():
        rng = random.Random(f"{seed}:{split}:order:{kind}")
        places += [((i + rng.random()) / quota, kind) for i in range(quota)]
    desks = {kind: _Desk(stock, _made_for(kind), random.Random(f"{seed}:{split}:{kind}"), size) for kind in quotas}
    for number, (_, kind) in enumerate(sorted(places)):
        picture, question = desks[kind].one(kind)
        yield made_row(split, number, picture, [question]), picture


def _made_for(question_type: str) -> str:
    """The kind of picture that a type is asked about."""
    if question_type in FLAG_TYPES:
        return "flag"
    if question_type in ("category", "caption", "yes_no"):
        return "single"
    return "crowd" if question_type in ("count", "presence") else "gathering"


class _Desk:
    """One kind of picture with its questions; its own dice, so that no kind changes another."""

    def __init__(self, stock: Stock, kind: str, rng: random.Random, size: int) -> None:
        self._kind, self._rng = kind, rng
        self._studio = Studio(stock.flags if kind == "flag" else stock.things, rng, size)
        self._examiner: Examiner | FlagExaminer
        self._examiner = FlagExaminer(stock.countries) if kind == "flag" else Examiner(self._studio, rng)

    def one(self, question_type: str) -> tuple[Picture, Question]:
        """A picture that can answer a question of this type, and the question."""
        while True:
            picture = self._picture(question_type)
            question = self._examiner.ask(question_type, picture)
            if question:
                return picture, question

    def several(self) -> tuple[Picture, list[Question]]:
        """A picture and two to four questions; a crowd is always counted, a gathering put in order."""
        firsts, others = TRAIN_TYPES[self._kind]
        first = self._rng.choice(firsts)
        picture, question = self.one(first)
        asked = [question]
        wanted = self._rng.randint(2, 4)
        for kind in self._rng.sample(others, len(others)):
            more = self._examiner.ask(kind, picture) if kind != first and len(asked) < wanted else None
            asked += [more] if more else []
        return picture, asked

    def _picture(self, question_type: str) -> Picture:
        if self._kind == "single":
            return self._studio.single(with_category=question_type == "category")
        if self._kind == "gathering":
            return self._studio.gathering(most=3 if question_type == "caption_match" else 4)
        return self._studio.crowd() if self._kind == "crowd" else self._studio.flag()


def made_row(split: str, number: int, picture: Picture, questions: Sequence[Question]) -> Row:
    """A row in LLaVA's form, with what is true of the picture beside it; every row has these keys."""
    turns: list[Row] = []
    for question in questions:
        mark = "" if turns else f"{IMAGE_MARK}\n"
        turns.append({"from": "human", "value": mark + question.text})
        turns.append({"from": "gpt", "value": question.answer, "type": question.type})
    extra = {key: value for question in questions for key, value in question.extra.items()}
    name = f"{split}-{number:05d}"
    return {
        "id": name,
        "image": f"images/{name}.png",
        "conversations": turns,
        "question_type": questions[0].type if len(questions) == 1 else "several",
        "kind": picture.kind,
        "background": picture.background,
        "boxes": [
            {
                "name": each.thing.name,
                "box": list(each.box),
                "category": each.thing.category,
                "group": each.thing.group,
                "colour": each.thing.colour,
                "key": each.thing.key,
            }
            for each in picture.placed
        ],
        "caption": extra.get("caption"),
        "caption_swapped": extra.get("caption_swapped"),
        "source": "+".join(sorted({each.thing.source for each in picture.placed})),
    }
