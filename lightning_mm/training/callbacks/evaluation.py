"""Accuracy on held-out questions before and after training, with majority-answer and no-image baselines.

Data flow: PromptBatches of the held-out split -> generated answers -> accuracy by question type, of the model, the
majority answer of the training data and the model with blank images -> ``evaluation.json``, ``samples.json``.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_mm.core import metric_names
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import all_gather_object
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_json
from lightning_mm.core.run_directory import WritesToRun
from lightning_mm.data.batch import PromptBatch
from lightning_mm.data.image_source import image_file
from lightning_mm.data.sample import IMAGE_MARK, Sample
from lightning_mm.training.answer_metrics import ALL, is_correct
from lightning_mm.training.eval_context import data_of, evaluation_mode, live


@dataclass(frozen=True)
class AnsweredQuestion:
    """One held-out question and the model's answer.

    Args:
        key: Unique key of the question: the sample's origin and the turn.
        sample: Sample that holds the question.
        turn: Index of the reference answer among the sample's turns.
        answer: Generated answer.
    """

    key: str
    sample: Sample
    turn: int
    answer: str

    @property
    def truth(self) -> str:
        return self.sample.turns[self.turn].text

    @property
    def question_type(self) -> str:
        return self.sample.turns[self.turn].question_type


class HeldOutEvaluation(Callback, WritesToRun):
    """Accuracy by question type on the test split (validation split if there is none).

    Args:
        before: Ask before the first step too.
        after: Ask after the last step.
        no_image: Ask once more after training with every picture blank: what language alone gives.
        max_questions: At most so many, in file order; all if None.
        shown: So many samples are kept with their pictures.
    """

    def __init__(
        self,
        before: bool = True,
        after: bool = True,
        no_image: bool = True,
        max_questions: int | None = None,
        shown: int = 24,
    ) -> None:
        if max_questions is not None and max_questions < 0:
            raise UserError(f"evaluation.max_questions is {max_questions}.", "It counts.", "Give 0 or more, or null.")
        self.before, self.after, self.no_image = before, after, no_image
        self.max_questions, self.shown = max_questions, shown
        self._answers: dict[str, dict[str, str]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget the answers of an earlier fit with this callback; those of a resumed one are loaded next."""
        if stage == "fit":
            self._answers = {}

    def state_dict(self) -> dict[str, Any]:
        return {"answers": self._answers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._answers = state_dict["answers"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.before and "before" not in self._answers and trainer.global_step == 0:
            self._evaluate(trainer, pl_module, ["before"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.after and not trainer.interrupted:
            self._evaluate(trainer, pl_module, ["after", "no_image"] if self.no_image else ["after"])

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, moments: list[str]) -> None:
        split = "test" if data_of(trainer).samples("test") else "val"
        if not data_of(trainer).samples(split):
            log_decision("evaluation", "skipped", "neither data.test nor data.val is given")
            return
        answered: list[AnsweredQuestion] = []
        for moment in moments:
            answered = self._generate_answers(trainer, pl_module, split, blank=moment == "no_image")
            self._answers[moment] = {question.key: question.answer for question in answered}
        if self.run is not None and trainer.is_global_zero:
            majority = data_of(trainer).rows.majority_answers()
            rows = self._rows(answered, majority)
            write_json(self.run.evaluation, {"split": split, "rows": rows})
            _log_accuracies(trainer, rows, moments)
            write_json(
                self.run.samples, [self._sample(i, q) for i, q in enumerate(_balance_types(answered, self.shown))]
            )

    def _generate_answers(
        self, trainer: L.Trainer, pl_module: L.LightningModule, split: str, blank: bool
    ) -> list[AnsweredQuestion]:
        data = data_of(trainer)
        loader = data.question_loader(split, blank_images=blank, limit=self.max_questions)
        answered: list[AnsweredQuestion] = []
        with evaluation_mode(trainer, pl_module):
            for batch in loader:
                data.rejected_samples.add(batch.rejected)
                answers = live(pl_module).answer(batch.to(pl_module.device))
                answered += _answered_questions(batch, answers)
        found = {question.key: question for part in all_gather_object(answered) for question in part}
        # File order, independent of how the ranks shared the questions.
        keys = [_key(sample, turn) for sample, turn in data.questions(split, self.max_questions)]
        return [found[key] for key in keys if key in found]

    def _rows(self, answered: Sequence[AnsweredQuestion], majority: dict[str, str]) -> list[dict[str, Any]]:
        types = [*sorted({question.question_type for question in answered}), ALL]
        rows = []
        for kind in types:
            chosen = [q for q in answered if kind in (ALL, q.question_type)]
            guesses = [is_correct(majority.get(q.question_type, ""), q.truth) for q in chosen]
            measured = {moment: self._accuracy(moment, chosen) for moment in ("before", "after", "no_image")}
            rows.append({"type": kind, "n": len(chosen), "majority": _mean(guesses), **measured})
        return rows

    def _accuracy(self, moment: str, answered: Sequence[AnsweredQuestion]) -> float | None:
        answers = self._answers.get(moment)
        if answers is None:
            return None
        return _mean([is_correct(answers[q.key], q.truth) for q in answered if q.key in answers])

    def _sample(self, index: int, question: AnsweredQuestion) -> dict[str, Any]:
        assert self.run is not None
        self.run.pictures.mkdir(exist_ok=True)
        kept = []
        for number, path in enumerate(map(image_file, question.sample.images)):
            target = self.run.pictures / f"{index:04d}-{number}{path.suffix.lower()}"
            shutil.copyfile(path, target)
            kept.append(f"samples/{target.name}")
        row: dict[str, Any] = {
            "id": question.sample.id,
            "images": kept,
            "question": question.sample.turns[question.turn - 1].text.replace(IMAGE_MARK, "").strip(),
            "truth": question.truth,
            "type": question.question_type,
        }
        for moment in ("before", "after"):
            answer = self._answers.get(moment, {}).get(question.key)
            row[moment] = answer
            row[f"correct_{moment}"] = None if answer is None else is_correct(answer, question.truth)
        return row


def _log_accuracies(trainer: L.Trainer, rows: Iterable[dict[str, Any]], moments: list[str]) -> None:
    """Log accuracies by question type to every logger: those just measured, and the majority answer's."""
    values = {
        metric_names.held_out(moment, None if row["type"] == ALL else row["type"]): row[moment]
        for row in rows
        for moment in get_args(metric_names.Moment)
        if moment in (*moments, "majority") and row[moment] is not None
    }
    for logger in trainer.loggers:
        logger.log_metrics(values, trainer.global_step)


def _answered_questions(batch: PromptBatch, answers: list[str]) -> list[AnsweredQuestion]:
    rows = zip(batch.samples, batch.turns, answers, strict=True)
    return [AnsweredQuestion(_key(sample, turn), sample, turn, answer) for sample, turn, answer in rows]


def _key(sample: Sample, turn: int) -> str:
    return f"{sample.origin}#{turn}"


def _balance_types(answered: Sequence[AnsweredQuestion], count: int) -> list[AnsweredQuestion]:
    """At most ``count`` questions in file order, taken from all question types in turn."""
    by_type: dict[str, list[AnsweredQuestion]] = {}
    for question in answered:
        by_type.setdefault(question.question_type, []).append(question)
    ranked = sorted((rank, kind, q.key) for kind, qs in by_type.items() for rank, q in enumerate(qs))
    chosen = {key for _, _, key in ranked[:count]}
    return [question for question in answered if question.key in chosen]


def _mean(hits: Iterable[bool]) -> float | None:
    values = list(hits)
    return sum(values) / len(values) if values else None
