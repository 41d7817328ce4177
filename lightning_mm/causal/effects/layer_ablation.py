"""What the answer loses when a layer, or a part of it, does nothing.

Data flow: ``Answer``s -> each run recorded, then computed again from the ablated layer on -> relative change of the
answer's probability, per kind and layer.

Ablations are lower bounds: later layers make up for some of what is lost (measures of "self-repair").

Shapes: N layers, Q questions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_mm.causal.effects.aggregate import profile
from lightning_mm.causal.interventions.activation_cache import record
from lightning_mm.causal.interventions.interventions import Intervention, mean, skip, zero
from lightning_mm.causal.interventions.partial_forward import Replay
from lightning_mm.causal.questions.question import Asked
from lightning_mm.causal.questions.scoring import Answer
from lightning_mm.core.estimate import Estimate
from lightning_mm.models.handle import MultimodalModel


def _skip(layer: int, num_layers: int, answer: Answer) -> list[Intervention]:
    return [skip([layer])]


def _without_mlp(layer: int, num_layers: int, answer: Answer) -> list[Intervention]:
    return [zero("mlp", [layer])]


def _without_attention(layer: int, num_layers: int, answer: Answer) -> list[Intervention]:
    return [zero("attention", [layer])]


def _blurred_from(layer: int, num_layers: int, answer: Answer) -> list[Intervention]:
    """From this layer on every token of a picture is their mean: what is read off single patches later is lost."""
    return [mean("residual", range(layer, num_layers), picture) for picture in _pictures(answer.asked)]


KINDS: Mapping[str, Callable[[int, int, Answer], list[Intervention]]] = {
    "skip": _skip,
    "zero/mlp": _without_mlp,
    "zero/attention": _without_attention,
    "mean/image": _blurred_from,
}
"""What is done to each layer; ``mean/image`` is done to it and all above."""


@torch.no_grad()
def ablation_curves(
    mm: MultimodalModel, answers: Sequence[Answer], kinds: Sequence[str] = tuple(KINDS)
) -> Iterator[tuple[str, list[Estimate]]]:
    """Kind and one Estimate per layer: mean of (p_ablated - p) / p over the questions; 0 where nothing changes.

    Args:
        mm: The plain model in eval mode.
        answers: Questions that the model answers right.
        kinds: Keys of ``KINDS``; ``mean/image`` counts questions whose pictures have several tokens each: not those of
            models that attend to the picture's own states.
    """
    changes: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    meant: dict[str, list[Answer]] = {kind: [] for kind in kinds}
    for answer in answers:
        # One at a time: a recording of a large model is large.
        replay = Replay(mm, record(mm, answer.asked.inputs, sites=("residual",)))
        for kind in kinds:
            if kind != "mean/image" or len(answer.asked.image) > len(answer.asked.question.images):
                changes[kind].append(_changes(replay, answer, kind))
                meant[kind].append(answer)
    for kind in kinds:
        if meant[kind]:
            questions = [answer.asked.question for answer in meant[kind]]
            yield kind, profile(torch.tensor(changes[kind], dtype=torch.float64), questions, "no question")


def _changes(replay: Replay, answer: Answer, kind: str) -> list[float]:
    before = replay.base.logits[0].double().log_softmax(-1)[answer.target]
    changed = []
    for layer in range(replay.num_layers):
        done = KINDS[kind](layer, replay.num_layers, answer)
        logits = replay.logits(done, layer=layer)
        # By logarithms: the probability itself may be too small for a number.
        changed.append(float((logits[0].double().log_softmax(-1)[answer.target] - before).expm1()))
    return changed


def _pictures(asked: Asked) -> list[Tensor]:
    """Positions of each picture's tokens; of several pictures, each run of tokens (a picture's, or a tile's)."""
    if len(asked.question.images) < 2:
        return [asked.image]
    ends = (asked.image.diff() > 1).nonzero().flatten() + 1
    return list(asked.image.tensor_split(ends.cpu()))
