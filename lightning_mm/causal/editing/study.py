"""Makes and measures edits of one layer, each alone or all at once, compared with fine-tuning of the same weight.

Data flow: ``EditFile`` + ``EditScorer`` -> ``EditStudy`` (all probes asked of the unedited model) -> ``choose_layer``
(scores by layer) and ``run`` (an ``EditOutcome``: scores, losses, edits) -> ``tables``.

Shapes: K conversations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.causal.editing.files import EditFile, EditRequest
from lightning_mm.causal.editing.finetune_control import fine_tuned
from lightning_mm.causal.editing.metrics import EditProbe, EditScore, EditScorer, conversation_losses, overall_score
from lightning_mm.causal.editing.multedit import Association, EditConfig, ValueOptimizer, edit_from_associations
from lightning_mm.causal.editing.weight_edit import WeightEdit, apply_edits
from lightning_mm.causal.questions.question import Question
from lightning_mm.causal.questions.scoring import ForcedAnswer
from lightning_mm.core.decisions import log, log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch

Apply = Literal["each", "together"]
Method = Literal["MultEdit", "fine-tuned, same norm", "fine-tuned, no limit"]
METHODS: tuple[Method, ...] = ("MultEdit", "fine-tuned, same norm", "fine-tuned, no limit")
"""The edit, and the baseline: fine-tuning of the same weight for as many steps, with the edit's Frobenius norm as a
limit, or without limit."""

MAX_SCANNED_LAYERS = 12
"""Most layers that ``choose_layer`` tries; of more, every second or third one."""


@dataclass(frozen=True, eq=False)
class EditCase:
    """One edit, ready to be made.

    Args:
        request: The edit request.
        target: The question with its new answer.
        probes: Questions that are asked before and after the edit.
        right: Whether the unedited model answers correctly; None if the question has no answer.
    """

    request: EditRequest
    target: ForcedAnswer
    probes: tuple[EditProbe, ...]
    right: bool | None


@dataclass(eq=False)
class EditOutcome:
    """Results of one method.

    Args:
        method: The method.
        apply: ``each``: every edit alone; ``together``: all edits at once.
        scores: Scores of all probes.
        edits: The applied edits.
        answers: Id of the edited question -> the edited model's greedy answer.
        before: (K, 2) losses and token counts of the conversations, unedited.
        after: (K, 2) losses and token counts of the same conversations, edited.
        groups: (K) cluster ids: the edit, or the conversation if all edits are applied at once.
    """

    method: Method
    apply: Apply
    scores: list[EditScore] = field(default_factory=list)
    edits: list[WeightEdit] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    before: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    after: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    groups: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LayerScore:
    """Results of edits in one layer; field names are keys of edits.json.

    Args:
        layer: Index of the decoder block.
        overall: Harmonic mean of efficacy, generalization and specificity, as far as measured.
        efficacy: Fraction of new answers given.
        log_prob: Mean log-probability of the new answers, in nats.
        kept: Fraction of answers that did not change; None: no such question was asked.
        steps: Mean number of optimizer steps.
    """

    layer: int
    overall: float
    efficacy: float
    log_prob: float
    kept: float | None
    steps: float


class EditStudy:
    """Makes and measures a file of edits on one model, which is unchanged afterwards.

    Args:
        scorer: Asks the model.
        file: The edits.
        batches: Conversations for the general task's loss, one per batch.

    Raises:
        UserError: None of the edits can be asked.
    """

    def __init__(self, scorer: EditScorer, file: EditFile, batches: Sequence[Batch]) -> None:
        self.scorer, self.file, self.batches = scorer, file, batches
        self.mm = scorer.mm
        self._associations: dict[tuple[str, int, EditConfig], Association] = {}
        self.cases = [case for number in range(len(file.requests)) if (case := self._make_case(number)) is not None]
        self.losses = conversation_losses(self.mm, batches, scorer.device)
        if not self.cases:
            first = "\n    ".join(f"{r.origin}: {r.reason}" for r in scorer.rejected[:5])
            raise UserError("None of the edits can be made.", f"The first of them:\n    {first}", "Mend the rows.")

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that can be edited; no later layer reads the last one's output at the constraint."""
        return tuple(b.index for b in self.mm.layout.blocks[:-1] if b.down_proj is not None)

    def scan(self, layers: Sequence[int], config: EditConfig, count: int) -> list[LayerScore]:
        """Make each of the first ``count`` edits, alone, in each layer."""
        scores: dict[int, list[EditScore]] = {layer: [] for layer in layers}
        cases = self.cases[:count]
        for number, case in enumerate(cases):
            self._optimize(case, layers, config)
            for layer in layers:
                with apply_edits(self.mm.model, [self._multedit([case], layer, config)]):
                    scores[layer] += self.scorer.measure(case.probes)
            log.info("layers tried with edit %d of %d", number + 1, len(cases))
        return [self._layer_score(layer, scores[layer], cases, config) for layer in layers]

    def check_layer(self, layer: int) -> None:
        """Raise a ``UserError`` if the layer cannot be edited."""
        if layer not in self.layers:
            raise UserError(
                f"Layer {layer} cannot be edited.",
                "It has no plain MLP, or is the last one, which nothing reads at the constraint, or does not exist.",
                f"Name one of {', '.join(map(str, self.layers)) or 'none'}.",
            )

    def choose_layer(self, config: EditConfig, num_edits: int) -> tuple[int, list[LayerScore]]:
        """The layer with the best score over the first ``num_edits`` edits, and the scores of all layers tried.

        Raises:
            UserError: No layer can be edited.
        """
        if not self.layers:
            raise UserError(
                "No layer can be edited.", "None has an MLP that ends in one linear module.", "Choose a model."
            )
        stride = -(-len(self.layers) // MAX_SCANNED_LAYERS)
        scores = self.scan(self.layers[::stride], config, max(1, num_edits))
        # Of equal scores, the layer whose new answers are most probable.
        best = max(scores, key=lambda each: (each.overall, each.log_prob))
        tried = f"{len(scores)} layers tried with {min(num_edits, len(self.cases))} edits"
        log_decision("edit.layer", best.layer, f"best of {tried}: {best.overall:.2f}")
        return best.layer, scores

    def run(self, method: Method, apply: Apply, layer: int, config: EditConfig) -> EditOutcome:
        """Make the edits by one method, ask all probes, and undo the edits."""
        outcome = EditOutcome(method, apply)
        parts = [[case] for case in self.cases] if apply == "each" else [self.cases]
        for number, part in enumerate(parts):
            edit = self._edit(method, part, layer, config)
            outcome.edits.append(edit)
            with apply_edits(self.mm.model, [edit]):
                self._ask(outcome, part)
            log.info("%s, %s: %d of %d", method, apply, number + 1, len(parts))
        return outcome

    def association(self, case: EditCase, layer: int, config: EditConfig) -> Association:
        """Key and value of one edit in one layer, optimized once."""
        self._optimize(case, [layer], config)
        return self._associations[case.request.question.id, layer, config]

    def _ask(self, outcome: EditOutcome, part: Sequence[EditCase]) -> None:
        alone = outcome.apply == "each"
        for case in part:
            # If all edits are made at once, the other edits' questions are not unrelated.
            probes = [p for p in case.probes if alone or self.file.locality or p.kind != "unrelated"]
            outcome.scores += self.scorer.measure(probes)
            answer = self.scorer.own_answer(case.request.question)
            outcome.answers[case.request.question.id] = answer if isinstance(answer, str) else ""
        after = conversation_losses(self.mm, self.batches, self.scorer.device)
        outcome.before, outcome.after = torch.cat([outcome.before, self.losses]), torch.cat([outcome.after, after])
        name = part[0].request.question.id
        outcome.groups += [name if alone else str(k) for k in range(len(after))]

    def _edit(self, method: Method, part: Sequence[EditCase], layer: int, config: EditConfig) -> WeightEdit:
        if method == "fine-tuned, no limit":
            return fine_tuned(self.mm, [case.target for case in part], layer, config)
        edit = self._multedit(part, layer, config)
        if method == "MultEdit":
            return edit
        norm = float(edit.change().norm())
        return fine_tuned(self.mm, [case.target for case in part], layer, config, norm)

    def _multedit(self, part: Sequence[EditCase], layer: int, config: EditConfig) -> WeightEdit:
        associations = [self.association(case, layer, config) for case in part]
        return edit_from_associations(self.mm, associations, config.ridge)

    def _optimize(self, case: EditCase, layers: Sequence[int], config: EditConfig) -> None:
        """Optimize the values of one edit in all layers from one cached run, which is not kept: it is large."""
        name = case.request.question.id
        missing = [layer for layer in layers if (name, layer, config) not in self._associations]
        if missing:
            optimizer = ValueOptimizer(self.mm, case.target)
            self._associations |= {(name, layer, config): optimizer.association(layer, config) for layer in missing}

    def _make_case(self, number: int) -> EditCase | None:
        request = self.file.requests[number]
        probes = self.scorer.probes(request, self.file.locality or self._others(number))
        edited_probe = next((probe for probe in probes if probe.kind == "edited"), None)
        if edited_probe is None or edited_probe.new is None:
            return None
        return EditCase(request, edited_probe.new, tuple(probes), self.scorer.is_right(request.question))

    def _others(self, number: int) -> list[Question]:
        """Questions of other edits in other groups, the next ones first."""
        requests = self.file.requests
        rotated = [each.question for each in (*requests[number + 1 :], *requests[:number])]
        return [question for question in rotated if question.group != requests[number].question.group]

    def _layer_score(
        self, layer: int, scores: Sequence[EditScore], cases: Sequence[EditCase], config: EditConfig
    ) -> LayerScore:
        edited = [score for score in scores if score.kind == "edited"]
        kept = [score.kept for score in scores if score.kind in ("neighbour", "unrelated")]
        steps = [len(self.association(case, layer, config).losses) - 1 for case in cases]
        return LayerScore(
            layer,
            overall_score(scores),
            sum(s.said for s in edited) / len(edited),
            sum(s.log_prob for s in edited) / len(edited),
            sum(kept) / len(kept) if kept else None,
            sum(steps) / len(steps),
        )
