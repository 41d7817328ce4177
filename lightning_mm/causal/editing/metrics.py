"""Measures of an edit: efficacy, generalization, specificity, EasyEdit's measures, and the general task's loss.

Data flow: edit requests -> ``EditScorer.probes`` (questions asked of the unedited model: the edited question, its
paraphrases, other images, and questions whose answers must not change) -> an edit -> ``EditScorer.measure`` -> one
``EditScore`` per probe -> ``edit_measures``: named Estimates, with intervals clustered by the edited question's group;
losses of conversations before and after -> ``loss_change``.

An answer is given if greedy decoding writes it: each of its tokens is the most likely one given those before it. The
answer that must not change is the model's own greedy answer before the edit, including its end.

Shapes: K conversations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.causal.editing.files import EditRequest
from lightning_mm.causal.questions.question import Question, QuestionEncoder
from lightning_mm.causal.questions.scoring import (
    AnswerScore,
    ForcedAnswer,
    force_answer,
    score_answer,
)
from lightning_mm.core.estimate import Estimate
from lightning_mm.data.batch import Batch
from lightning_mm.data.sample import Rejection
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.geometry.resampling import clustered_mean_interval
from lightning_mm.models.generation import greedy_answers
from lightning_mm.models.handle import MultimodalModel

ProbeKind = Literal["edited", "paraphrase", "picture", "neighbour", "unrelated"]


@dataclass(frozen=True, eq=False)
class EditProbe:
    """One question that is asked before and after an edit.

    Args:
        edit: Id of the edited question.
        group: Cluster id, the group of the edited question.
        kind: What it tests.
        pictured: Whether the question has an image.
        new: The question with the new answer; None if its answer must not change.
        old: The question with the model's own greedy answer before the edit.
        new_before: Score of ``new`` before the edit; None if the answer must not change.
        old_before: Score of ``old`` before the edit.
    """

    edit: str
    group: str
    kind: ProbeKind
    pictured: bool
    new: ForcedAnswer | None
    old: ForcedAnswer
    new_before: AnswerScore | None
    old_before: AnswerScore


@dataclass(frozen=True)
class EditScore:
    """Results of one probe after an edit; field names are keys of edits.json.

    Args:
        edit: Id of the edited question.
        group: Cluster id, the group of the edited question.
        kind: What was tested.
        pictured: Whether the question has an image.
        said: Whether greedy decoding gives the new answer.
        said_before: Whether it did before the edit.
        share: Fraction of the new answer's tokens that are the most likely ones; NaN if the answer must not change.
        share_before: That fraction before the edit.
        prefers: Whether the new answer as a whole is more probable than the old one.
        preferred_before: Whether it was before the edit.
        log_prob: Log-probability of the new answer in nats; NaN if the answer must not change.
        kept: Whether the most likely token is unchanged at every position of the old answer.
        kept_share: Fraction of these positions at which it is unchanged.
        kl: KL(before || after) of the first token, in nats.
    """

    edit: str
    group: str
    kind: ProbeKind
    pictured: bool
    said: bool
    said_before: bool
    share: float
    share_before: float
    prefers: bool
    preferred_before: bool
    log_prob: float
    kept: bool
    kept_share: float
    kl: float


class EditScorer:
    """Asks a model the probes of edits, before and after.

    Args:
        mm: The unwrapped model in eval mode.
        encoder: Encodes questions for the model.
        device: Device of the model.
        max_new_tokens: Longest greedy answer that must not change, in tokens.
        num_unrelated: Number of unrelated questions asked after each edit.
    """

    def __init__(
        self,
        mm: MultimodalModel,
        encoder: QuestionEncoder,
        device: torch.device,
        max_new_tokens: int = 8,
        num_unrelated: int = 8,
    ) -> None:
        self.mm, self.encoder, self.device = mm, encoder, device
        self.max_new_tokens, self.num_unrelated = max_new_tokens, num_unrelated
        self.rejected: list[Rejection] = []
        self._own: dict[str, tuple[ForcedAnswer, AnswerScore] | None] = {}

    def probes(self, request: EditRequest, others: Sequence[Question]) -> list[EditProbe]:
        """All probes of one edit, asked of the unedited model; empty if the edited question cannot be encoded.

        Args:
            request: The edit.
            others: Unrelated questions; the first ``num_unrelated`` are asked.
        """
        question = request.question
        wordings: list[tuple[ProbeKind, Question, str | None]] = [("edited", question, None)]
        wordings += [("paraphrase", question, text) for text in request.paraphrases]
        wordings += [("picture", replace(question, images=images), None) for images in request.other_images]
        probes = [self._probe(kind, request, each, text) for kind, each, text in wordings]
        if probes[0] is None:
            return []
        locality: list[tuple[ProbeKind, Question]] = [("neighbour", each) for each in request.neighbors]
        locality += [("unrelated", each) for each in others[: self.num_unrelated]]
        probes += [self._probe(kind, request, each, stays=True) for kind, each in locality]
        return [probe for probe in probes if probe is not None]

    def measure(self, probes: Sequence[EditProbe]) -> list[EditScore]:
        """Scores of all probes on the model as it is now."""
        return [self._score(probe) for probe in probes]

    def own_answer(self, question: Question, text: str | None = None) -> str | Rejection:
        """The model's current greedy answer; a ``Rejection`` if the question cannot be encoded."""
        encoded = self.encoder.encode(question, text)
        if isinstance(encoded, Rejection):
            return encoded
        processor = self.encoder.processor
        return greedy_answers(self.mm.model, processor, encoded.to(self.device).inputs, self.max_new_tokens)[0]

    def is_right(self, question: Question) -> bool | None:
        """Whether the model answers the question correctly; None if it has no answer."""
        given = self._forced(question, question.answer, None) if question.answer else None
        return None if given is None else score_answer(self.mm, given).is_greedy

    def _probe(
        self, kind: ProbeKind, request: EditRequest, question: Question, text: str | None = None, stays: bool = False
    ) -> EditProbe | None:
        old = self._old(question, text)
        new = None if stays else self._forced(question, request.new_answer, text)
        if old is None or (new is None and not stays):
            return None
        before = score_answer(self.mm, new) if new is not None else None
        edited = request.question
        return EditProbe(edited.id, edited.group or edited.id, kind, bool(question.images), new, old[0], before, old[1])

    def _old(self, question: Question, text: str | None) -> tuple[ForcedAnswer, AnswerScore] | None:
        """The question with its greedy answer, and that answer's score; computed once per question."""
        key = repr((question.text, question.images, text))
        if key not in self._own:
            answer = self.own_answer(question, text)
            if isinstance(answer, Rejection):
                self.rejected.append(answer)
            made = None if isinstance(answer, Rejection) else self._forced(question, answer, text)
            self._own[key] = (made, score_answer(self.mm, made)) if made is not None else None
        return self._own[key]

    def _forced(self, question: Question, answer: str, text: str | None) -> ForcedAnswer | None:
        made = force_answer(self.encoder, question, answer, text)
        if isinstance(made, Rejection):
            self.rejected.append(made)
            return None
        return made.to(self.device)

    def _score(self, probe: EditProbe) -> EditScore:
        old, old_before = score_answer(self.mm, probe.old), probe.old_before
        new = score_answer(self.mm, probe.new) if probe.new is not None else None
        new_before = probe.new_before
        is_same = (old.predicted == old_before.predicted).float()
        return EditScore(
            probe.edit,
            probe.group,
            probe.kind,
            probe.pictured,
            said=new is not None and new.is_greedy,
            said_before=new_before is not None and new_before.is_greedy,
            share=new.token_accuracy if new is not None else math.nan,
            share_before=new_before.token_accuracy if new_before is not None else math.nan,
            prefers=new is not None and bool(new.log_probs.sum() > old.log_probs.sum()),
            preferred_before=new_before is not None and bool(new_before.log_probs.sum() > old_before.log_probs.sum()),
            log_prob=float(new.log_probs.sum()) if new is not None else math.nan,
            kept=bool(is_same.all()),
            kept_share=float(is_same.mean()),
            kl=float((old_before.first_log_probs.exp() * (old_before.first_log_probs - old.first_log_probs)).sum()),
        )


Choose = Callable[[EditScore], bool]
Value = Callable[[EditScore], float]


def _kind(*kinds: ProbeKind) -> Choose:
    return lambda score: score.kind in kinds


def _stays(pictured: bool) -> Choose:
    return lambda score: score.kind in ("neighbour", "unrelated") and score.pictured == pictured


MEASURES: dict[str, tuple[Choose, Value, Value | None]] = {
    "efficacy": (_kind("edited"), lambda s: s.said, lambda s: s.said_before),
    "efficacy, p(new) > p(old)": (_kind("edited"), lambda s: s.prefers, lambda s: s.preferred_before),
    "generalisation, other words": (_kind("paraphrase"), lambda s: s.said, lambda s: s.said_before),
    "generalisation, other pictures": (_kind("picture"), lambda s: s.said, lambda s: s.said_before),
    "specificity, neighbours": (_kind("neighbour"), lambda s: s.kept, None),
    "specificity, unrelated": (_kind("unrelated"), lambda s: s.kept, None),
    "KL of the first token, neighbours": (_kind("neighbour"), lambda s: s.kl, None),
    "KL of the first token, unrelated": (_kind("unrelated"), lambda s: s.kl, None),
    "rewrite_acc": (_kind("edited"), lambda s: s.share, lambda s: s.share_before),
    "rephrase_acc": (_kind("paraphrase"), lambda s: s.share, lambda s: s.share_before),
    "image_rephrase_acc": (_kind("picture"), lambda s: s.share, lambda s: s.share_before),
    "locality": (_stays(False), lambda s: s.kept_share, None),
    "multimodal_locality": (_stays(True), lambda s: s.kept_share, None),
}
"""Name -> which probes count, the value that is averaged over them, and its value before the edit. The last five are
EasyEdit's: fractions of tokens instead of whole answers; ``locality`` covers text-only questions."""


def edit_measures(scores: Sequence[EditScore]) -> dict[str, Estimate]:
    """All of ``MEASURES``; the null is the value before the edit, where there is one."""
    measures = {}
    for name, (chosen, value, before) in MEASURES.items():
        kept = [score for score in scores if chosen(score)]
        measures[name] = _mean([value(s) for s in kept], [s.group for s in kept], bounded=not name.startswith("KL"))
        if kept and before is not None:
            measures[name] = replace(measures[name], null=sum(map(before, kept)) / len(kept))
    return measures


def overall_score(scores: Sequence[EditScore]) -> float:
    """Harmonic mean of efficacy, generalization and specificity, as far as measured (the score of Meng et al. 2022)."""
    parts: tuple[tuple[ProbeKind, ...], ...] = (("edited",), ("paraphrase", "picture"), ("neighbour", "unrelated"))
    means = []
    for kinds in parts:
        rates = [float(s.kept if kinds == parts[2] else s.said) for s in scores if s.kind in kinds]
        means += [sum(rates) / len(rates)] if rates else []
    return len(means) / sum(1 / mean for mean in means) if means and min(means) > 0 else 0.0


@torch.no_grad()
def conversation_losses(mm: MultimodalModel, batches: Sequence[Batch], device: torch.device) -> Tensor:
    """(K, 2) float64 summed loss in nats and number of supervised tokens, for each conversation (one per batch)."""
    head = mm.model.get_submodule(mm.layout.head)
    found = [supervised_nll(mm.model, head, batch.to(device)) for batch in batches]
    return torch.tensor([[float(each.nll), each.num_tokens] for each in found], dtype=torch.float64).reshape(-1, 2)


def loss_change(before_K2: Tensor, after_K2: Tensor, groups: Sequence[str]) -> tuple[Estimate, Estimate]:
    """Mean loss per supervised token after an edit (null: before), and its increase.

    Args:
        before_K2: Losses and token counts before the edit, from ``conversation_losses``.
        after_K2: Losses and token counts of the same conversations after the edit.
        groups: (K) cluster ids: the edit, or the conversation if all edits are applied at once.
    """
    if not len(before_K2):
        return Estimate.undefined_because("no conversations were given", 0), Estimate.undefined_because(
            "no conversations were given", 0
        )
    tokens_K = before_K2[:, 1]
    values = []
    for sums_K in (after_K2[:, 0], after_K2[:, 0] - before_K2[:, 0]):
        # Ratio of sums: its interval is that of the linearized residuals.
        ratio = sums_K.sum() / tokens_K.sum()
        terms_K = ratio + (sums_K - ratio * tokens_K) / tokens_K.mean()
        values.append(_mean(terms_K.tolist(), groups, bounded=False))
    return replace(values[0], null=float(before_K2[:, 0].sum() / tokens_K.sum())), values[1]


def _mean(values: Sequence[float], groups: Sequence[str], bounded: bool) -> Estimate:
    if not values:
        return Estimate.undefined_because("no such question was given", 0)
    index = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    ids = torch.tensor([index[group] for group in groups])
    mean, low, high = (float(x) for x in clustered_mean_interval(torch.tensor([values], dtype=torch.float64), ids))
    if bounded:
        low, high = (max(0.0, low), min(1.0, high)) if not math.isnan(low) else (low, high)
    return Estimate.of(mean, len(values), low=low, high=high)
