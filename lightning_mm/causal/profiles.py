"""One number per question and layer into one Estimate per layer.

Data flow: what ``attention`` and ``knockout`` measure of every question -> ``profile`` -> rows of ``Findings``.

Shapes: Q questions, N layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mm.causal.questions import Question
from lightning_mm.estimate import Estimate, finite, undefined
from lightning_mm.geometry.resampling import mean_interval


def group_ids(questions: Sequence[Question]) -> Tensor:
    """(Q,) equal for questions whose numbers depend on one another: those of one picture, mostly."""
    names = [question.group or f"question {question.id}" for question in questions]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.long)


def profile(
    value_QN: Tensor, questions: Sequence[Question], missing: str, null_QN: Tensor | None = None
) -> list[Estimate]:
    """Means over questions with their 95 % intervals, questions of one group counting as dependent.

    Args:
        value_QN: NaN where a question has no such number; it is left out there.
        questions: Q of them.
        missing: Why a layer has no number at all.
        null_QN: What chance would give each; 0 if not given.
    """
    group_Q = group_ids(questions)
    null_QN = torch.zeros_like(value_QN) if null_QN is None else null_QN
    found = []
    for value_Q, null_Q in zip(value_QN.double().T, null_QN.double().T, strict=True):
        known = ~value_Q.isnan()
        if not known.any():
            found.append(undefined(missing, 0))
            continue
        mean, low, high = (float(end) for end in mean_interval(value_Q[known][None], group_Q[known]))
        null = float(null_Q[known].mean())
        found.append(finite(mean, int(known.sum()), low=low, high=high, null=null))
    return found
