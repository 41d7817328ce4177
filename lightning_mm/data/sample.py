"""One conversation about zero or more pictures, as read from disk and not yet templated.

Data flow: ``sources`` makes Samples (or ledger entries); ``collator`` turns them into a Batch.

Conversations as questions that can be scored: one per answer.

Data flow: Samples -> ``questions_of`` -> loaders of prompts; of training data, the baseline of never looking.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
IMAGE_MARK = "<image>"
"""Where a picture stands in the text of a user turn, as in LLaVA's files."""


@dataclass(frozen=True)
class Turn:
    """What one speaker says. ``question_type`` is set on assistant turns only, for accuracy per type."""

    role: Role
    text: str
    question_type: str = "any"


@dataclass(frozen=True)
class Sample:
    """A conversation with its pictures.

    Args:
        id: Unique within its file.
        turns: In order; the texts of user turns hold one ``<image>`` mark per picture, in picture order.
        images: Absolute paths.
        origin: ``file:line`` for error messages.
        extra: Whatever else the row held (boxes, choices, ...), untouched.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()
    origin: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> tuple[int, ...]:
        """Indices of the assistant turns: each is one question that can be scored."""
        return tuple(i for i, turn in enumerate(self.turns) if turn.role == "assistant")


@dataclass(frozen=True)
class Rejection:
    """A row or a part of one that is not used, and why.

    ``cut`` rows are used, but shorter than they were; ``probe`` rows are asked about, never trained on.
    """

    origin: str
    reason: str
    kind: Literal["dropped", "cut", "probe"] = "dropped"


SampleQuestion = tuple[Sample, int]
"""A conversation, and the index of the turn that answers."""


def questions_of(samples: Iterable[Sample]) -> tuple[SampleQuestion, ...]:
    """Every answer of these conversations, in order."""
    return tuple((sample, index) for sample in samples for index in sample.answers)


def sort_by_answer_length(questions: Iterable[SampleQuestion]) -> tuple[SampleQuestion, ...]:
    """Those with short answers first: a batch is generated until its longest answer ends."""
    return tuple(sorted(questions, key=lambda question: len(question[0].turns[question[1]].text)))


def majority_answers(questions: Iterable[SampleQuestion]) -> dict[str, str]:
    """The most frequent answer to each type of question, in lower case and without its full stop."""
    counts: dict[str, Counter[str]] = {}
    for sample, index in questions:
        turn = sample.turns[index]
        counts.setdefault(turn.question_type, Counter())[turn.text.strip().rstrip(".").casefold()] += 1
    return {question_type: counter.most_common(1)[0][0] for question_type, counter in counts.items()}
