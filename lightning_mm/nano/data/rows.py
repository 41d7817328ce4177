"""Pictures with their questions, and the rows of the files: one row per question, those of a picture together.

Training takes every question that a picture answers, unless its answer has been asked for more often than others. A
split with quotas takes questions until each answer of each type has been asked for equally often.

Data flow: things of a split -> ``SceneComposer``, ``QuestionGenerator`` -> ``Picture`` -> ``numbered_rows`` ->
``build``.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mm.data.sample import IMAGE_MARK
from lightning_mm.nano.data.catalog import Thing
from lightning_mm.nano.data.cycles import ShuffledCycle
from lightning_mm.nano.data.images import SceneComposer, SceneImage
from lightning_mm.nano.data.questions import ANSWERS, TYPES_OF_KIND, QuestionAnswer, QuestionGenerator

Row = dict[str, Any]
TRAIN_KINDS = {"single": 8, "crowd": 4, "tally": 3, "gathering": 3, "tinted": 6, "pair": 3}
"""Kind of scene -> how often it comes in training, of 27."""
_MARGIN = 8
"""How much more often than the rarest one an answer of training may be asked for."""
_PATIENCE = 3000
"""Pictures in a row that answer no question that is still wanted, before a quota counts as impossible."""


@dataclass(frozen=True)
class Picture:
    """A picture and the questions about it."""

    image: SceneImage
    questions: Sequence[QuestionAnswer]


class _EvenAnswers:
    """Counts answers, and tells which are still wanted.

    Args:
        quotas: Questions of each type; None takes any number, as long as the answers stay even.
    """

    def __init__(self, quotas: Mapping[str, int] | None) -> None:
        self._quotas = quotas
        self._cells: Counter[tuple[str, str]] = Counter()

    def wants(self, question: QuestionAnswer) -> bool:
        kind = question.type
        asked = self._cells[kind, question.cell]
        if self._quotas is not None:
            return asked < self._limit(kind)
        # Only answers to the same words are compared: "one animal" with "one vehicle", not with "several animals".
        first = question.cell.partition(" ")[0] if " " in question.cell else ""
        alike = [self._cells[kind, cell] for cell in ANSWERS[kind] if cell.startswith(first)]
        return asked <= min(alike, default=asked) + _MARGIN

    def add(self, question: QuestionAnswer) -> None:
        self._cells[question.type, question.cell] += 1

    def open_types(self) -> set[str]:
        """Types with an answer that is still wanted."""
        assert self._quotas is not None
        return {
            kind
            for kind in self._quotas
            if any(self._cells[kind, cell] < self._limit(kind) for cell in ANSWERS[kind] or ("",))
        }

    def _limit(self, kind: str) -> int:
        assert self._quotas is not None
        return math.ceil(self._quotas.get(kind, 0) / max(1, len(ANSWERS[kind])))


def train_pictures(things: Sequence[Thing], count: int, seed: str, size: int) -> list[Picture]:
    """Pictures of every kind with all their questions, but for answers that are too frequent.

    Args:
        things: Things of the split.
        count: Number of pictures.
        seed: Random seed.
        size: Side of a picture in pixels.
    """
    rng = random.Random(seed)
    composer = SceneComposer(things, rng, size)
    asker, even = QuestionGenerator(composer, rng), _EvenAnswers(None)
    kinds = ShuffledCycle([kind for kind, often in TRAIN_KINDS.items() for _ in range(often)], rng)
    made: list[Picture] = []
    while len(made) < count:
        picture = _asked(composer.make(kinds.draw()), asker, even)
        made += [picture] if picture.questions else []
    return made


def quota_pictures(things: Sequence[Thing], quotas: Mapping[str, int], seed: str, size: int) -> list[Picture]:
    """Pictures in a random order that answer a number of questions of each type, each answer equally often.

    Args:
        things: Things of the split.
        quotas: Question type -> number of questions, rounded up to a multiple of its answers.
        seed: Random seed.
        size: Side of a picture in pixels.
    """
    rng = random.Random(seed)
    composer = SceneComposer(things, rng, size)
    asker, even = QuestionGenerator(composer, rng), _EvenAnswers(quotas)
    kinds = ShuffledCycle(tuple(TYPES_OF_KIND), rng)
    made: list[Picture] = []
    fruitless = 0
    while wanted := even.open_types():
        assert fruitless < _PATIENCE, f"no picture answers what is still wanted: {wanted}"
        useless = [kind for kind, types in TYPES_OF_KIND.items() if not wanted & set(types)]
        picture = _asked(composer.make(kinds.draw(avoid=useless)), asker, even)
        made += [picture] if picture.questions else []
        fruitless = 0 if picture.questions else fruitless + 1
    rng.shuffle(made)
    return made


def _asked(image: SceneImage, asker: QuestionGenerator, even: _EvenAnswers) -> Picture:
    questions = []
    for kind in TYPES_OF_KIND[image.kind]:
        question = asker.ask(kind, image)
        if question is not None and even.wants(question):
            even.add(question)
            questions.append(question)
    return Picture(image, questions)


Made = tuple[Row, SceneImage]


def numbered_rows(split: str, pictures: Sequence[Picture]) -> Iterator[Made]:
    """The rows of each picture with their image, picture by picture.

    Args:
        split: Name of the file, the first part of an id.
        pictures: Pictures in their order.
    """
    for number, picture in enumerate(pictures):
        name = f"{split}-{number:05d}"
        for place, question in enumerate(picture.questions):
            yield make_row(f"{name}-{place}", name, picture.image, question), picture.image


def make_row(row_id: str, name: str, image: SceneImage, question: QuestionAnswer) -> Row:
    """A row in LLaVA's format with one question and annotations of the image; every row has the same keys.

    Args:
        row_id: Id of the row.
        name: Name of the image file, without its suffix.
        image: The image.
        question: The question.
    """
    return {
        "id": row_id,
        "image": f"images/{name}.png",
        "conversations": [
            {"from": "human", "value": f"{IMAGE_MARK}\n{question.text}"},
            {"from": "gpt", "value": question.answer, "type": question.type},
        ],
        "question_type": question.type,
        "kind": image.kind,
        "background": image.background,
        "boxes": [
            {
                "name": each.thing.name,
                "box": list(each.box),
                "category": each.thing.category,
                "group": each.thing.group,
                "colour": each.color,
                "key": each.thing.key,
            }
            for each in image.placed
        ],
        "caption": question.extra.get("caption"),
        "caption_swapped": question.extra.get("caption_swapped"),
        "source": "+".join(sorted({each.thing.source for each in image.placed})),
    }
