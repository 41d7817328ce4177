"""What is asked before and after an edit: the question itself, in other words, of other pictures, and what must stay.

Data flow: rewrites -> ``Scorer.probes`` (everything asked of the model as it is) -> an edit -> ``Scorer.measure`` ->
one ``Score`` per probe -> ``edit_scores`` averages them.

An answer is given where greedy decoding writes it: each of its tokens is the most likely one given those before it.
What must stay is the model's own greedy answer before the edit, its end included.

How well an edit did: efficacy, generalisation, specificity, EasyEdit's measures, and the general task's loss.

Data flow: ``Score`` per probe -> ``scores_of``: named Estimates, intervals clustered by the edited question's group;
losses of conversations before and after -> ``loss_change``.

Shapes: K conversations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.causal.editing.files import Rewrite
from lightning_mm.causal.questions.question import Asker, Question
from lightning_mm.causal.questions.scoring import Forced, Heard, forced, heard
from lightning_mm.core.estimate import Estimate, finite, undefined
from lightning_mm.data.batch import Batch
from lightning_mm.data.sample import Rejection
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.geometry.resampling import mean_interval
from lightning_mm.models.generation import greedy_answers
from lightning_mm.models.handle import MultimodalModel

Kind = Literal["edited", "paraphrase", "picture", "neighbour", "unrelated"]


@dataclass(frozen=True, eq=False)
class Probe:
    """One question to be asked before and after an edit.

    Args:
        edit: Id of the edited question.
        group: Of that question.
        kind: What it tests.
        pictured: Whether it is asked about a picture.
        new: With the new answer; None where the answer must stay.
        old: With the model's own answer to it.
        new_before: What the model made of ``new``.
        old_before: Of ``old``.
    """

    edit: str
    group: str
    kind: Kind
    pictured: bool
    new: Forced | None
    old: Forced
    new_before: Heard | None
    old_before: Heard


@dataclass(frozen=True)
class Score:
    """One probe after an edit.

    Args:
        edit: Id of the edited question.
        group: Of that question.
        kind: What was tested.
        pictured: Whether it was asked about a picture.
        said: Whether the new answer is given.
        said_before: Whether it was before.
        share: Of the new answer's tokens that are the most likely ones.
        share_before: Before.
        prefers: Whether the new answer is more probable, as a whole, than the one it gave before.
        preferred_before: Before.
        log_prob: Of the new answer, in nats; NaN where the answer must stay.
        kept: Whether the most likely token is what it was, all along the old answer.
        kept_share: Of those tokens that are what they were.
        kl: KL(before || after) of the first token, in nats.
    """

    edit: str
    group: str
    kind: Kind
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


class Scorer:
    """All probes of some rewrites, asked of the model as it is; made before anything is edited.

    Args:
        model: The plain model in eval mode.
        layout: Of it.
        asker: Of the model.
        device: Where the model is.
        max_new_tokens: Longest answer that must stay.
        num_unrelated: Unrelated questions that are asked after each edit.
    """

    def __init__(
        self,
        mm: MultimodalModel,
        asker: Asker,
        device: torch.device,
        max_new_tokens: int = 8,
        num_unrelated: int = 8,
    ) -> None:
        self.mm, self.asker, self.device = mm, asker, device
        self.max_new_tokens, self.num_unrelated = max_new_tokens, num_unrelated
        self.rejected: list[Rejection] = []
        self._own: dict[str, tuple[Forced, Heard] | None] = {}

    def probes(self, rewrite: Rewrite, others: Sequence[Question]) -> list[Probe]:
        """Everything that is asked of one edit; none where the edited question itself cannot be asked.

        Args:
            rewrite: What is edited.
            others: Unrelated questions, of which the first ones are asked.
        """
        question = rewrite.question
        asked: list[tuple[Kind, Question, str | None]] = [("edited", question, None)]
        asked += [("paraphrase", question, text) for text in rewrite.paraphrases]
        asked += [("picture", replace(question, images=images), None) for images in rewrite.other_images]
        made = [self._probe(kind, rewrite, each, text) for kind, each, text in asked]
        if made[0] is None:
            return []
        staying: list[tuple[Kind, Question]] = [("neighbour", each) for each in rewrite.neighbours]
        staying += [("unrelated", each) for each in others[: self.num_unrelated]]
        made += [self._probe(kind, rewrite, each, stays=True) for kind, each in staying]
        return [probe for probe in made if probe is not None]

    def measure(self, probes: Sequence[Probe]) -> list[Score]:
        """Ask the model as it is now."""
        return [self._score(probe) for probe in probes]

    def own_answer(self, question: Question, text: str | None = None) -> str | Rejection:
        """What the model says now, by greedy decoding."""
        asked = self.asker.ask(question, text)
        if isinstance(asked, Rejection):
            return asked
        processor = self.asker.processor
        return greedy_answers(self.mm.model, processor, asked.to(self.device).inputs, self.max_new_tokens)[0]

    def right(self, question: Question) -> bool | None:
        """Whether greedy decoding begins with the answer given; None where none is."""
        given = self._forced(question, question.answer, None) if question.answer else None
        return None if given is None else heard(self.mm, given).said

    def _probe(
        self, kind: Kind, rewrite: Rewrite, question: Question, text: str | None = None, stays: bool = False
    ) -> Probe | None:
        old = self._old(question, text)
        new = None if stays else self._forced(question, rewrite.new_answer, text)
        if old is None or (new is None and not stays):
            return None
        before = heard(self.mm, new) if new is not None else None
        edited = rewrite.question
        return Probe(edited.id, edited.group or edited.id, kind, bool(question.images), new, old[0], before, old[1])

    def _old(self, question: Question, text: str | None) -> tuple[Forced, Heard] | None:
        """The answer that a question has: asked once, however many edits it is asked after."""
        key = repr((question.text, question.images, text))
        if key not in self._own:
            answer = self.own_answer(question, text)
            if isinstance(answer, Rejection):
                self.rejected.append(answer)
            made = None if isinstance(answer, Rejection) else self._forced(question, answer, text)
            self._own[key] = (made, heard(self.mm, made)) if made is not None else None
        return self._own[key]

    def _forced(self, question: Question, answer: str, text: str | None) -> Forced | None:
        made = forced(self.asker, question, answer, text)
        if isinstance(made, Rejection):
            self.rejected.append(made)
            return None
        return made.to(self.device)

    def _score(self, probe: Probe) -> Score:
        old, was = heard(self.mm, probe.old), probe.old_before
        new = heard(self.mm, probe.new) if probe.new is not None else None
        same = (old.likeliest == was.likeliest).float()
        before = probe.new_before
        return Score(
            probe.edit,
            probe.group,
            probe.kind,
            probe.pictured,
            said=new is not None and new.said,
            said_before=before is not None and before.said,
            share=new.share if new is not None else math.nan,
            share_before=before.share if before is not None else math.nan,
            prefers=new is not None and bool(new.log_probs.sum() > old.log_probs.sum()),
            preferred_before=before is not None and bool(before.log_probs.sum() > was.log_probs.sum()),
            log_prob=float(new.log_probs.sum()) if new is not None else math.nan,
            kept=bool(same.all()),
            kept_share=float(same.mean()),
            kl=float((was.first.exp() * (was.first - old.first)).sum()),
        )


Choose = Callable[[Score], bool]
Value = Callable[[Score], float]


def _kind(*kinds: Kind) -> Choose:
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
"""Name -> which probes it rests on, what is averaged over them, and what that was before the edit. The last five are
EasyEdit's: shares of tokens rather than of whole answers; ``locality`` is over questions in text only."""


def scores_of(scores: Sequence[Score]) -> dict[str, Estimate]:
    """Every measure; its null is what it was before the edit, where that can be told."""
    made = {}
    for name, (chosen, value, before) in MEASURES.items():
        kept = [score for score in scores if chosen(score)]
        made[name] = _mean([value(s) for s in kept], [s.group for s in kept], bounded=not name.startswith("KL"))
        if kept and before is not None:
            made[name] = replace(made[name], null=sum(map(before, kept)) / len(kept))
    return made


def overall(scores: Sequence[Score]) -> float:
    """One number to choose layers by: the harmonic mean of efficacy, generalisation and specificity that were measured
    (Meng et al. 2022's score)."""
    parts: tuple[tuple[Kind, ...], ...] = (("edited",), ("paraphrase", "picture"), ("neighbour", "unrelated"))
    means = []
    for kinds in parts:
        rates = [float(s.kept if kinds == parts[2] else s.said) for s in scores if s.kind in kinds]
        means += [sum(rates) / len(rates)] if rates else []
    return len(means) / sum(1 / mean for mean in means) if means and min(means) > 0 else 0.0


@torch.no_grad()
def losses_of(mm: MultimodalModel, batches: Sequence[Batch], device: torch.device) -> Tensor:
    """(K, 2) float64 summed loss in nats, and supervised tokens, of each conversation, one a batch."""
    head = mm.model.get_submodule(mm.layout.head)
    found = [supervised_nll(mm.model, head, batch.to(device)) for batch in batches]
    return torch.tensor([[float(each.nll), each.num_tokens] for each in found], dtype=torch.float64).reshape(-1, 2)


def loss_change(before_K2: Tensor, after_K2: Tensor, groups: Sequence[str]) -> tuple[Estimate, Estimate]:
    """Mean loss per supervised token after an edit (its null: before), and by how much it rose.

    Args:
        before_K2: As ``losses_of`` gives it.
        after_K2: The same conversations.
        groups: Of each: what edits they were asked after, or which conversation they are.
    """
    if not len(before_K2):
        return undefined("no conversations were given", 0), undefined("no conversations were given", 0)
    tokens_K = before_K2[:, 1]
    values = []
    for sums_K in (after_K2[:, 0], after_K2[:, 0] - before_K2[:, 0]):
        # A ratio of sums: its error is that of the residuals (linearised).
        ratio = sums_K.sum() / tokens_K.sum()
        terms_K = ratio + (sums_K - ratio * tokens_K) / tokens_K.mean()
        values.append(_mean(terms_K.tolist(), groups, bounded=False))
    return replace(values[0], null=float(before_K2[:, 0].sum() / tokens_K.sum())), values[1]


def _mean(values: Sequence[float], groups: Sequence[str], bounded: bool) -> Estimate:
    if not values:
        return undefined("no such question was given", 0)
    index = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    ids = torch.tensor([index[group] for group in groups])
    mean, low, high = (float(x) for x in mean_interval(torch.tensor([values], dtype=torch.float64), ids))
    if bounded:
        low, high = (max(0.0, low), min(1.0, high)) if not math.isnan(low) else (low, high)
    return finite(mean, len(values), low=low, high=high)
