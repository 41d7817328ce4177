"""The census: parameters, modes and rates of each region, counted on the model itself and not on the plan.

Data flow: model under its plan -> ``Census`` -> printed before the first step and saved with the run; the digest goes
into every checkpoint.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from lightning_mm.core.errors import UserError
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region
from lightning_mm.tuning.apply import is_trainable
from lightning_mm.tuning.layers import describe_layers
from lightning_mm.tuning.part_sizes import adapter_reach, num_weights, weights_by_part
from lightning_mm.tuning.policy import TuningPlan


@dataclass(frozen=True)
class CensusRow:
    """One region, or neighboring decoder blocks in the same mode; of those, the weights by part, too."""

    region: str
    mode: str
    parameters: int
    trainable: int
    dtype: str
    training: bool
    lr: float | None
    weight_decay: float | None
    parts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Census:
    """Counts of a model under a policy.

    Args:
        policy: The policy, as the user would write it.
        expression: The layer range, as written.
        layers: Indices of the blocks that train.
        num_layers: Decoder blocks of the model.
        rows: Regions, bottom to top.
        reach: Share of the weights of the layers in the range that adapters reach; None without adapters there.
        digest: SHA-256 over every trainable tensor's name, shape and mode; equal for equal policies on equal models.
    """

    policy: str
    expression: str
    layers: tuple[int, ...]
    num_layers: int
    rows: tuple[CensusRow, ...]
    digest: str
    reach: float | None = None

    @property
    def total(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The census as ``census.json`` holds it."""
        return {
            "digest": self.digest,
            "policy": self.policy,
            "layers": {"expression": self.expression, "trained": list(self.layers), "total": self.num_layers},
            "total_parameters": self.total,
            "trainable_parameters": self.trainable,
            "adapters_reach": self.reach,
            "rows": [asdict(row) for row in self.rows],
        }

    @property
    def parts(self) -> dict[str, int]:
        """Weights of all decoder blocks, by part."""
        counts = Counter[str]()
        for row in self.rows:
            counts.update(row.parts)
        return dict(counts.most_common())


def take_census(
    mm: MultimodalModel, plan: TuningPlan, lr: float | None = None, weight_decay: float | None = None
) -> Census:
    """Count the model's parameters, and check that what trains is what the plan says.

    Args:
        mm: The model after ``apply_plan``.
        plan: What is to train.
        lr: The optimizer's learning rate, for regions without their own; None where there is no optimizer.
        weight_decay: The optimizer's weight decay, for regions without their own; None where there is no optimizer.

    Raises:
        UserError: A tensor trains that is not in the plan, or one of the plan does not train.
    """
    trained = {name for name, p in mm.model.named_parameters() if p.requires_grad}
    planned = {name for name, _ in mm.model.named_parameters() if is_trainable(name, plan)}
    if trained != planned:
        raise UserError(
            "What trains is not what was planned.",
            f"Stray: {sorted(trained - planned)[:5] or 'none'}. Missing: {sorted(planned - trained)[:5] or 'none'}.",
            "Do not change requires_grad outside the tuning policy.",
        )
    rows = tuple(_rows(mm, plan, lr, weight_decay))
    digest = _digest(mm.model, plan)
    reach = adapter_reach(mm, plan)
    return Census(plan.policy, plan.expression, plan.layers, plan.num_layers, rows, digest, reach)


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
        count = sum(num_weights(p) for _, p in parts)
        trainable = sum(num_weights(p) for _, p in parts if p.requires_grad)
        dtypes = "/".join(sorted({_dtype(p) for _, p in parts}))
        training = any(owners[n.rpartition(".")[0]].training for n, _ in parts)
        rates = (plan.lr.get(region, lr), plan.weight_decay.get(region, weight_decay)) if trainable else (None, None)
        return CensusRow(label, mode, count, trainable, dtypes, training, *rates, weights_by_part(mm.layout, parts))

    for region in Region:
        if region is not Region.LAYERS:
            if parts := members.get((region, None)):
                yield row(region.value, region, parts, plan.modes[region])
            continue
        for trained, run in groupby(range(mm.layout.num_layers), key=lambda i: i in plan.layers):
            indices = list(run)
            parts = [part for i in indices for part in members.get((region, i), [])]
            yield row(f"layers {describe_layers(indices)}", region, parts, plan.modes[region] if trained else "frozen")


def _dtype(parameter: nn.Parameter) -> str:
    state = getattr(parameter, "quant_state", None)
    return str(getattr(state, "quant_type", parameter.dtype)).removeprefix("torch.")
