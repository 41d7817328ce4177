"""Optimizer and schedule: parameter groups by region, AdamW (fused, 8-bit or stochastically rounded), warm-up, decay.

Data flow: model + plan -> groups (region x decayed or not) -> optimizer -> learning-rate schedule by step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import AdamW, Optimizer

from lightning_mm.core.choices import refuse_other_choices
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.quantization import adamw_8bit
from lightning_mm.tuning.policy import TuningPlan
from lightning_mm.tuning.stochastic_adamw import StochasticAdamW


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its schedule.

    Args:
        name: 'adamw' (fused), 'adamw8bit' (bitsandbytes: 8-bit states, for memory) or 'adamw_sr' (for weights that are
            trained in bfloat16: updates in float32, rounded at random so that small ones are not lost).
        state_dtype: What the moments of adamw_sr are held in.
        lr: Peak learning rate; a region may say its own (model.tuning.lr).
        weight_decay: Decoupled weight decay of matrices; vectors (norms, biases) have none.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        schedule: What follows the warm-up.
        warmup: Share of all steps (below 1) or number of steps spent rising to the peak.
        final: Learning rate at the end, as a share of the peak.
    """

    name: Literal["adamw", "adamw8bit", "adamw_sr"] = "adamw"
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    final: float = 0.0

    def __post_init__(self) -> None:
        refuse_other_choices(self, "model.optimizer")
        for option, value, valid in (
            ("lr", self.lr, self.lr > 0),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0),
            ("warmup", self.warmup, self.warmup >= 0),
            ("final", self.final, 0 <= self.final <= 1),
            ("betas", self.betas, all(0 <= beta < 1 for beta in self.betas)),
            ("eps", self.eps, self.eps > 0),
        ):
            if not valid:
                raise UserError(f"model.optimizer.{option}: {value} is out of range.", "See --help.", "Change it.")
        if self.state_dtype != "float32" and self.name != "adamw_sr":
            raise UserError(
                f"model.optimizer.state_dtype: {self.state_dtype} does not go with {self.name}.",
                "Its moments would lose what is added to them at each step.",
                "Set model.optimizer.name adamw_sr, or adamw8bit for still smaller states.",
            )


def parameter_groups(mm: MultimodalModel, plan: TuningPlan, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Groups of the tensors that train, one per region and decay, each with its own learning rate."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in mm.model.named_parameters():
        if not parameter.requires_grad:
            continue
        region, decayed = mm.layout.location_of(name).region.value, parameter.ndim > 1
        decay = plan.weight_decay.get(region, settings.weight_decay) if decayed else 0.0
        label = region if decayed else f"{region} (no decay)"
        lr = plan.lr.get(region, settings.lr)
        options = {"lr": lr, "weight_decay": decay, "betas": settings.betas, "eps": settings.eps, "name": label}
        group = groups.setdefault((region, decayed), {"params": [], **options})
        group["params"].append(parameter)
    return list(groups.values())


def named_groups(mm: MultimodalModel, plan: TuningPlan) -> list[dict[str, Any]]:
    """Groups of the tensors that train, one per region, for an optimizer that the user makes.

    A group has the region's name, and no rate but what the policy says of that region, so that the optimizer's own
    defaults count.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in mm.model.named_parameters():
        if parameter.requires_grad:
            region = mm.layout.location_of(name).region.value
            group = groups.setdefault(region, {"params": [], "name": region})
            group["params"].append(parameter)
    for option, rates in (("lr", plan.lr), ("weight_decay", plan.weight_decay)):
        for region, value in rates.items():
            if region in groups:
                groups[region][option] = value
    return list(groups.values())


def build_optimizer(groups: list[dict[str, Any]], settings: OptimizerSettings) -> Optimizer:
    """The AdamW that the settings name, over parameter groups."""
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.name == "adamw8bit":
        log_decision("model.optimizer", "8-bit AdamW", "asked for; states of tensors below 4096 values stay in 32 bits")
        return adamw_8bit(groups, **options)
    if settings.name == "adamw_sr":
        why = f"asked for; bfloat16 weights keep the mean of small updates, moments are {settings.state_dtype}"
        log_decision("model.optimizer", "AdamW, rounded at random", why)
        return StochasticAdamW(groups, state_dtype=settings.state_dtype, **options)
    if any(param.dtype == torch.bfloat16 for group in groups for param in group["params"]):
        why = "steps below 1/512 of a bfloat16 weight are lost; model.optimizer.name adamw_sr keeps them"
        log_decision("model.optimizer.name", "adamw", why)
    log_decision("model.optimizer", "fused AdamW", "one kernel over all tensors; the same arithmetic")
    return AdamW(groups, fused=True, **options)


def schedule_factor(settings: OptimizerSettings, total_steps: int) -> Callable[[int], float]:
    """The schedule: a function from the step to a share of the peak learning rate.

    Args:
        settings: Of the optimizer.
        total_steps: Optimizer steps of the run.

    Example:
        >>> factor = schedule_factor(OptimizerSettings(warmup=2, final=0.1), total_steps=6)
        >>> [round(factor(step), 2) for step in range(7)]
        [0.5, 1.0, 1.0, 0.87, 0.55, 0.23, 0.1]
    """
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * total_steps

    def factor(step: int) -> float:
        if step + 1 < warmup:
            return (step + 1) / warmup
        progress = min(1.0, max(0.0, step - warmup) / max(1.0, total_steps - warmup))
        shape = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
        return settings.final + (1 - settings.final) * shape[settings.schedule]

    return factor


def restore_learning_rates(
    optimizer: Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR, planned: list[dict[str, Any]]
) -> None:
    """Replace a checkpoint's learning rates, decays, betas and eps by those of this run's config; changes are logged.

    Args:
        optimizer: Restored from the checkpoint.
        scheduler: Restored from the checkpoint.
        planned: Groups as configured now, in the optimizer's order.
    """
    for index, (group, wanted) in enumerate(zip(optimizer.param_groups, planned, strict=True)):
        held = {**group, "lr": group["initial_lr"], "betas": tuple(group["betas"])}
        for key in ("lr", "weight_decay", "betas", "eps"):
            if held[key] != wanted[key]:
                log_decision(f"model.optimizer.{key}", wanted[key], f"{wanted['name']}; the checkpoint had {held[key]}")
            group[key] = wanted[key]
        scheduler.base_lrs[index] = group["initial_lr"] = wanted["lr"]
        group["lr"] = wanted["lr"] * scheduler.lr_lambdas[index](scheduler.last_epoch)
