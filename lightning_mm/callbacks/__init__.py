"""Callbacks that analyze the model's layers during training, and the schedule of their inspections."""

from lightning_mm.callbacks.causal import CausalCallback
from lightning_mm.callbacks.layer_callbacks import DriftCallback, GeometryCallback, ProbingCallback
from lightning_mm.callbacks.schedule import Schedule

__all__ = ["CausalCallback", "DriftCallback", "GeometryCallback", "ProbingCallback", "Schedule"]
