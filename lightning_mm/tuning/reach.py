"""Find planned tensors that the model never reads, by asking autograd once.

Data flow: one real sample -> loss -> which planned tensors of tower and connector got no gradient -> a smaller plan.
LLaVA reads its tower two blocks below the top; what is above would sit in the optimizer, and block DDP, for nothing.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_mm.decisions import decide
from lightning_mm.models.anatomy import Anatomy, Region
from lightning_mm.tuning.policy import TuningPlan


def without_unread(model: nn.Module, anatomy: Anatomy, plan: TuningPlan, loss: Callable[[], Tensor]) -> TuningPlan:
    """The plan less those tensors of vision tower and connector that ``loss`` does not depend on.

    Args:
        model: After ``apply_plan``.
        anatomy: Of the plain model.
        plan: What was asked for.
        loss: Computes the training loss () of a sample with a picture.
    """
    regions = (Region.VISION, Region.CONNECTOR)
    asked = {n: p for n, p in model.named_parameters() if p.requires_grad and anatomy.place_of(n).region in regions}
    if not asked:
        return plan
    with torch.random.fork_rng():
        gradients = torch.autograd.grad(loss(), list(asked.values()), allow_unused=True)
    unread = [name for name, gradient in zip(asked, gradients, strict=True) if gradient is None]
    if not unread:
        return plan
    values = sum(asked[name].numel() for name in unread)
    decide("model.tuning", f"{len(unread)} tensors ({values:,} values) stay frozen", f"never read: {unread[0]}, ...")
    modules = {name.partition(".lora_")[0] for name in unread if ".lora_" in name}
    return replace(plan, full=plan.full - set(unread), adapted=plan.adapted - modules)
