"""Find planned tensors that the model never reads, by asking autograd once.

Data flow: one real sample -> loss -> which planned tensors of tower and connector got no gradient -> a smaller plan.
LLaVA reads its tower below the top; what is above would sit in the optimizer, and hold up DDP, for nothing.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_mm.models.anatomy import Anatomy, Region
from lightning_mm.tuning.policy import TuningPlan


def unread_tensors(model: nn.Module, anatomy: Anatomy, loss: Callable[[], Tensor]) -> tuple[str, ...]:
    """Trainable tensors of vision tower and connector that ``loss`` does not depend on.

    Args:
        model: After ``apply_plan``.
        anatomy: Of the plain model.
        loss: Computes the training loss () of a sample with a picture.
    """
    regions = (Region.VISION, Region.CONNECTOR)
    asked = {n: p for n, p in model.named_parameters() if p.requires_grad and anatomy.place_of(n).region in regions}
    if not asked:
        return ()
    with torch.random.fork_rng():
        gradients = torch.autograd.grad(loss(), list(asked.values()), allow_unused=True)
    return tuple(name for name, gradient in zip(asked, gradients, strict=True) if gradient is None)


def without(plan: TuningPlan, unread: Collection[str]) -> TuningPlan:
    """The plan less some tensors, named as in the adapted model."""
    modules = {name.partition(".lora_")[0] for name in unread if ".lora_" in name}
    return replace(plan, full=plan.full - set(unread), adapted=plan.adapted - modules)
