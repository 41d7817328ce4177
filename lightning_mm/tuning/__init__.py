"""Which weights train: layer ranges, policies and their plans, the census and the optimizer."""

from lightning_mm.models.lora import LoRA
from lightning_mm.tuning.policies import (
    ConnectorOnly,
    EarlyLayers,
    Full,
    IntermediateOnly,
    LateLayers,
    LoRAOnMiddle,
    PerRegion,
    RandomLayers,
    UniformSparse,
)
from lightning_mm.tuning.policy import TuningPlan, TuningPolicy

__all__ = [
    "ConnectorOnly",
    "EarlyLayers",
    "Full",
    "IntermediateOnly",
    "LateLayers",
    "LoRA",
    "LoRAOnMiddle",
    "PerRegion",
    "RandomLayers",
    "TuningPlan",
    "TuningPolicy",
    "UniformSparse",
]
