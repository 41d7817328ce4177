"""Conversations as questions that can be scored: one per answer.

Data flow: Samples -> ``questions_of`` -> loaders of prompts; of training data, the baseline of never looking.
"""

from collections import Counter
from collections.abc import Iterable

from lightning_mm.data.sample import Sample

Question = tuple[Sample, int]
"""A conversation, and the index of the turn that answers."""


def questions_of(samples: Iterable[Sample]) -> tuple[Question, ...]:
    """Every answer of these conversations, in order."""
    return tuple((sample, index) for sample in samples for index in sample.answers)


def by_length(questions: Iterable[Question]) -> tuple[Question, ...]:
    """Those with short answers first: a batch is generated until its longest answer ends."""
    return tuple(sorted(questions, key=lambda question: len(question[0].turns[question[1]].text)))


def majority_answers(questions: Iterable[Question]) -> dict[str, str]:
    """The most frequent answer to each type of question, in lower case and without its full stop."""
    counts: dict[str, Counter[str]] = {}
    for sample, index in questions:
        turn = sample.turns[index]
        counts.setdefault(turn.question_type, Counter())[turn.text.strip().rstrip(".").casefold()] += 1
    return {question_type: counter.most_common(1)[0][0] for question_type, counter in counts.items()}
