"""What plain fine-tuning of the same weight does: the control that an edit is compared with.

Data flow: questions with their new answers + the same layer -> gradient steps on that one weight -> ``Edit``.

Shapes: D hidden size, F inner size of the MLP.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mm.causal.editing.multedit import EditOptions, answering, frozen
from lightning_mm.causal.editing.weight_edit import Edit, down_projection
from lightning_mm.causal.interventions.interventions import intervened
from lightning_mm.causal.questions.scoring import Forced, forced_logits
from lightning_mm.models.handle import MultimodalModel

LR = 5e-4
"""Of Adam on the weight (ROME's fine-tuned control)."""


def fine_tuned(
    mm: MultimodalModel,
    targets: Sequence[Forced],
    layer: int,
    options: EditOptions,
    norm: float = math.inf,
    lr: float = LR,
) -> Edit:
    """Adam on the layer's down projection until the new answers are given, for as many steps as a value gets.

    Args:
        mm: The plain model in eval mode; left as it is.
        targets: Questions with their new answers, on the model's device; their mean loss is descended.
        layer: The decoder block.
        options: Of the edit that this is compared with: its steps, target and ``until`` hold here too.
        norm: Largest Frobenius norm of the change: that of the edit compared with, to spend no more; inf: no limit.
        lr: Of Adam.

    Raises:
        UserError: The layer cannot be edited.
    """
    assert not mm.model.training, "dropout would make every run another one"
    name = mm.layout.blocks[layer].down_proj
    weight = down_projection(mm.model, name, layer).weight
    change_DF = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device, requires_grad=True)

    def changed(entering: Tensor, output: Tensor) -> Tensor:
        return (output.float() + F.linear(entering.float(), change_DF)).to(output.dtype)

    adam = torch.optim.Adam([change_DF], lr)
    with torch.enable_grad(), frozen(mm), intervened(mm, ()):
        for _ in range(options.steps):
            change_DF.grad, total = torch.zeros_like(change_DF), 0.0
            for target in targets:
                count = 1 if options.target == "first" else len(target.ids)
                with answering(mm.model, str(name), changed):
                    logits_TV = forced_logits(mm, target)[:count]
                nll = F.cross_entropy(logits_TV, target.ids[:count], reduction="sum") / len(targets)
                change_DF.grad += torch.autograd.grad(nll, [change_DF])[0]
                total += float(nll.detach())
            if total < options.until:
                break
            adam.step()
            with torch.no_grad():
                change_DF.mul_((norm / change_DF.norm().clamp_min(1e-30)).clamp_max(1.0))
    return Edit(layer, str(name), change_DF.detach())
