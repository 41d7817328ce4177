"""Fine-tuning of the same weight: the baseline that an edit is compared with.

Data flow: questions with their new answers + a layer -> gradient steps on that one weight -> ``WeightEdit``.

Shapes: D hidden size, F inner size of the MLP, T tokens of an answer.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mm.causal.editing.multedit import EditConfig, frozen_parameters, output_changed
from lightning_mm.causal.editing.weight_edit import WeightEdit, down_projection
from lightning_mm.causal.interventions.interventions import apply_interventions
from lightning_mm.causal.questions.scoring import ForcedAnswer, answer_logits
from lightning_mm.models.handle import MultimodalModel

LR = 5e-4
"""Adam's learning rate on the weight (fine-tuning baseline of Meng et al. 2022, arXiv:2202.05262)."""


def fine_tuned(
    mm: MultimodalModel,
    targets: Sequence[ForcedAnswer],
    layer: int,
    config: EditConfig,
    norm: float = math.inf,
    lr: float = LR,
) -> WeightEdit:
    """Fine-tune the layer's down projection with Adam on the mean loss of the new answers.

    Args:
        mm: The unwrapped model in eval mode; unchanged afterwards.
        targets: Questions with their new answers, on the model's device.
        layer: Index of the decoder block.
        config: Configuration of the edit it is compared with; its ``steps``, ``target`` and ``until`` apply here too.
        norm: Largest Frobenius norm of the change, usually that of the edit; inf: no limit.
        lr: Adam's learning rate.

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
    with torch.enable_grad(), frozen_parameters(mm), apply_interventions(mm, ()):
        for _ in range(config.steps):
            change_DF.grad, total = torch.zeros_like(change_DF), 0.0
            for target in targets:
                count = 1 if config.target == "first" else len(target.ids)
                with output_changed(mm.model, str(name), changed):
                    logits_TV = answer_logits(mm, target)[:count]
                nll = F.cross_entropy(logits_TV, target.ids[:count], reduction="sum") / len(targets)
                change_DF.grad += torch.autograd.grad(nll, [change_DF])[0]
                total += float(nll.detach())
            if total < config.until:
                break
            adam.step()
            with torch.no_grad():
                change_DF.mul_((norm / change_DF.norm().clamp_min(1e-30)).clamp_max(1.0))
    return WeightEdit(layer, str(name), change_DF.detach())
