"""What is asked before and after an edit: the question itself, in other words, of other pictures, and what must stay.

Data flow: rewrites -> ``Scorer.probes`` (everything asked of the model as it is) -> an edit -> ``Scorer.measure`` ->
one ``Score`` per probe -> ``edit_scores`` averages them.

An answer is given where greedy decoding writes it: each of its tokens is the most likely one given those before it.
What must stay is the model's own greedy answer before the edit, its end included.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lightning_mm.causal.edit_rows import Rewrite
from lightning_mm.causal.forcing import Forced, Heard, forced, heard
from lightning_mm.causal.questions import Asker, Question
from lightning_mm.data.sample import Rejection
from lightning_mm.models.anatomy import Anatomy
from lightning_mm.models.answering import greedy_answers

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
        anatomy: Of it.
        asker: Of the model.
        device: Where the model is.
        max_new_tokens: Longest answer that must stay.
        num_unrelated: Unrelated questions that are asked after each edit.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        asker: Asker,
        device: torch.device,
        max_new_tokens: int = 8,
        num_unrelated: int = 8,
    ) -> None:
        self.model, self.anatomy, self.asker, self.device = model, anatomy, asker, device
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
        return greedy_answers(self.model, processor, asked.to(self.device).inputs, self.max_new_tokens)[0]

    def right(self, question: Question) -> bool | None:
        """Whether greedy decoding begins with the answer given; None where none is."""
        given = self._forced(question, question.answer, None) if question.answer else None
        return None if given is None else heard(self.model, self.anatomy, given).said

    def _probe(
        self, kind: Kind, rewrite: Rewrite, question: Question, text: str | None = None, stays: bool = False
    ) -> Probe | None:
        old = self._old(question, text)
        new = None if stays else self._forced(question, rewrite.new_answer, text)
        if old is None or (new is None and not stays):
            return None
        before = heard(self.model, self.anatomy, new) if new is not None else None
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
            self._own[key] = (made, heard(self.model, self.anatomy, made)) if made is not None else None
        return self._own[key]

    def _forced(self, question: Question, answer: str, text: str | None) -> Forced | None:
        made = forced(self.asker, question, answer, text)
        if isinstance(made, Rejection):
            self.rejected.append(made)
            return None
        return made.to(self.device)

    def _score(self, probe: Probe) -> Score:
        old, was = heard(self.model, self.anatomy, probe.old), probe.old_before
        new = heard(self.model, self.anatomy, probe.new) if probe.new is not None else None
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
