"""CIDEr of generated answers to questions that have several references, over all ranks.

Data flow: answers + their samples -> ``references_of``, and rows about one picture with one question ->
``CaptionScores`` -> gathered over ranks -> ``core.cider``.
"""

from collections.abc import Sequence

from lightning_mm.core.cider import cider
from lightning_mm.core.decisions import log
from lightning_mm.core.distributed import all_gather_object
from lightning_mm.data.sample import Sample

Entry = tuple[tuple[str, str], str, tuple[str, ...], bool]
"""Pictures and question, answer, references, whether the row has a list of references."""

REFERENCE_COLUMNS = ("references", "captions", "caption")
"""Columns whose list of texts are the references of a row's last answer."""


def references_of(sample: Sample, turn: int) -> tuple[str, ...]:
    """The references of a row with a list of them, for its last answer; empty for other rows and answers."""
    if not sample.answers or turn != sample.answers[-1]:
        return ()
    lists = (sample.extra.get(name) for name in REFERENCE_COLUMNS)
    texts = next((each for each in lists if isinstance(each, list)), [])
    return tuple(text for text in texts if isinstance(text, str) and text.strip())


class CaptionScores:
    """Mean CIDEr-D over questions that have a list of references, or several rows.

    Rows about the same pictures with the same question are one question, whose references are all their answers: the
    form in which COCO's captions are released.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def update(self, answers: Sequence[str], samples: Sequence[Sample], turns: Sequence[int]) -> None:
        """Add a batch of generated answers.

        Args:
            answers: The answers, without reasoning.
            samples: The conversation of each.
            turns: Index of the answered turn in it.
        """
        for answer, sample, turn in zip(answers, samples, turns, strict=True):
            asked = "\n".join(each.text for each in sample.turns[:turn])
            listed = references_of(sample, turn)
            key = (repr(sample.images), asked)
            self._entries.append((key, answer, listed or (sample.turns[turn].text,), bool(listed)))

    def compute(self) -> float | None:
        """Mean over the questions of all ranks, in the order of their pictures; None if no question is of this kind."""
        answers: dict[tuple[str, str], str] = {}
        references: dict[tuple[str, str], dict[str, None]] = {}
        listed: set[tuple[str, str]] = set()
        for part in all_gather_object(self._entries):
            for key, answer, texts, has_list in part:
                answers.setdefault(key, answer)
                references.setdefault(key, {}).update(dict.fromkeys(texts))
                listed |= {key} if has_list else set()
        # Sorted: which rank holds which row, and so the order, depends on the number of ranks.
        chosen = sorted(key for key, texts in references.items() if key in listed or len(texts) > 1)
        if not chosen:
            return None
        if len(chosen) == 1:
            log.warning(
                "no CIDEr: one question has several references, and its document frequencies need several questions"
            )
            return None
        scores = cider([answers[key] for key in chosen], [list(references[key]) for key in chosen])
        return sum(scores) / len(scores)
