"""LoRA through PEFT, on exactly the named modules.

Data flow: plan (module names) -> PEFT config with fully-qualified names -> adapters inside the model. PEFT's own
``layers_to_transform`` also adapts vision towers whose blocks carry the same numbers; names resolved here do not.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_mm.core.errors import UserError

if TYPE_CHECKING:  # importing PEFT takes a second or two, which runs without adapters save
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"


@dataclass(frozen=True)
class LoRA:
    """Options of the adapters.

    Args:
        r: Rank.
        alpha: Scale; the update is multiplied by alpha / r (alpha / sqrt(r) with rslora).
        dropout: Dropout before the adapter.
        rslora: Rank-stabilised scaling (2312.03732).
        dora: Weight-decomposed adapters (2402.09353).
        rank_per_layer: Rank of some decoder blocks by layer range, {'8-11': 32}; alpha grows with it, the scale stays.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    rank_per_layer: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks_fit = all(rank >= 1 for rank in (self.r, *self.rank_per_layer.values()))
        for option, value, valid in (
            ("r", self.r, ranks_fit),
            ("alpha", self.alpha, self.alpha > 0),
            ("dropout", self.dropout, 0 <= self.dropout < 1),
        ):
            if not valid:
                raise UserError(f"model.tuning.lora.{option}: {value} is out of range.", "See --help.", "Change it.")


def add_lora(model: Any, targets: Collection[str], options: LoRA, ranks: Mapping[str, int]) -> None:
    """Add LoRA adapters to a transformers model, in place.

    Args:
        model: The plain model.
        targets: Fully-qualified names of linear modules.
        options: Rank, scale, dropout.
        ranks: Module name -> rank, for modules whose rank differs from ``options.r``.

    Raises:
        UserError: PEFT adapted other modules than the named ones.
    """
    from peft.tuners.tuners_utils import cast_adapter_dtype

    model.add_adapter(lora_config(targets, options, ranks), adapter_name=ADAPTER)
    # In bfloat16, AdamW would lose most of its small updates.
    cast_adapter_dtype(model, ADAPTER)
    adapted = set(adapted_modules(model))
    if adapted != set(targets):
        stray, missing = sorted(adapted - set(targets)), sorted(set(targets) - adapted)
        raise UserError(
            "The adapters do not stand where they were planned.",
            f"Stray: {', '.join(stray[:5]) or 'none'}. Missing: {', '.join(missing[:5]) or 'none'}.",
            "Report the model's type; nothing was trained.",
        )


def adapted_modules(model: nn.Module) -> "dict[str, LoraLayer]":
    """The modules that have adapters, by name."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_config(targets: Collection[str], options: LoRA, ranks: Mapping[str, int]) -> "LoraConfig":
    """PEFT's config for exactly these modules; arguments as in ``add_lora``."""
    from peft import LoraConfig

    patterns = {f"^{re.escape(name)}$": rank for name, rank in ranks.items()}
    return LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        use_dora=options.dora,
        target_modules=sorted(targets),
        rank_pattern=patterns,
        alpha_pattern={pattern: options.alpha * rank / options.r for pattern, rank in patterns.items()},
    )
