"""CausalCallback: what causes the answers, while the model trains: ablation, knockout and transplant curves.

Data flow: a few questions of the validation data (or of a file) -> asked as the model is now -> ``causal.study`` and
``causal.transplant`` -> rows of layers.csv. Training is as if nothing had happened.

What is followed is the probability of the right answer's first token, also where the model would say another: early in
training it says little that is right. Rank 0 does it alone, on the plain model; the other ranks wait for it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from lightning_mm.analysis.findings import Findings
from lightning_mm.callbacks.base import InspectingCallback
from lightning_mm.callbacks.runner import Look
from lightning_mm.callbacks.schedule import Schedule
from lightning_mm.causal.effects.layer_transplant import (
    combine_hybrids,
    hybrid_from_adapters,
    hybrid_from_start,
    score_conversations,
    transplant_curve,
    transplant_rows,
    transplant_windows,
)
from lightning_mm.causal.questions.files import read_questions
from lightning_mm.causal.questions.question import EncodedQuestion, Question, QuestionEncoder
from lightning_mm.causal.questions.scoring import answer_questions
from lightning_mm.causal.study import StudyConfig, run_study
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.sample import IMAGE_MARK, Rejection, Sample
from lightning_mm.models.handle import MultimodalModel, unwrap_model
from lightning_mm.training.eval_context import data_of, live, looking

PARTS = ("ablation", "knockout", "flow", "trace")
DEFAULT = ("ablation", "knockout")
LEAST = 1e-4
"""A right answer that is less probable has nothing to lose: its relative changes would be noise."""


class CausalCallback(InspectingCallback):
    """Layer ablation, attention knockout and transplantation of what was trained, on a small set.

    Args:
        schedule: When to look, and how much time that may take.
        questions: A file of questions with constraints; the first of the validation data if not given.
        count: How many questions.
        parts: ablation, knockout, flow, trace: what is found out about them.
        transplant: Whether to put trained layers into the starting model, some at a time. Where no adapters are
            trained, that keeps a copy of the layers as they were before the first step in memory.
        batches: Batches of training conversations that hybrids are asked.
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        questions: str | None = None,
        count: int = 8,
        parts: Sequence[str] = DEFAULT,
        transplant: bool = True,
        batches: int = 2,
    ) -> None:
        super().__init__(schedule)
        if count < 1 or batches < 1:
            raise UserError(
                "CausalCallback has nothing to ask.", f"count {count}, batches {batches}.", "Give 1 or more."
            )
        for part in parts:
            if part not in PARTS:
                raise UserError(
                    f"CausalCallback: there is no part {part!r}.", f"There are {', '.join(PARTS)}.", "Name those."
                )
        self.questions, self.count, self.parts = questions, count, tuple(parts)
        self.transplant, self.batches = transplant, batches
        self._trainer: L.Trainer | None = None
        self._module: L.LightningModule | None = None
        self._asked: list[EncodedQuestion] | None = None
        self._batches: list[Batch] = []
        self._start: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer, self._module = trainer, pl_module
        if self.transplant and trainer.is_global_zero and trainer.global_step == 0:
            self._keep_start()
        super().on_train_start(trainer, pl_module)

    def analyse(self, look: Look) -> Findings:
        assert self._trainer is not None
        assert self._module is not None
        with looking(self._trainer, self._module):
            return self._found(look)

    def _found(self, look: Look) -> Findings:
        assert self._module is not None
        module = live(self._module)
        mm = replace(module.mm, model=unwrap_model(module.mm.model), processor=self._data.processing)
        encoder = QuestionEncoder(self._data.processing)
        if self._asked is None:
            self._asked = self._draw(encoder)
        answers, rejected = answer_questions(mm, encoder, self._asked, look.device)
        known = [replace(each, right=True) for each in answers if each.probability >= LEAST]
        options = StudyConfig(parts=self.parts, num_ablated=self.count, ablations=("skip", "mean/image"), num_shown=0)
        found = run_study(mm, known, options, {}, look.step)
        told = found.findings
        lost = [f"{each.origin}: {each.reason}" for each in (*rejected, *found.rejected)]
        if len(known) < len(answers):
            lost.append(f"{len(answers) - len(known)} of {len(answers)} right answers have less than {LEAST:.2%} yet")
        told.problems += [f"CausalCallback: {each}" for each in lost]
        if look.step and self.transplant:
            try:
                self._transplanted(told, mm, look.device)
            except (UserError, RuntimeError, LookupError) as error:  # what else was found is kept
                told.problems.append(f"CausalCallback: no transplant curve: {error}")
        return told

    def _draw(self, encoder: QuestionEncoder) -> list[EncodedQuestion]:
        """The questions, asked once and kept.

        Raises:
            UserError: None can be asked.
        """
        if self.questions is not None:
            source, drawn = self.questions, read_questions(self.questions, self._data.image_root).questions
        else:
            split = "val" if self._data.samples("val") else "train"
            source, drawn = f"data.{split}", first_turns(self._data.samples(split))
        found: list[EncodedQuestion] = []
        lost: list[Rejection] = []
        for question in drawn:
            encoded = encoder.encode(question)
            if isinstance(encoded, EncodedQuestion):
                found.append(encoded)
            else:
                lost.append(encoded)
            if len(found) == self.count:
                break
        why = f"; {len(lost)} could not be asked, the first: {lost[0].reason}" if lost else ""
        if not found:
            raise UserError(f"There is no question in {source}.", f"It holds {len(drawn)}{why}.", "Give another file.")
        log_decision("causal.questions", len(found), f"the first of {source}{why}")
        return found

    def _keep_start(self) -> None:
        """What is trained as it was before the first step; adapters need no copy."""
        assert self._module is not None
        self._start = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in unwrap_model(live(self._module).mm.model).named_parameters()
            if parameter.requires_grad and ".lora_" not in name
        }
        if self._start:
            held = sum(tensor.nbytes for tensor in self._start.values()) / 2**20
            log_decision(
                "causal.transplant", f"{held:.0f} MiB kept", "what is trained, as it was before the first step"
            )

    def _transplanted(self, found: Findings, mm: MultimodalModel, device: torch.device) -> None:
        assert self._module is not None
        module = live(self._module)
        trained, adapted = module.plan.layers, module.plan.lora is not None
        if not trained or not (self._start or adapted):
            why = "the layers before the first step are not at hand" if trained else "no decoder layer is trained"
            log_decision("causal.transplant", "not measured", why)
            return
        hybrid = hybrid_from_start(mm, self._start)
        hybrid = combine_hybrids(hybrid_from_adapters(mm), hybrid) if adapted else hybrid
        self._batches = self._batches or self._data.sample_batches(self.batches, 8)
        with hybrid(()):
            untouched = score_conversations(mm, self._batches, device)
        chosen = {
            trained[shown]: [trained[i] for i in layers]
            for shown, layers in transplant_windows("cumulative", len(trained), step=max(1, len(trained) // 4)).items()
        }
        curve = transplant_curve(mm, hybrid, self._batches, device, chosen)
        for site, rows in transplant_rows("cumulative", curve, untouched):
            for layer, estimate in rows.items():
                found.add("causal", "transplant", site, [estimate], first=layer)

    @property
    def _data(self) -> MMDataModule:
        assert self._trainer is not None
        return data_of(self._trainer)


def first_turns(samples: Sequence[Sample]) -> tuple[Question, ...]:
    """The first question and answer of each conversation, without constraints; system turns are left out."""
    made = []
    for sample in samples:
        turns = [turn for turn in sample.turns if turn.role != "system"]
        if len(turns) >= 2 and turns[0].role == "user" and turns[1].role == "assistant":
            text = turns[0].text.replace(IMAGE_MARK, "").strip()
            images = tuple(Path(image) for image in sample.images[: turns[0].text.count(IMAGE_MARK)])
            group = str(images[0]) if images else sample.id
            made.append(Question(sample.id, text, images, (), turns[1].text, group=group, kind=turns[1].question_type))
    return tuple(made)
