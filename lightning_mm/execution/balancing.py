"""The auxiliary loss that balances the experts of a mixture, as the model itself computes it.

Data flow: model and plan -> ``balancing_coefficient`` -> ``supervised_nll``, which asks the model for the loss and
multiplies it as transformers does.

It is part of training if the model's config asks for it (``output_router_logits``) or a router trains. It depends on
the routers' decisions in all layers and for all tokens, so that padding is computed, and hidden states of frozen layers
are not read from a cache.
"""

import inspect
from typing import Any

from torch import nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.tuning.policy import TuningPlan


def can_balance(model: nn.Module) -> bool:
    """Whether a model's forward pass computes the loss if it is asked to."""
    return "output_router_logits" in inspect.signature(type(model).forward).parameters


def balancing_coefficient(mm: MultimodalModel, plan: TuningPlan) -> float | None:
    """What the loss is multiplied by in training; None if it is no part of it.

    Args:
        mm: The plain model.
        plan: Which weights train.
    """
    config: Any = mm.transformers.config.get_text_config(decoder=True)
    wanted = bool(getattr(config, "output_router_logits", False))
    trained = mm.layout.routers & (plan.full | plan.adapted_weights)
    if not mm.layout.routers or not (wanted or trained):
        return None
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if coefficient is None or not can_balance(mm.model):
        why = f"{type(mm.model).__name__} computes none"
        log_decision("model.tuning.parts", "routers train without a loss that balances experts", why)
        return None
    why = "its config sets output_router_logits" if wanted else "routers train"
    log_decision("balancing loss", f"{coefficient:g} times the model's, with padding computed", why)
    return float(coefficient)
