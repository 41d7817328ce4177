"""How answers are scored: exact match after a stated normalisation, in all and by question type.

Data flow: generated answers + references + types -> ``AnswerScores`` (sums, reducible over ranks) -> fractions by type.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from lightning_mm.core import metric_names
from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import LossOutput
from lightning_mm.training.caption_scores import CaptionScores
from lightning_mm.training.source_losses import SourceScores

ALL = "all"


def normalised(answer: str) -> str:
    """Case, surrounding white space, runs of white space and closing punctuation do not count.

    Example:
        >>> normalised(" An  Animal. ")
        'an animal'
    """
    return re.sub(r"\s+", " ", answer).strip().rstrip(".!?,;:").strip().casefold()


def is_correct(answer: str, reference: str) -> bool:
    """Whether an answer matches its reference after normalisation."""
    return normalised(answer) == normalised(reference)


class AnswerScores(nn.Module):
    """Exact match by question type, as torchmetrics that sum over ranks.

    Args:
        types: Question types that can occur, the same on every rank.

    Example:
        >>> scores = AnswerScores(["colour", "count"])
        >>> scores.update(["Red.", "two"], ["red", "Three."], ["colour", "count"])
        >>> scores.compute()
        {'colour': 1.0, 'count': 0.0, 'all': 0.5}
    """

    def __init__(self, types: Iterable[str]) -> None:
        super().__init__()
        self.types = (*sorted(set(types)), ALL)
        self._right = [SumMetric() for _ in self.types]
        self._asked = [SumMetric() for _ in self.types]
        self.metrics = nn.ModuleList([*self._right, *self._asked])

    def update(self, answers: Sequence[str], references: Sequence[str], types: Sequence[str]) -> None:
        """Count a batch of answers."""
        for answer, reference, kind in zip(answers, references, types, strict=True):
            for index in (self.types.index(kind), self.types.index(ALL)):
                self._right[index].update(float(is_correct(answer, reference)))
                self._asked[index].update(1.0)

    def compute(self) -> dict[str, float]:
        """Fraction right by type, over all ranks; a type that nobody was asked about is left out."""
        with warnings.catch_warnings():
            # A rank may have met no question of some type: its zero is what the sum over ranks needs.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric SumMetric was called before")
            right = [float(metric.compute()) for metric in self._right]
            asked = [float(metric.compute()) for metric in self._asked]
        return {name: r / n for name, r, n in zip(self.types, right, asked, strict=True) if n}

    def reset(self) -> None:
        """Begin anew."""
        for metric in (*self._right, *self._asked):
            metric.reset()


class SplitScores(nn.Module):
    """All that is measured on one split: loss, token accuracy, CIDEr, exact match with pictures, without, by guessing.

    Args:
        types: Question types that can occur, the same on every rank.
        majority: Question type -> the answer that a guess gives; empty (default): guesses are not scored.
        sources: Names of the split's sources, the same on every rank.
    """

    def __init__(
        self,
        types: Iterable[str],
        majority: Mapping[str, str] = MappingProxyType({}),
        sources: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.source_scores = SourceScores(sources)
        self.loss, self.token_accuracy = MeanMetric(), MeanMetric()
        types = tuple(types)
        self.answers, self.blank_answers, self.guesses = (AnswerScores(types) for _ in range(3))
        self.majority = majority
        self.captions = CaptionScores()

    def add(self, objective: LossOutput, batch: Batch) -> None:
        """Count a teacher-forced batch: sums over its supervised tokens."""
        if num_tokens := objective.num_tokens:
            self.loss.update(objective.nll / num_tokens, num_tokens)
            self.token_accuracy.update(objective.num_correct / num_tokens, num_tokens)
            self.source_scores.add(objective, batch)

    def add_answers(self, answers: Sequence[str], references: Sequence[str], types: Sequence[str], blank: bool) -> None:
        """Count a batch of answers, given with the pictures or with blank ones."""
        (self.blank_answers if blank else self.answers).update(answers, references, types)
        if self.majority and not blank:
            self.guesses.update([self.majority.get(kind, "") for kind in types], references, types)

    def compute(self, split: metric_names.Stage) -> dict[str, Tensor | float]:
        """Every metric by its name, over all ranks."""
        values: dict[str, Tensor | float] = {f"{split}/loss": self.loss.compute()}
        values[f"{split}/token_accuracy"] = self.token_accuracy.compute()
        values |= self.source_scores.compute(split)
        if (score := self.captions.compute()) is not None:
            values[f"{split}/cider"] = score
        for name, value in self.answers.compute().items():
            values[metric_names.exact_match(split, None if name == ALL else name)] = value
        for name, value in self.blank_answers.compute().items():
            values[metric_names.no_image(None if name == ALL else name)] = value
        for name, value in self.guesses.compute().items():
            values[metric_names.majority(None if name == ALL else name)] = value
        return values
