"""Rows of train.json, val.json and test.json: train rows have several questions per image, the others one.

Data flow: ``SplitContent`` (things and flags of one split) -> rows and their images -> ``build``.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mm.data.sample import IMAGE_MARK
from lightning_mm.nano.data.catalog import Thing
from lightning_mm.nano.data.flags import FLAG_TYPES, Country, FlagQuestionGenerator
from lightning_mm.nano.data.images import SceneComposer, SceneImage
from lightning_mm.nano.data.questions import QuestionAnswer, QuestionGenerator

Row = dict[str, Any]
TRAIN_TYPES = {
    "single": (("category", "category", "category", "caption"), ("category", "caption", "yes_no", "colour")),
    "crowd": (("count",), ("presence", "colour", "caption_match")),
    "gathering": (("left_right",), ("presence", "colour", "caption_match")),
    "flag": (FLAG_TYPES, FLAG_TYPES),
}
"""Kind of training image -> types of the first question (before another answer gives it away), types of the others."""


@dataclass(frozen=True)
class SplitContent:
    """The things and flags that images of one split may show.

    Args:
        things: Things other than flags.
        flags: Flags of countries.
        countries: Facts about each country, by the key of its flag.
    """

    things: Sequence[Thing]
    flags: Sequence[Thing]
    countries: Mapping[str, Country]


def train_rows(
    content: SplitContent, counts: Mapping[str, int], seed: int, size: int
) -> Iterator[tuple[Row, SceneImage]]:
    """Training rows with two to four questions each, and their images, in a seeded order.

    Args:
        content: Things and flags of the train split.
        counts: Number of images of each kind in ``TRAIN_TYPES``.
        seed: Random seed of the whole build.
        size: Side of an image in pixels.
    """
    generators = {
        kind: _RowGenerator(content, kind, random.Random(f"{seed}:train:{kind}"), size) for kind in TRAIN_TYPES
    }
    order = [kind for kind in TRAIN_TYPES for _ in range(counts[kind])]
    random.Random(f"{seed}:train:order").shuffle(order)
    for number, kind in enumerate(order):
        image, questions = generators[kind].several()
        yield make_row("train", number, image, questions), image


def single_turn_rows(
    split: str, content: SplitContent, quotas: Mapping[str, int], seed: int, size: int
) -> Iterator[tuple[Row, SceneImage]]:
    """Rows with one question each, and their images; every prefix has the question types in proportion.

    Args:
        split: ``val`` or ``test``.
        content: Things and flags of the split.
        quotas: Number of rows of each question type.
        seed: Random seed of the whole build.
        size: Side of an image in pixels.
    """
    places: list[tuple[float, str]] = []
    for kind, quota in quotas.items():
        rng = random.Random(f"{seed}:{split}:order:{kind}")
        places += [((i + rng.random()) / quota, kind) for i in range(quota)]
    generators = {
        kind: _RowGenerator(content, _image_kind_of(kind), random.Random(f"{seed}:{split}:{kind}"), size)
        for kind in quotas
    }
    for number, (_, kind) in enumerate(sorted(places)):
        image, question = generators[kind].one(kind)
        yield make_row(split, number, image, [question]), image


def _image_kind_of(question_type: str) -> str:
    """The kind of image that a question type is asked about."""
    if question_type in FLAG_TYPES:
        return "flag"
    if question_type in ("category", "caption", "yes_no"):
        return "single"
    return "crowd" if question_type in ("count", "presence") else "gathering"


class _RowGenerator:
    """Images of one kind with their questions; each kind has a random generator of its own."""

    def __init__(self, content: SplitContent, kind: str, rng: random.Random, size: int) -> None:
        self._kind, self._rng = kind, rng
        self._composer = SceneComposer(content.flags if kind == "flag" else content.things, rng, size)
        self._questions: QuestionGenerator | FlagQuestionGenerator
        self._questions = (
            FlagQuestionGenerator(content.countries) if kind == "flag" else QuestionGenerator(self._composer, rng)
        )

    def one(self, question_type: str) -> tuple[SceneImage, QuestionAnswer]:
        """An image for which a question of this type has an answer, and the question."""
        while True:
            image = self._image(question_type)
            question = self._questions.ask(question_type, image)
            if question:
                return image, question

    def several(self) -> tuple[SceneImage, list[QuestionAnswer]]:
        """An image and two to four questions; the first is always of one of the kind's first types."""
        firsts, others = TRAIN_TYPES[self._kind]
        first = self._rng.choice(firsts)
        image, question = self.one(first)
        asked = [question]
        wanted = self._rng.randint(2, 4)
        for kind in self._rng.sample(others, len(others)):
            more = self._questions.ask(kind, image) if kind != first and len(asked) < wanted else None
            asked += [more] if more else []
        return image, asked

    def _image(self, question_type: str) -> SceneImage:
        if self._kind == "single":
            return self._composer.single(with_category=question_type == "category")
        if self._kind == "gathering":
            return self._composer.gathering(most=3 if question_type == "caption_match" else 4)
        return self._composer.crowd() if self._kind == "crowd" else self._composer.flag()


def make_row(split: str, number: int, image: SceneImage, questions: Sequence[QuestionAnswer]) -> Row:
    """A row in LLaVA's format with annotations of the image; every row has the same keys."""
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
        "kind": image.kind,
        "background": image.background,
        "boxes": [
            {
                "name": each.thing.name,
                "box": list(each.box),
                "category": each.thing.category,
                "group": each.thing.group,
                "colour": each.thing.color,
                "key": each.thing.key,
            }
            for each in image.placed
        ],
        "caption": extra.get("caption"),
        "caption_swapped": extra.get("caption_swapped"),
        "source": "+".join(sorted({each.thing.source for each in image.placed})),
    }
