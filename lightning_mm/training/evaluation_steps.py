"""Answers of the model: the steps of validation, test and predict, and ``generate`` for one question in Python.

Data flow: Batch -> loss and token accuracy; PromptBatch -> ``answer`` -> exact match; image and question -> text.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image

from lightning_mm.core import metric_names
from lightning_mm.core.errors import UserError
from lightning_mm.data import images as pictures
from lightning_mm.data.batch import Batch, PromptBatch
from lightning_mm.data.chat import ChatError, ChatRenderer, without_reasoning
from lightning_mm.data.chat_template import any_of
from lightning_mm.data.sample import IMAGE_MARK, Turn
from lightning_mm.execution.loss import LossOutput
from lightning_mm.models.generation import greedy_answers
from lightning_mm.models.processor import ModelProcessor
from lightning_mm.training.answer_metrics import SplitScores
from lightning_mm.training.caption_scores import references_of
from lightning_mm.training.eval_context import data_of

Picture = Image.Image | str | Path


class EvaluationSteps(L.LightningModule):
    """What ``MMModule`` does besides training."""

    max_new_tokens: int

    @property
    @abstractmethod
    def processing(self) -> ModelProcessor:
        """The model's processor."""

    @property
    @abstractmethod
    def answering_model(self) -> Any:
        """The transformers model as it is now; it is loaded where no run has done so."""

    @abstractmethod
    def objective(self, batch: Batch) -> LossOutput:
        """Summed NLL of a batch."""

    @cached_property
    def _chat(self) -> ChatRenderer:
        return ChatRenderer(self.processing)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return any_of(self.processing.special_tokens)

    def generate(
        self, image: Picture | Sequence[Picture] | None, question: str, max_new_tokens: int | None = None
    ) -> str:
        """The model's greedy answer to one question, before, after or without a fit.

        Args:
            image: A picture or its file, several of them, or None for a question without one.
            question: The question, without marks for the images.
            max_new_tokens: Longest answer in tokens; as in validation if not given.

        Raises:
            UserError: An image cannot be read, or the model's chat template refuses the question.

        Example::

            module.generate("cat.png", "Which animal is it?")
        """
        given = [] if image is None else [image] if isinstance(image, (Image.Image, str, Path)) else list(image)
        try:
            loaded = [each if isinstance(each, Image.Image) else pictures.load(Path(each)).image for each in given]
            turn = Turn("user", f"{IMAGE_MARK}\n" * len(loaded) + question)
            text = self._chat.render((turn,), add_generation_prompt=True).text
        except (pictures.BadImage, ChatError) as error:
            raise UserError(
                "The question cannot be asked.", str(error), "Change the picture or the question."
            ) from error
        model = self.answering_model
        inputs = self.processing.encode([text], [[each.convert("RGB") for each in loaded]], "left").inputs
        on_device = {name: value.to(model.device) for name, value in inputs.items()}
        modes = {part: part.training for part in model.modules()}
        model.eval()
        try:
            (answer,) = greedy_answers(
                model, self.processing.processor, on_device, max_new_tokens or self.max_new_tokens
            )
        finally:
            for part, training in modes.items():
                part.training = training
        return answer

    def answer(self, batch: PromptBatch) -> list[str]:
        """Greedy answers, one per question; an empty list for a batch whose questions were all rejected."""
        if not len(batch):
            return []
        return greedy_answers(self.answering_model, self.processing.processor, batch.inputs, self.max_new_tokens)

    def on_validation_epoch_start(self) -> None:
        self._begin_scores("val")

    def on_test_epoch_start(self) -> None:
        self._begin_scores("test")

    def _begin_scores(self, split: metric_names.Stage) -> None:
        data = data_of(self.trainer)
        majority = data.rows.majority_answers() if split == "test" else {}
        self.scores = SplitScores(data.question_types(split), majority, data.rows.source_names(split)).to(self.device)

    def validation_step(
        self, batch: Batch | PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, list[str]] | None:
        """Update the scores: loss and token accuracy of teacher-forced batches, exact match of generated answers.

        Returns:
            The generated answers; None for teacher-forced batches.
        """
        if isinstance(batch, Batch):
            objective = self.objective(batch)
            self.scores.add(objective, batch)
            return None
        answers = self.answer(batch)
        # A reference has neither reasoning nor, as answers are decoded, special tokens.
        said = [without_reasoning(answer) for answer in answers]
        references = [self._special.sub("", reference).strip() for reference in batch.references]
        self.scores.add_answers(said, references, batch.question_types, blank=dataloader_idx == 2)
        if dataloader_idx != 2:
            self.scores.captions.update(said, batch.samples[: len(said)], batch.turns[: len(said)])
        return {"answers": answers}

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, split: metric_names.Stage) -> None:
        for name, value in self.scores.compute(split).items():
            self.log(name, value, prog_bar=name in (f"{split}/loss", f"{split}/exact_match"))

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """One row per question: id, origin, turn, generated answer, reference answer, and the row's ``references``."""
        if not isinstance(batch, PromptBatch):
            raise UserError(
                "predict answers the questions of a data module.",
                f"A batch is a {type(batch).__name__}.",
                "Give MMDataModule(predict=FILE), or call module.generate(image, question).",
            )
        rows = zip(batch.samples, batch.turns, self.answer(batch), strict=True)
        return [
            {"id": s.id, "origin": s.origin, "turn": turn, "answer": answer, "reference": s.turns[turn].text}
            | ({"references": list(listed)} if (listed := references_of(s, turn)) else {})
            for s, turn, answer in rows
        ]
