"""When to look at a run, and what to do then; each file is one callback."""

from lightning_mm.callbacks.causal import CausalCallback
from lightning_mm.callbacks.drift import DriftCallback
from lightning_mm.callbacks.geometry import GeometryCallback
from lightning_mm.callbacks.probing import ProbingCallback
from lightning_mm.callbacks.schedule import Schedule

__all__ = ["CausalCallback", "DriftCallback", "GeometryCallback", "ProbingCallback", "Schedule"]
