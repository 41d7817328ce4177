"""A conversation about zero or more images or videos as read from disk, and its questions, one per answer.

Data flow: ``readers`` -> ``Sample`` or ``Rejection`` -> ``table`` -> ``Sample`` -> ``collator`` -> ``Batch``;
Samples -> ``questions_of`` -> prompts, and the majority baseline.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from lightning_mm.data.image_source import ImageSource

Role = Literal["system", "user", "assistant", "tool"]
IMAGE_MARK = "<image>"
"""Placeholder of an image in the text of a user turn, as in LLaVA's files."""
VIDEO_MARK = "<video>"
"""Placeholder of a video, likewise."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Args:
        role: Speaker.
        text: Content; a user's may hold ``<image>`` marks.
        question_type: Type of the question that an assistant turn answers, for accuracy per type.
        train: Whether an assistant turn is learned; if not, it is context like a user's.
        reasoning: What an assistant turn thinks before it answers; '' for nothing.
        tool_calls: Calls of tools by an assistant turn, as a JSON list in OpenAI's form; '' for none.
    """

    role: Role
    text: str
    question_type: str = "any"
    train: bool = True
    reasoning: str = ""
    tool_calls: str = ""


@dataclass(frozen=True)
class Sample:
    """A conversation with its images.

    Args:
        id: Identifier, unique within its file.
        turns: Messages in order; the texts of user turns hold one ``<image>`` mark per image, in image order.
        images: Absolute paths, or images that are not files of their own.
        origin: ``file:line`` for error messages.
        extra: Further columns of the row (boxes, choices, ...), unchanged.
        videos: As images; the texts of user turns hold one ``<video>`` mark per video, in order.
        tools: Tools that the assistant may call, as a JSON list in OpenAI's form; '' for none.
        source: Name of the source that the row is from, for mixtures.
        sizes: Width and height of each image in pixels, as displayed, where they are known from before.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    origin: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    videos: tuple[ImageSource, ...] = ()
    tools: str = ""
    source: str = ""
    sizes: tuple[tuple[int, int], ...] = field(default=(), compare=False)

    @property
    def has_images(self) -> bool:
        """Whether there is anything to see, frames of a video included."""
        return bool(self.images or self.videos)

    @property
    def answers(self) -> tuple[int, ...]:
        """Indices of the assistant turns that are learned, each the answer to one question.

        A turn that is context only is no reference either: nobody asks for it in validation or test.
        """
        return tuple(i for i, turn in enumerate(self.turns) if turn.role == "assistant" and turn.train)


@dataclass(frozen=True)
class Rejection:
    """A row or a part of one that is not used, and why.

    Args:
        origin: ``file:line`` of the row.
        reason: ``category: detail``.
        kind: ``dropped`` rows are not used; ``cut`` rows are used in part; ``probe`` rows fell out of a probe set.
        split: train, val, test or predict; '' where it is not known.
        source: Path of the file, folder or data set that the row is from; '' where it is not known.
    """

    origin: str
    reason: str
    kind: Literal["dropped", "cut", "probe"] = "dropped"
    split: str = ""
    source: str = ""


SampleQuestion = tuple[Sample, int]
"""A conversation, and the index of the turn that answers."""


def questions_of(samples: Iterable[Sample], limit: int | None = None) -> tuple[SampleQuestion, ...]:
    """The questions of these conversations, in order.

    Args:
        samples: Conversations; none is read behind that with the last question.
        limit: Most questions, from the first on; None for all.
    """
    return tuple(islice(((sample, index) for sample in samples for index in sample.answers), limit))


def sort_by_answer_length(questions: Iterable[SampleQuestion]) -> tuple[SampleQuestion, ...]:
    """Questions with short answers first: a batch is generated until its longest answer ends."""
    return tuple(sorted(questions, key=lambda question: len(question[0].turns[question[1]].text)))


def most_frequent_answers(given: Mapping[tuple[str, str], int]) -> dict[str, str]:
    """Question type -> its most frequent answer, in lower case and without a full stop.

    Args:
        given: (question type, answer) -> how often it is given.
    """
    counts: dict[str, Counter[str]] = {}
    for (question_type, answer), count in given.items():
        counts.setdefault(question_type, Counter())[answer.strip().rstrip(".").casefold()] += count
    return {question_type: counter.most_common(1)[0][0] for question_type, counter in counts.items()}
