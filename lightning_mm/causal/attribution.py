"""Attribution patching: a first-order guess of every trace at once, to choose what is worth computing exactly.

Data flow: clean values + one backward pass of the corrupt run -> guess per layer and unit -> ``tracing``'s shortlist.

Shapes: N layers, U units, L tokens, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mm.causal.corruption import Corrupt
from lightning_mm.causal.interventions import Site, add, intervened
from lightning_mm.causal.recording import Recording, on_device, record
from lightning_mm.models.anatomy import Anatomy


def attribution(
    model: Any,
    anatomy: Anatomy,
    corrupt: Corrupt,
    clean: Recording,
    site: Site,
    units: Sequence[Tensor],
    target: int,
    rival: int,
) -> Tensor:
    """(N, U) first-order guess of what putting each unit back does to the logit difference, in one backward pass.

    Attribution patching: the gradient at the corrupt run times clean minus corrupt values (Nanda 2023).
    """
    shape = (1, clean.length, clean.entered[0].shape[2])
    device = clean.entered[0].device
    moves = [torch.zeros(shape, device=device, requires_grad=True) for _ in range(anatomy.num_layers)]
    with corrupt.applied(model, anatomy):
        values = record(model, anatomy, corrupt.inputs, sites=(site,)).values
        moved = [add(site, [layer], None, move) for layer, move in enumerate(moves)]
        with torch.enable_grad(), intervened(model, anatomy, moved):
            logits = model(**on_device(model, anatomy, corrupt.inputs), use_cache=False).logits[0, -1].float()
            gradients = torch.autograd.grad(logits[target] - logits[rival], moves)
    per_token = torch.stack(
        [
            ((clean.values[site, layer] - values[site, layer]).float() * gradient.float()).sum(-1)[0]
            for layer, gradient in enumerate(gradients)
        ]
    ).cpu()
    return torch.stack([per_token[:, unit].sum(1) for unit in units], 1)
