"""Knockout by layer over many questions: where in depth an edge matters for the answer.

Data flow: ``Answer``s that are right -> for each edge, kind and window: last-token logits with and without the edge ->
change of probability and logit, divergence, accuracy -> one Estimate per layer.

Shapes: N layers, Q questions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.causal.effects.aggregate import profile
from lightning_mm.causal.effects.attention_knockout import (
    Edge,
    Kind,
    Knockout,
    check,
    edge,
    knocked_logits,
    knocked_out,
)
from lightning_mm.causal.interventions.activation_cache import Recording, record
from lightning_mm.causal.interventions.interventions import window
from lightning_mm.causal.interventions.partial_forward import Replay
from lightning_mm.causal.questions.question import last_logits
from lightning_mm.causal.questions.scoring import Answer
from lightning_mm.core.decisions import decide
from lightning_mm.core.errors import UserError
from lightning_mm.core.estimate import Estimate
from lightning_mm.models.handle import MultimodalModel

EDGES = ("image->question", "question->last", "image->last", "constraint->last")

MEASURES = ("knockout", "knockout_accuracy", "knockout_kl", "knockout_logit")
"""(p_ko - p) / p of the answer; share of answers whose first token stays; KL(p || p_ko) in nats; change of logit."""


@dataclass(frozen=True)
class Knocking:
    """What to knock out.

    Args:
        edges: Names, as ``edges.edge`` knows them.
        kinds: ``pre`` the softmax (what is left is renormalised), ``post`` (it is not).
        width: Of the window of layers around each layer.
        convention: What a width means: ``p2`` (2w + 1 layers, 1 is one layer) or ``rome`` (w layers).
    """

    edges: tuple[str, ...] = EDGES
    kinds: tuple[Kind, ...] = ("pre",)
    width: int = 1
    convention: Literal["p2", "rome"] = "p2"

    def __post_init__(self) -> None:
        if self.width < 1 or not self.edges or not self.kinds:
            raise UserError(
                "There is nothing to knock out.", "Edges, kinds or the width are none.", "Give one or more."
            )
        for name in self.edges:
            check(name)


def knockout_curves(
    mm: MultimodalModel, answers: Sequence[Answer], options: Knocking = Knocking()
) -> Iterator[tuple[str, str, list[Estimate]]]:
    """Measure, ``edge/kind`` and one Estimate per layer (the window's centre), over the questions answered right.

    A question counts where its edge exists in the window; layers where it exists for none are undefined. An edge that
    does not lead anywhere changes nothing: the null is 0, for accuracy 1. A question's answer is the right one where
    one is given, else the model's own.

    Args:
        mm: The plain model in eval mode.
        answers: Questions; those answered wrong are left out, since they have nothing to lose.
        options: What to knock out.
    """
    right = [answer for answer in answers if answer.right]
    questions = [answer.asked.question for answer in right]
    # One at a time: a recording of a large model is large.
    measured = [_measured(mm, answer, options) for answer in right]
    said, found = [each for each, _ in measured], [each for _, each in measured]
    note = f"{len(answers) - len(right)} of {len(answers)} questions left out: answered wrong"
    for name in options.edges:
        for kind in options.kinds:
            for m, measure in enumerate(MEASURES):
                values = [each[name, kind][m] for each in found]
                value_QN = torch.stack(values) if values else torch.full((0, mm.layout.num_layers), torch.nan)
                null_QN = torch.zeros_like(value_QN)
                if measure == "knockout_accuracy":
                    null_QN += torch.tensor(said, dtype=torch.float64)[:, None]
                missing = f"no question has tokens for {name} that see each other here" if right else "none is right"
                estimates = profile(value_QN, questions, missing, null_QN)
                notes = (note,) if len(right) < len(answers) else ()
                yield measure, f"{name}/{kind}", [estimate.noted(*notes) for estimate in estimates]


def _measured(mm: MultimodalModel, answer: Answer, options: Knocking) -> tuple[float, dict[tuple[str, Kind], Tensor]]:
    """Whether the clean model says the target, and (measures, N) of each edge and kind; NaN where there is no edge."""
    asked, clean = answer.asked, record(mm, answer.asked.inputs, sites=("residual",))
    replay = _replay(mm, clean)
    found = {}
    for name in options.edges:
        way = edge(asked, name)
        for kind in options.kinds:
            rows = torch.full((len(MEASURES), mm.layout.num_layers), torch.nan, dtype=torch.float64)
            for layer in range(mm.layout.num_layers if way else 0):
                layers = _open(clean, way, window(layer, options.width, mm.layout.num_layers, options.convention), kind)
                if layers:
                    logits_V = _logits(mm, clean, replay, way, layers, kind)
                    rows[:, layer] = _change(clean.logits[0], logits_V, answer.target)
            found[name, kind] = rows
    return float(clean.logits[0].argmax() == answer.target), found


def _replay(mm: MultimodalModel, clean: Recording) -> Replay | None:
    try:
        return Replay(mm, clean)
    except UserError as error:
        decide("causal.knockout", "whole runs, slow", error.why)
        return None


def _open(clean: Recording, way: Edge, layers: Sequence[int], kind: Kind) -> list[int]:
    """The layers of a window that have the edge. Where it is all that a layer attends to, only ``post`` can cut it."""
    knockout = Knockout([way], layers, kind, clean.length)
    calls = [clean.calls[layer] for layer in layers if layer in clean.calls]
    return [
        call.layer for call in calls if knockout.cuts(call) and (kind == "post" or call.key.shape[2] == clean.length)
    ]


def _logits(
    mm: MultimodalModel, clean: Recording, replay: Replay | None, way: Edge, layers: list[int], kind: Kind
) -> Tensor:
    if replay is not None:
        return knocked_logits(replay, [way], layers, kind)
    with knocked_out(mm, [way], layers, kind):
        return last_logits(mm, clean.inputs)[0]


def _change(before_V: Tensor, after_V: Tensor, target: int) -> Tensor:
    """(measures,) in the order of ``MEASURES``."""
    before_V, after_V = before_V.double(), after_V.double()
    log_p_V, log_q_V = before_V.log_softmax(-1), after_V.log_softmax(-1)
    change = (log_q_V[target] - log_p_V[target]).expm1()
    kept = (after_V.argmax() == target).double()
    divergence = (log_p_V.exp() * (log_p_V - log_q_V)).sum()
    return torch.stack([change, kept, divergence, after_V[target] - before_V[target]]).cpu()
