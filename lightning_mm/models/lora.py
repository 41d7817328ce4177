"""LoRA through PEFT, on exactly the named weights.

Data flow: plan (names of linear modules and of expert stacks) -> PEFT config with fully-qualified names -> adapters
inside the model. PEFT's own ``layers_to_transform`` also adapts vision towers whose blocks carry the same numbers;
names resolved here do not.
"""

import re
import warnings
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_mm.core.errors import UserError
from lightning_mm.models.hooks import Forward, replace_forward
from lightning_mm.models.layout import plain_name

if TYPE_CHECKING:  # importing PEFT takes a second or two, which runs without adapters save
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
UNMATCHED_RANKS = "The following (rank|alpha)_pattern keys did not match any targeted module"
"""What PEFT warns of where experts have a rank of their own, although it gives them that rank."""


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


def add_lora(
    model: Any, targets: Collection[str], options: LoRA, ranks: Mapping[str, int], stacks: Collection[str] = ()
) -> None:
    """Add LoRA adapters to a transformers model, in place.

    Args:
        model: The plain model.
        targets: Fully-qualified names of linear modules.
        options: Rank, scale, dropout.
        ranks: Name of a linear module or of a stack -> rank, where it differs from ``options.r``.
        stacks: Fully-qualified names of 3-D parameters, which hold one matrix per expert; none by default. Each
            expert has an adapter of the rank.

    Raises:
        UserError: PEFT adapted other weights than the named ones, or has no such adapter.
    """
    from peft.tuners.tuners_utils import cast_adapter_dtype

    renamed = _renamed_by_peft(model, targets)
    packed = any(not model.get_submodule(name).weight.is_floating_point() for name in renamed)
    if packed or (renamed and (options.dropout or options.dora)):
        raise UserError(
            "model.tuning.lora: this model's MLPs can have plain LoRA on plain weights only.",
            f"PEFT takes names such as {sorted(renamed)[0]} for experts, so that they are adapted as parameters.",
            "Leave out quantization, dropout and dora, or name parts without MLPs, such as parts: [attention].",
        )
    with warnings.catch_warnings():
        # PEFT looks for ranks of parameters among the modules only; they are checked below.
        warnings.filterwarnings("ignore", message=UNMATCHED_RANKS, category=RuntimeWarning)
        model.add_adapter(lora_config(targets, options, ranks, stacks, renamed), adapter_name=ADAPTER)
    # In bfloat16, AdamW would lose most of its small updates.
    cast_adapter_dtype(model, ADAPTER)
    adapters: dict[str, Any] = adapted_weights(model)
    adapted, planned = adapters.keys(), {f"{target}.weight" for target in targets} | set(stacks)
    for name in ranks:
        adapter = adapters.get(name) or adapters[f"{name}.weight"]
        assert adapter.r[ADAPTER] == ranks[name], f"{name} has rank {adapter.r[ADAPTER]}"
    if adapted != planned:
        stray, missing = sorted(adapted - planned), sorted(planned - adapted)
        raise UserError(
            "The adapters do not stand where they were planned.",
            f"Stray: {', '.join(stray[:5]) or 'none'}. Missing: {', '.join(missing[:5]) or 'none'}.",
            "Report the model's type; nothing was trained.",
        )


def adapted_modules(model: nn.Module) -> "dict[str, LoraLayer]":
    """The modules that have adapters, by name; a module with several adapted parameters is wrapped several times."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapted_weights(model: nn.Module) -> "dict[str, LoraLayer]":
    """The adapter of each adapted weight, by the weight's name in the plain model."""
    return {weight_name(name, layer): layer for name, layer in adapted_modules(model).items()}


def adapt_shapes(undo: ExitStack, model: nn.Module) -> None:
    """Let adapted experts run on the meta device, until ``undo`` is closed.

    PEFT asks for the device's autocast, which the meta device does not have. What is computed is the same.
    """
    layers: Any = adapted_modules(model).values()
    for layer in layers:
        if getattr(layer, "num_experts", 1) > 1:
            replace_forward(undo, layer, partial(_forward_of_shapes, layer))


def _forward_of_shapes(layer: Any, _: Forward) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        lhs, rhs, scale = layer.get_delta_factors(ADAPTER)
        adapted = torch.baddbmm(layer.get_param(), lhs, rhs, alpha=scale)
        base, name = layer.get_base_layer(), layer.parameter_name
        held = dict(base._parameters)
        try:
            del base._parameters[name]
            base.__dict__[name] = adapted
            return layer.base_layer(*args, **kwargs)
        finally:
            base.__dict__.pop(name, None)
            base._parameters.clear()
            base._parameters.update(held)

    return forward


def weight_name(name: str, layer: Any) -> str:
    """Name, in the plain model, of the weight that a module with an adapter adapts.

    Args:
        name: Name of the module in the adapted model.
        layer: The module; where PEFT adapts a parameter instead of a linear module, it says which.
    """
    return f"{plain_name(name)}.{getattr(layer, 'parameter_name', 'weight')}"


def lora_config(
    targets: Collection[str],
    options: LoRA,
    ranks: Mapping[str, int],
    stacks: Collection[str] = (),
    as_parameters: Collection[str] = (),
) -> "LoraConfig":
    """PEFT's config for exactly these weights.

    Args:
        targets: As in ``add_lora``, as are ``options``, ``ranks`` and ``stacks``.
        options: Rank, scale, dropout.
        ranks: Names -> ranks.
        stacks: Names of 3-D parameters; none by default.
        as_parameters: Those of ``targets`` that PEFT is to find by their weight; none by default.
    """
    from peft import LoraConfig

    names = {name: f"{name}.weight" for name in as_parameters}
    patterns = {f"^{re.escape(names.get(name, name))}$": rank for name, rank in ranks.items()}
    return LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        use_dora=options.dora,
        target_modules=sorted(set(targets) - names.keys()),
        target_parameters=sorted({*stacks, *names.values()}) or None,
        rank_pattern=patterns,
        alpha_pattern={pattern: options.alpha * rank / options.r for pattern, rank in patterns.items()},
    )


def _renamed_by_peft(model: Any, targets: Collection[str]) -> frozenset[str]:
    """Those linear modules whose names PEFT takes for experts of transformers 4, which were modules then.

    It would adapt all experts of the model in their place (``convert_peft_config_for_transformers``).
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_renamed(last: str) -> bool:
        config = LoraConfig(target_modules=[last])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of two names that are fused together
            return True
        return set(config.target_modules or ()) != {last}

    renamed = {last for last in {target.rpartition(".")[2] for target in targets} if is_renamed(last)}
    return frozenset(target for target in targets if target.rpartition(".")[2] in renamed)
