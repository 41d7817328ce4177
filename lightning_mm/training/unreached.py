"""What no row of a step, or of a run, reaches: a tower and a connector where no row has a picture.

Data flow: a step without pictures -> the gradients of tower and connector are taken away, so that neither weight decay
nor momentum moves them; the end of a run -> regions that never got a gradient.
"""

from collections.abc import Mapping

import torch
from torch import nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.tuning.unused_parameters import PICTURE_REGIONS


def drop_picture_gradients(model: nn.Module, layout: ModelLayout) -> None:
    """Take away the (zero) gradients of tower and connector: the optimizer passes over a tensor that has none.

    ``execution.loss.add_zero_grad_term`` gives them one, which ranks of DDP need that have no picture.

    Args:
        model: The model, after the backward pass of a step in which no rank had a picture.
        layout: Where its regions are.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and layout.location_of(name).region in PICTURE_REGIONS:
            parameter.grad = None


def unreached_groups(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Number of tensors that never got a gradient, by the name of their parameter group; groups with none left out.

    Args:
        optimizer: At the end of a run of one step or more.
    """
    counts: dict[str, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        if missing := sum(not optimizer.state.get(parameter) for parameter in group["params"]):
            counts[str(group.get("name", index))] = missing
    return counts


def regions_without_rows(modes: Mapping[Region, str]) -> list[str]:
    """Regions that train and that no row reaches where none has a picture.

    Args:
        modes: How each region trains, as ``TuningPlan.modes`` has it.
    """
    return [region.value for region in PICTURE_REGIONS if modes[region] != "frozen"]


def say_unreached(optimizer: torch.optim.Optimizer) -> None:
    """Log the groups of tensors that no row of a run has reached."""
    for group, count in unreached_groups(optimizer).items():
        why = "no row of the run reaches them; they are as they were, weight decay included"
        log_decision("model.tuning", f"{group}: {count} tensors never got a gradient", why)
