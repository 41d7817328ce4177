"""What a module does when it is asked instead of trained: teacher-forced losses, generated answers, their scores.

Data flow: Batch -> ``objective`` -> loss and token accuracy; PromptBatch -> ``answer`` -> exact match by question type.
"""

from typing import Any, cast

import lightning as L

from lightning_mm.core import metric_names
from lightning_mm.data.batch import Batch, PromptBatch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.execution.loss import LossOutput
from lightning_mm.models.generation import greedy_answers
from lightning_mm.training.answer_metrics import SplitScores


class Evaluating(L.LightningModule):
    """Validation, test and prediction of a multimodal LLM.

    Attributes:
        model: A transformers model; its class is known at run time only.
        processor: Of it.
        max_new_tokens: Longest answer.
    """

    model: Any
    processor: Any
    max_new_tokens: int

    def objective(self, batch: Batch) -> LossOutput:
        """Summed NLL of a batch."""
        raise NotImplementedError

    @property
    def _data(self) -> MMDataModule:
        return cast(MMDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]  # set by its data connector

    def answer(self, batch: PromptBatch) -> list[str]:
        """Greedy answers, one per question; none for a batch whose questions all fell out."""
        if not len(batch):
            return []
        return greedy_answers(self.model, self.processor, batch.inputs, self.max_new_tokens)

    def on_validation_epoch_start(self) -> None:
        self._begin_scores("val")

    def on_test_epoch_start(self) -> None:
        self._begin_scores("test")

    def _begin_scores(self, split: metric_names.Stage) -> None:
        types = self._data.question_types(split)
        self.scores = SplitScores(types).to(self.device)

    def validation_step(
        self, batch: Batch | PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, list[str]] | None:
        """Loss and token accuracy of teacher-forced batches; exact match of generated answers, which it returns."""
        if isinstance(batch, Batch):
            objective = self.objective(batch)
            self.scores.add(objective.nll, objective.num_correct, objective.num_tokens)
            return None
        scores = self.scores.blank_answers if dataloader_idx == 2 else self.scores.answers
        answers = self.answer(batch)
        scores.update(answers, batch.references, batch.question_types)
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
        """Answers with what they belong to, as plain rows."""
        rows = zip(batch.samples, batch.turns, self.answer(batch), strict=True)
        return [
            {"id": s.id, "origin": s.origin, "turn": turn, "answer": answer, "reference": s.turns[turn].text}
            for s, turn, answer in rows
        ]
