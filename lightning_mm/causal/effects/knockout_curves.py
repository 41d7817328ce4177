"""Attention knockout by layer over many questions: at which depth an attention edge matters for the answer.

Data flow: correct ``Answer``s -> for each edge, kind and window of layers: last-token logits with and without the edge
-> change of probability and logit, divergence, accuracy -> one Estimate per layer.

Shapes: N layers, Q questions, V vocabulary size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.causal.effects.aggregate import layer_means
from lightning_mm.causal.effects.attention_knockout import (
    AttentionEdge,
    Knockout,
    KnockoutKind,
    attention_edge,
    check_edge,
    knock_out,
    knockout_logits,
)
from lightning_mm.causal.interventions.activation_cache import ActivationCache, cache_activations
from lightning_mm.causal.interventions.interventions import layer_window
from lightning_mm.causal.interventions.partial_forward import PartialForward
from lightning_mm.causal.questions.question import last_logits
from lightning_mm.causal.questions.scoring import Answer
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.estimate import Estimate
from lightning_mm.models.handle import MultimodalModel

EDGES = ("image->question", "question->last", "image->last", "constraint->last")

MEASURES = ("knockout", "knockout_accuracy", "knockout_kl", "knockout_logit")
"""(p_knockout - p) / p of the target; fraction of answers whose first token stays; KL(p || p_knockout) in nats; change
of the target's logit."""


@dataclass(frozen=True)
class KnockoutConfig:
    """What to knock out.

    Args:
        edges: Names, as ``edges.edge`` knows them.
        kinds: ``pre`` the softmax (what is left is renormalised), ``post`` (it is not).
        width: Of the window of layers around each layer.
        convention: What a width means: ``p2`` (2w + 1 layers, 1 is one layer) or ``rome`` (w layers).
    """

    edges: tuple[str, ...] = EDGES
    kinds: tuple[KnockoutKind, ...] = ("pre",)
    width: int = 1
    convention: Literal["p2", "rome"] = "p2"

    def __post_init__(self) -> None:
        if self.width < 1 or not self.edges or not self.kinds:
            raise UserError(
                "There is nothing to knock out.", "Edges, kinds or the width are none.", "Give one or more."
            )
        for name in self.edges:
            check_edge(name)


def knockout_curves(
    mm: MultimodalModel, answers: Sequence[Answer], config: KnockoutConfig = KnockoutConfig()
) -> Iterator[tuple[str, str, list[Estimate]]]:
    """Yields measure, ``edge/kind`` and one Estimate per layer (the window's center), over correct answers.

    A question counts in layers whose window has its edge; layers without any are undefined. The null is no change: 0,
    for accuracy whether the clean model answers with the target.

    Args:
        mm: The unwrapped model in eval mode.
        answers: Questions and their answers; incorrectly answered ones are left out.
        config: What to knock out.
    """
    right = [answer for answer in answers if answer.right]
    questions = [answer.encoded.question for answer in right]
    # One at a time: activations of a large model are large.
    measured = [_knockout_question(mm, answer, config) for answer in right]
    is_target = torch.tensor([hit for hit, _ in measured], dtype=torch.float64)
    note = f"{len(answers) - len(right)} of {len(answers)} questions left out: answered wrong"
    for name in config.edges:
        for kind in config.kinds:
            for m, measure in enumerate(MEASURES):
                values = [effects[name, kind][m] for _, effects in measured]
                value_QN = torch.stack(values) if values else torch.full((0, mm.layout.num_layers), torch.nan)
                null_QN = torch.zeros_like(value_QN)
                if measure == "knockout_accuracy":
                    null_QN += is_target[:, None]
                missing = f"no question has tokens for {name} that see each other here" if right else "none is right"
                estimates = layer_means(value_QN, questions, missing, null_QN)
                notes = (note,) if len(right) < len(answers) else ()
                yield measure, f"{name}/{kind}", [estimate.noted(*notes) for estimate in estimates]


def _knockout_question(
    mm: MultimodalModel, answer: Answer, config: KnockoutConfig
) -> tuple[float, dict[tuple[str, KnockoutKind], Tensor]]:
    """Whether the clean model answers with the target, and (measures, N) effects by edge and kind; NaN without edge."""
    encoded, clean = answer.encoded, cache_activations(mm, answer.encoded.inputs, sites=("residual",))
    partial_forward = _partial_forward(mm, clean)
    effects = {}
    for name in config.edges:
        edge = attention_edge(encoded, name)
        for kind in config.kinds:
            rows = torch.full((len(MEASURES), mm.layout.num_layers), torch.nan, dtype=torch.float64)
            for layer in range(mm.layout.num_layers if edge else 0):
                layers = _layers_with_edge(
                    clean, edge, layer_window(layer, config.width, mm.layout.num_layers, config.convention), kind
                )
                if layers:
                    logits_V = _knockout_logits(mm, clean, partial_forward, edge, layers, kind)
                    rows[:, layer] = _compare_logits(clean.logits[0], logits_V, answer.target)
            effects[name, kind] = rows
    return float(clean.logits[0].argmax() == answer.target), effects


def _partial_forward(mm: MultimodalModel, clean: ActivationCache) -> PartialForward | None:
    try:
        return PartialForward(mm, clean)
    except UserError as error:
        log_decision("causal.knockout", "whole runs, slow", error.why)
        return None


def _layers_with_edge(
    clean: ActivationCache, edge: AttentionEdge, layers: Sequence[int], kind: KnockoutKind
) -> list[int]:
    """Layers of a window that have the edge; ``pre`` cannot cut all that a cross-attention layer attends to."""
    knockout = Knockout([edge], layers, kind, clean.length)
    calls = [clean.attention_calls[layer] for layer in layers if layer in clean.attention_calls]
    return [
        call.layer for call in calls if knockout.cuts(call) and (kind == "post" or call.key.shape[2] == clean.length)
    ]


def _knockout_logits(
    mm: MultimodalModel,
    clean: ActivationCache,
    partial_forward: PartialForward | None,
    edge: AttentionEdge,
    layers: list[int],
    kind: KnockoutKind,
) -> Tensor:
    if partial_forward is not None:
        return knockout_logits(partial_forward, [edge], layers, kind)
    with knock_out(mm, [edge], layers, kind):
        return last_logits(mm, clean.inputs)[0]


def _compare_logits(before_V: Tensor, after_V: Tensor, target: int) -> Tensor:
    """(measures,) effects in the order of ``MEASURES``."""
    before_V, after_V = before_V.double(), after_V.double()
    log_p_V, log_q_V = before_V.log_softmax(-1), after_V.log_softmax(-1)
    change = (log_q_V[target] - log_p_V[target]).expm1()
    kept = (after_V.argmax() == target).double()
    divergence = (log_p_V.exp() * (log_p_V - log_q_V)).sum()
    return torch.stack([change, kept, divergence, after_V[target] - before_V[target]]).cpu()
