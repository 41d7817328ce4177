"""Layer ablation: the effect on the answer of disabling a layer or a part of it.

Data flow: ``Answer``s -> each run cached, then recomputed from the ablated layer on -> relative change of the target's
probability by kind and layer.

Effects are lower bounds: later layers compensate for a part of the ablation ("self-repair").

Shapes: N layers, Q questions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_mm.causal.effects.aggregate import layer_means
from lightning_mm.causal.interventions.activation_cache import cache_activations
from lightning_mm.causal.interventions.interventions import Intervention, mean_ablate, skip_blocks, zero_ablate
from lightning_mm.causal.interventions.partial_forward import PartialForward
from lightning_mm.causal.questions.question import EncodedQuestion
from lightning_mm.causal.questions.scoring import Answer
from lightning_mm.core.estimate import Estimate
from lightning_mm.models.handle import MultimodalModel


def _skip(layer: int, num_layers: int, answer: Answer) -> list[Intervention]:
    return [skip_blocks([layer])]


def _without_mlp(layer: int, num_layers: int, answer: Answer) -> list[Intervention]:
    return [zero_ablate("mlp", [layer])]


def _without_attention(layer: int, num_layers: int, answer: Answer) -> list[Intervention]:
    return [zero_ablate("attention", [layer])]


def _mean_image_from(layer: int, num_layers: int, answer: Answer) -> list[Intervention]:
    """From this layer on, every token of an image is the mean over its tokens: single patches cannot be read."""
    return [mean_ablate("residual", range(layer, num_layers), picture) for picture in _image_runs(answer.encoded)]


ABLATIONS: Mapping[str, Callable[[int, int, Answer], list[Intervention]]] = {
    "skip": _skip,
    "zero/mlp": _without_mlp,
    "zero/attention": _without_attention,
    "mean/image": _mean_image_from,
}
"""Kind -> interventions that ablate a layer (arguments: layer, number of layers, answer); ``mean/image`` acts on the
layer and all above."""


@torch.no_grad()
def ablation_curves(
    mm: MultimodalModel, answers: Sequence[Answer], kinds: Sequence[str] = tuple(ABLATIONS)
) -> Iterator[tuple[str, list[Estimate]]]:
    """Yields kind and one Estimate per layer: mean of (p_ablated - p) / p over the questions; null is 0.

    Args:
        mm: The unwrapped model in eval mode.
        answers: Correctly answered questions.
        kinds: Keys of ``ABLATIONS``; ``mean/image`` leaves out questions whose images have one token each
            (cross-attention models).
    """
    changes: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    used: dict[str, list[Answer]] = {kind: [] for kind in kinds}
    for answer in answers:
        # One at a time: activations of a large model are large.
        partial_forward = PartialForward(mm, cache_activations(mm, answer.encoded.inputs, sites=("residual",)))
        for kind in kinds:
            if kind != "mean/image" or len(answer.encoded.image) > len(answer.encoded.question.images):
                changes[kind].append(_probability_changes(partial_forward, answer, kind))
                used[kind].append(answer)
    for kind in kinds:
        if used[kind]:
            questions = [answer.encoded.question for answer in used[kind]]
            yield kind, layer_means(torch.tensor(changes[kind], dtype=torch.float64), questions, "no question")


def _probability_changes(partial_forward: PartialForward, answer: Answer, kind: str) -> list[float]:
    """Relative change of the target's probability for each ablated layer."""
    before = partial_forward.base.logits[0].double().log_softmax(-1)[answer.target]
    changes = []
    for layer in range(partial_forward.num_layers):
        ablation = ABLATIONS[kind](layer, partial_forward.num_layers, answer)
        logits = partial_forward.logits(ablation, layer=layer)
        # In logarithms: the probability itself may underflow.
        changes.append(float((logits[0].double().log_softmax(-1)[answer.target] - before).expm1()))
    return changes


def _image_runs(encoded: EncodedQuestion) -> list[Tensor]:
    """Token positions of each image; with several images, of each run of image tokens (an image or a tile)."""
    if len(encoded.question.images) < 2:
        return [encoded.image]
    ends = (encoded.image.diff() > 1).nonzero().flatten() + 1
    return list(encoded.image.tensor_split(ends.cpu()))
