"""The census: what each region of the model does in this run, counted on the model itself and not on the plan.

Data flow: applied model -> ``Census`` -> printed before the first step, saved with the run; the digest goes into every
checkpoint.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from lightning_mm.core.errors import UserError
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region
from lightning_mm.tuning.apply import trains
from lightning_mm.tuning.layers import describe_layers
from lightning_mm.tuning.policy import TuningPlan


@dataclass(frozen=True)
class CensusRow:
    """One region, or one run of decoder blocks that are treated alike."""

    region: str
    mode: str
    parameters: int
    trainable: int
    dtype: str
    training: bool
    lr: float | None
    weight_decay: float | None


@dataclass(frozen=True)
class Census:
    """Counts of a model under a policy.

    Args:
        policy: As the user would write it.
        expression: Layer range as written.
        layers: Indices of the blocks that train.
        num_layers: Decoder blocks of the model.
        rows: Bottom to top.
        digest: SHA-256 over every trainable tensor's name, shape and mode: the same policy on the same model.
    """

    policy: str
    expression: str
    layers: tuple[int, ...]
    num_layers: int
    rows: tuple[CensusRow, ...]
    digest: str

    @property
    def total(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As saved in ``census.json``."""
        return {
            "digest": self.digest,
            "policy": self.policy,
            "layers": {"expression": self.expression, "trained": list(self.layers), "total": self.num_layers},
            "total_parameters": self.total,
            "trainable_parameters": self.trainable,
            "rows": [asdict(row) for row in self.rows],
        }


def take_census(
    mm: MultimodalModel, plan: TuningPlan, lr: float | None = None, weight_decay: float | None = None
) -> Census:
    """Count the model and hold it against the plan.

    Args:
        mm: The model after ``apply_plan``.
        plan: What was asked for.
        lr: The optimizer's learning rate, for regions that do not say their own.
        weight_decay: The same for weight decay.

    Raises:
        UserError: A tensor trains that was not planned, or one that was planned does not.
    """
    moving = {name for name, p in mm.model.named_parameters() if p.requires_grad}
    planned = {name for name, _ in mm.model.named_parameters() if trains(name, mm.layout, plan)}
    if moving != planned:
        raise UserError(
            "What trains is not what was planned.",
            f"Stray: {sorted(moving - planned)[:5] or 'none'}. Missing: {sorted(planned - moving)[:5] or 'none'}.",
            "Do not change requires_grad outside the tuning policy.",
        )
    rows = tuple(_rows(mm, plan, lr, weight_decay))
    digest = _digest(mm.model, plan)
    return Census(plan.policy, plan.expression, plan.layers, plan.num_layers, rows, digest)


def _digest(model: nn.Module, plan: TuningPlan) -> str:
    tensors = sorted((n, list(p.shape), "lora" if ".lora_" in n else "full") for n, p in _trainable(model))
    lora = asdict(plan.lora) if plan.lora is not None else None
    return hashlib.sha256(json.dumps([tensors, lora, plan.num_layers]).encode()).hexdigest()


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _rows(mm: MultimodalModel, plan: TuningPlan, lr: float | None, weight_decay: float | None) -> Iterator[CensusRow]:
    members: dict[tuple[Region, int | None], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in mm.model.named_parameters():
        place = mm.layout.location_of(name)
        members.setdefault((place.region, place.layer), []).append((name, parameter))
    owners = dict(mm.model.named_modules())

    def row(label: str, region: Region, parts: list[tuple[str, nn.Parameter]], mode: str) -> CensusRow:
        count = sum(_numel(p) for _, p in parts)
        trainable = sum(_numel(p) for _, p in parts if p.requires_grad)
        dtypes = "/".join(sorted({_dtype(p) for _, p in parts}))
        training = any(owners[n.rpartition(".")[0]].training for n, _ in parts)
        rates = (plan.lr.get(region, lr), plan.weight_decay.get(region, weight_decay)) if trainable else (None, None)
        return CensusRow(label, mode, count, trainable, dtypes, training, *rates)

    for region in Region:
        if region is not Region.LAYERS:
            if parts := members.get((region, None)):
                yield row(region.value, region, parts, plan.modes[region])
            continue
        for trained, run in groupby(range(mm.layout.num_layers), key=lambda i: i in plan.layers):
            indices = list(run)
            parts = [part for i in indices for part in members.get((region, i), [])]
            yield row(f"layers {describe_layers(indices)}", region, parts, plan.modes[region] if trained else "frozen")


def _numel(parameter: nn.Parameter) -> int:
    """Number of weights; 4-bit tensors hold two in a byte and know their own shape."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def _dtype(parameter: nn.Parameter) -> str:
    state = getattr(parameter, "quant_state", None)
    return str(getattr(state, "quant_type", parameter.dtype)).removeprefix("torch.")
