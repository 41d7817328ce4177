"""Edits of one layer tried out: which layer, each alone or all at once, and beside them the same weight fine-tuned.

Data flow: ``EditFile`` + ``Scorer`` -> ``EditStudy`` (everything asked before) -> ``scan`` (a score by layer) and
``tried`` (an ``Outcome``: scores, losses, edits) -> the command line's tables. The model is left as it was.

Shapes: K conversations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.causal.editing.files import EditFile, Rewrite
from lightning_mm.causal.editing.finetune_control import fine_tuned
from lightning_mm.causal.editing.metrics import Probe, Score, Scorer, losses_of, overall
from lightning_mm.causal.editing.multedit import Association, EditOptions, Rewriting, edit_of
from lightning_mm.causal.editing.weight_edit import Edit, edited
from lightning_mm.causal.questions.question import Question
from lightning_mm.causal.questions.scoring import Forced
from lightning_mm.core.decisions import log
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch

Apply = Literal["each", "together"]
Method = Literal["MultEdit", "fine-tuned, same norm", "fine-tuned, no limit"]
METHODS: tuple[Method, ...] = ("MultEdit", "fine-tuned, same norm", "fine-tuned, no limit")
"""The edit, and the control: Adam on the same weight for as many steps, its change held within the edit's Frobenius
norm, or not."""


@dataclass(frozen=True, eq=False)
class Case:
    """One edit to be made.

    Args:
        rewrite: As read.
        target: The question with its new answer.
        probes: What is asked of it.
        right: Whether the model gave the right answer before; None where none is given.
    """

    rewrite: Rewrite
    target: Forced
    probes: tuple[Probe, ...]
    right: bool | None


@dataclass(eq=False)
class Outcome:
    """What came of one method.

    Args:
        method: Which.
        apply: Each edit alone, or all at once.
        scores: Of every probe.
        edits: As they were put in.
        answers: Edited question -> what the model then says.
        before: (K, 2) losses and tokens of the conversations asked, as the model was.
        after: (K, 2) the same, edited.
        groups: Of each of them: the edit it was asked after, or which conversation it is where there is one edit.
    """

    method: Method
    apply: Apply
    scores: list[Score] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    before: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    after: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    groups: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LayerScore:
    """One layer, over the edits that were tried there.

    Args:
        layer: Which.
        overall: Harmonic mean of efficacy, generalisation and specificity, as far as they were asked.
        efficacy: Share of new answers given.
        log_prob: Mean of the new answers, in nats.
        kept: Share of answers that stayed; None where none was to stay.
        steps: Mean number of steps that the values took.
    """

    layer: int
    overall: float
    efficacy: float
    log_prob: float
    kept: float | None
    steps: float


class EditStudy:
    """A file of edits on one model.

    Args:
        scorer: Of the model.
        file: What to edit.
        batches: Conversations for the general task's loss, one a batch.

    Raises:
        UserError: None of the edits can be asked.
    """

    def __init__(self, scorer: Scorer, file: EditFile, batches: Sequence[Batch]) -> None:
        self.scorer, self.file, self.batches = scorer, file, batches
        self.mm = scorer.mm
        self._found: dict[tuple[str, int, EditOptions], Association] = {}
        self.cases = [case for number in range(len(file.rewrites)) if (case := self._case(number)) is not None]
        self.losses = losses_of(self.mm, batches, scorer.device)
        if not self.cases:
            first = "\n    ".join(f"{r.origin}: {r.reason}" for r in scorer.rejected[:5])
            raise UserError("None of the edits can be made.", f"The first of them:\n    {first}", "Mend the rows.")

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that can be edited; what the last one puts out at a constraint is read by none."""
        return tuple(b.index for b in self.mm.layout.blocks[:-1] if b.down_proj is not None)

    def scan(self, layers: Sequence[int], options: EditOptions, count: int) -> list[LayerScore]:
        """Each of the first edits, alone, in each layer."""
        scores: dict[int, list[Score]] = {layer: [] for layer in layers}
        cases = self.cases[:count]
        for number, case in enumerate(cases):
            self._find(case, layers, options)
            for layer in layers:
                with edited(self.mm.model, [self._multedit([case], layer, options)]):
                    scores[layer] += self.scorer.measure(case.probes)
            log.info("layers tried with edit %d of %d", number + 1, len(cases))
        return [self._layer_score(layer, scores[layer], cases, options) for layer in layers]

    def tried(self, method: Method, apply: Apply, layer: int, options: EditOptions) -> Outcome:
        """Make the edits, ask everything, and take them out again."""
        outcome = Outcome(method, apply)
        parts = [[case] for case in self.cases] if apply == "each" else [self.cases]
        for number, part in enumerate(parts):
            edit = self._edit(method, part, layer, options)
            outcome.edits.append(edit)
            with edited(self.mm.model, [edit]):
                self._ask(outcome, part)
            log.info("%s, %s: %d of %d", method, apply, number + 1, len(parts))
        return outcome

    def association(self, case: Case, layer: int, options: EditOptions) -> Association:
        """What one edit wants of a layer."""
        self._find(case, [layer], options)
        return self._found[case.rewrite.question.id, layer, options]

    def _ask(self, outcome: Outcome, part: Sequence[Case]) -> None:
        alone = outcome.apply == "each"
        for case in part:
            # Where all are edited at once, the other edits' questions are not unrelated.
            probes = [p for p in case.probes if alone or self.file.staying or p.kind != "unrelated"]
            outcome.scores += self.scorer.measure(probes)
            said = self.scorer.own_answer(case.rewrite.question)
            outcome.answers[case.rewrite.question.id] = said if isinstance(said, str) else ""
        after = losses_of(self.mm, self.batches, self.scorer.device)
        outcome.before, outcome.after = torch.cat([outcome.before, self.losses]), torch.cat([outcome.after, after])
        name = part[0].rewrite.question.id
        outcome.groups += [name if alone else str(k) for k in range(len(after))]

    def _edit(self, method: Method, part: Sequence[Case], layer: int, options: EditOptions) -> Edit:
        if method == "fine-tuned, no limit":
            return fine_tuned(self.mm, [case.target for case in part], layer, options)
        edit = self._multedit(part, layer, options)
        if method == "MultEdit":
            return edit
        norm = float(edit.change().norm())
        return fine_tuned(self.mm, [case.target for case in part], layer, options, norm)

    def _multedit(self, part: Sequence[Case], layer: int, options: EditOptions) -> Edit:
        found = [self.association(case, layer, options) for case in part]
        return edit_of(self.mm, found, options.ridge)

    def _find(self, case: Case, layers: Sequence[int], options: EditOptions) -> None:
        """A run is written down once for all the layers, and not kept: it is large."""
        name = case.rewrite.question.id
        missing = [layer for layer in layers if (name, layer, options) not in self._found]
        rewriting = Rewriting(self.mm, case.target) if missing else None
        for layer in missing:
            assert rewriting is not None
            self._found[name, layer, options] = rewriting.association(layer, options)

    def _case(self, number: int) -> Case | None:
        rewrite = self.file.rewrites[number]
        probes = self.scorer.probes(rewrite, self.file.staying or self._others(number))
        edited_probe = next((probe for probe in probes if probe.kind == "edited"), None)
        if edited_probe is None or edited_probe.new is None:
            return None
        return Case(rewrite, edited_probe.new, tuple(probes), self.scorer.right(rewrite.question))

    def _others(self, number: int) -> list[Question]:
        """The questions of other edits about other things, the next ones first."""
        rewrites = self.file.rewrites
        turned = [each.question for each in (*rewrites[number + 1 :], *rewrites[:number])]
        return [question for question in turned if question.group != rewrites[number].question.group]

    def _layer_score(
        self, layer: int, scores: Sequence[Score], cases: Sequence[Case], options: EditOptions
    ) -> LayerScore:
        asked = [score for score in scores if score.kind == "edited"]
        stays = [score.kept for score in scores if score.kind in ("neighbour", "unrelated")]
        steps = [len(self.association(case, layer, options).losses) - 1 for case in cases]
        return LayerScore(
            layer,
            overall(scores),
            sum(s.said for s in asked) / len(asked),
            sum(s.log_prob for s in asked) / len(asked),
            sum(stays) / len(stays) if stays else None,
            sum(steps) / len(steps),
        )


def best(scores: Sequence[LayerScore]) -> LayerScore:
    """The layer with the best overall score; of equal ones, where the new answers are likeliest."""
    return max(scores, key=lambda each: (each.overall, each.log_prob))
