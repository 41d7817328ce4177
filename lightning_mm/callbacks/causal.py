"""CausalCallback: causal effect of each layer on the answers during training: ablation, knockout, transplant curves.

Data flow: a few questions of the validation data (or of a file) -> answered by the current model -> ``causal.study``
and ``causal.effects.layer_transplant`` -> rows of layers.csv. Training is unaffected.

The effect is on the probability of the right answer's first token, even where the model would answer differently:
early in training few answers are right. Only rank 0 computes, on the unwrapped model; the other ranks wait.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_mm.analysis.findings import Findings
from lightning_mm.callbacks.base import LayerCallback
from lightning_mm.callbacks.runner import InspectionInput
from lightning_mm.callbacks.schedule import Schedule
from lightning_mm.callbacks.subject import Subject
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
from lightning_mm.core.distributed import rank_and_world_size
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.data.collator import Collator
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.image_source import image_file
from lightning_mm.data.sample import IMAGE_MARK, VIDEO_MARK, Rejection, Sample, Turn
from lightning_mm.models.handle import MultimodalModel, unwrap_model

PARTS = ("ablation", "knockout", "flow", "trace")
DEFAULT = ("ablation", "knockout")
MIN_PROBABILITY = 1e-4
"""Right answers below this probability are left out: their relative changes would be noise."""


class CausalCallback(LayerCallback):
    """Layer ablation, attention knockout and transplantation of what was trained, on a small set.

    Args:
        schedule: When to look, and how much time that may take.
        questions: A file of questions with constraints; the first of the validation data if not given, for which the
            run needs an ``MMDataModule``.
        count: How many questions.
        parts: ablation, knockout, flow, trace: what is found out about them.
        transplant: Whether to put trained layers into the starting model, some at a time. Where no adapters are
            trained, that keeps a copy of the layers as they were before the first step in memory.
        batches: Batches of training conversations that hybrids are asked; without an ``MMDataModule``, those of
            ``questions``.
        model: Path of the multimodal LLM in a LightningModule that is not ours; None: the one in it.
        processor: Its processor; None: the module's ``processor``.
        probes: A ``ProbeSet``, a file or rows of pictures with captions and objects, or ``Probes`` (how many, and how
            many at a time); None: the data module's.
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        questions: str | None = None,
        count: int = 8,
        parts: Sequence[str] = DEFAULT,
        transplant: bool = True,
        batches: int = 2,
        model: str | None = None,
        processor: Any = None,
        probes: Any = None,
    ) -> None:
        super().__init__(schedule, model, processor, probes)
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
        self._encoded: list[EncodedQuestion] | None = None
        self._batches: list[Batch] = []
        self._start: dict[str, Tensor] = {}

    def begin(self, subject: Subject, step: int) -> None:
        """Keep the trained weights before the first step, on rank 0.

        Raises:
            UserError: There is nothing to ask: no file of questions, and no data module of ours.
        """
        if self.questions is None and subject.data is None:
            raise UserError(
                "CausalCallback has no questions.",
                "None were given, and the run's data module is not an MMDataModule.",
                'Give a file of them: CausalCallback(questions="questions.json").',
            )
        if self.transplant and step == 0 and rank_and_world_size()[0] == 0:
            self._keep_start(subject)

    def analyze(self, data: InspectionInput) -> Findings:
        with data.subject.evaluating():
            return self._run_study(data, data.subject)

    def _run_study(self, data: InspectionInput, subject: Subject) -> Findings:
        processing = subject.data.processing if subject.data is not None else subject.mm.required_processor
        mm = replace(subject.mm, model=unwrap_model(subject.mm.model), processor=processing)
        encoder = QuestionEncoder(processing)
        if self._encoded is None:
            self._encoded = self._draw(encoder, subject.data)
        answers, rejected = answer_questions(mm, encoder, self._encoded, data.device)
        known = [replace(each, right=True) for each in answers if each.probability >= MIN_PROBABILITY]
        options = StudyConfig(parts=self.parts, num_ablated=self.count, ablations=("skip", "mean/image"), num_shown=0)
        study = run_study(mm, known, options, {}, data.step)
        findings = study.findings
        lost = [f"{each.origin}: {each.reason}" for each in (*rejected, *study.rejected)]
        if len(known) < len(answers):
            lost.append(
                f"{len(answers) - len(known)} of {len(answers)} right answers have less than {MIN_PROBABILITY:.2%} yet"
            )
        findings.problems += [f"CausalCallback: {each}" for each in lost]
        if data.step and self.transplant:
            try:
                self._add_transplant_curve(findings, mm, subject)
            except (UserError, RuntimeError, LookupError) as error:  # the other findings are kept
                findings.problems.append(f"CausalCallback: no transplant curve: {error}")
        return findings

    def _draw(self, encoder: QuestionEncoder, data: MMDataModule | None) -> list[EncodedQuestion]:
        """The encoded questions; the same at every inspection.

        Raises:
            UserError: No question can be encoded.
        """
        if self.questions is not None:
            root = data.image_root if data is not None else None
            source, drawn = self.questions, read_questions(self.questions, root).questions
        else:
            assert data is not None, "refused at the start"
            split = "val" if data.samples("val") else "train"
            source, drawn = f"data.{split}", first_turns(data.samples(split))
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

    def _keep_start(self, subject: Subject) -> None:
        """Copy the trained weights to the CPU before the first step; adapters need no copy."""
        self._start = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in unwrap_model(subject.mm.model).named_parameters()
            if parameter.requires_grad and ".lora_" not in name
        }
        if self._start:
            held = sum(tensor.nbytes for tensor in self._start.values()) / 2**20
            log_decision(
                "causal.transplant", f"{held:.0f} MiB kept", "what is trained, as it was before the first step"
            )

    def _add_transplant_curve(self, found: Findings, mm: MultimodalModel, subject: Subject) -> None:
        plan, device = subject.plan, subject.device
        trained, adapted = plan.layers, bool(plan.adapted_weights)
        if not trained or not (self._start or adapted):
            why = "the layers before the first step are not at hand" if trained else "no decoder layer is trained"
            log_decision("causal.transplant", "not measured", why)
            return
        hybrid = hybrid_from_start(mm, self._start)
        hybrid = combine_hybrids(hybrid_from_adapters(mm), hybrid) if adapted else hybrid
        self._batches = self._batches or self._conversations(mm, subject.data)
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

    def _conversations(self, mm: MultimodalModel, data: MMDataModule | None) -> list[Batch]:
        """Batches that hybrids are asked: of the training data, or the questions with their answers."""
        if data is not None:
            return data.sample_batches(self.batches, 8)
        log_decision("causal.batches", "the questions", "there is no data module with training conversations")
        collator = Collator(mm.required_processor, None)
        asked = [each.question for each in self._encoded or () if each.question.answer]
        made = [collator([conversation(each) for each in asked[at : at + 8]]) for at in range(0, len(asked), 8)]
        return made[: self.batches]


def conversation(question: Question) -> Sample:
    """A question and its answer as a conversation."""
    marks = IMAGE_MARK * len(question.images)
    turns = (
        Turn("user", f"{marks}\n{question.text}" if marks else question.text),
        Turn("assistant", question.answer or ""),
    )
    return Sample(question.id, turns, question.images, question.id)


def first_turns(samples: Sequence[Sample]) -> tuple[Question, ...]:
    """The first question and answer of each conversation, without constraints; system turns are left out.

    So are conversations whose first answer is context only, or whose first question is about a video.
    """
    made = []
    for sample in samples:
        turns = [turn for turn in sample.turns if turn.role != "system"]
        if len(turns) < 2 or VIDEO_MARK in turns[0].text:
            continue
        if turns[0].role == "user" and turns[1].role == "assistant" and turns[1].train:
            text = turns[0].text.replace(IMAGE_MARK, "").strip()
            images = tuple(image_file(image) for image in sample.images[: turns[0].text.count(IMAGE_MARK)])
            group = str(images[0]) if images else sample.id
            made.append(Question(sample.id, text, images, (), turns[1].text, group=group, kind=turns[1].question_type))
    return tuple(made)
