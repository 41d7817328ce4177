"""lightning_mm: partial fine-tuning of multimodal LLMs with PyTorch Lightning, and analysis of every layer.

Data flow: ``from lightning_mm import NAME`` -> the module that defines the name, imported then and not before.

The version below is the only one: package metadata is built from it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; ``_MODULES`` says the same to Python
    from lightning_mm.analysis.probing import ProbingOptions
    from lightning_mm.analysis.read import (
        compare_hidden_states,
        measure_hidden_states,
        probe_hidden_states,
        read_hidden_states,
        save_findings,
    )
    from lightning_mm.callbacks.causal import CausalCallback
    from lightning_mm.callbacks.hf import InspectionCallback
    from lightning_mm.callbacks.layer_callbacks import DriftCallback, GeometryCallback, ProbingCallback
    from lightning_mm.callbacks.schedule import Schedule
    from lightning_mm.causal.editing.multedit import EditConfig
    from lightning_mm.causal.effects.activation_patching import TraceConfig
    from lightning_mm.causal.effects.knockout_curves import KnockoutConfig
    from lightning_mm.causal.study import StudyConfig
    from lightning_mm.core.errors import UserError
    from lightning_mm.data.datamodule import MMDataModule
    from lightning_mm.data.probe_sets.given import Probes
    from lightning_mm.execution.prepare import Compute
    from lightning_mm.layer_selection.select import AutoRange, Selection
    from lightning_mm.models.loading import Backbone
    from lightning_mm.models.lora import LoRA
    from lightning_mm.report.html import write_report
    from lightning_mm.study.run import run_study
    from lightning_mm.study.settings import StudySettings
    from lightning_mm.training.module import MMModule
    from lightning_mm.tuning.apply import apply_policy
    from lightning_mm.tuning.layers import resolve_layers
    from lightning_mm.tuning.optimizer import OptimizerSettings
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
    from lightning_mm.verbs.check import check
    from lightning_mm.verbs.check_result import CheckResult
    from lightning_mm.verbs.edit import EditResult, edit
    from lightning_mm.verbs.export_model import export_model
    from lightning_mm.verbs.inspect import InspectionResult, inspect
    from lightning_mm.verbs.plan import PlanResult, plan
    from lightning_mm.verbs.replay import ReplayResult, replay
    from lightning_mm.verbs.select_layers import select_layers
    from lightning_mm.verbs.trace import TraceResult, trace

__version__ = "0.1.0"

__all__ = [
    "AutoRange",
    "Backbone",
    "CausalCallback",
    "CheckResult",
    "Compute",
    "ConnectorOnly",
    "DriftCallback",
    "EarlyLayers",
    "EditConfig",
    "EditResult",
    "Full",
    "GeometryCallback",
    "InspectionCallback",
    "InspectionResult",
    "IntermediateOnly",
    "KnockoutConfig",
    "LateLayers",
    "LoRA",
    "LoRAOnMiddle",
    "MMDataModule",
    "MMModule",
    "OptimizerSettings",
    "PerRegion",
    "PlanResult",
    "Probes",
    "ProbingCallback",
    "ProbingOptions",
    "RandomLayers",
    "ReplayResult",
    "Schedule",
    "Selection",
    "StudyConfig",
    "StudySettings",
    "TraceConfig",
    "TraceResult",
    "TuningPlan",
    "TuningPolicy",
    "UniformSparse",
    "UserError",
    "apply_policy",
    "check",
    "compare_hidden_states",
    "edit",
    "export_model",
    "inspect",
    "measure_hidden_states",
    "plan",
    "probe_hidden_states",
    "read_hidden_states",
    "replay",
    "resolve_layers",
    "run_study",
    "save_findings",
    "select_layers",
    "trace",
    "write_report",
]

_MODULES = {
    "analysis.probing": "ProbingOptions",
    "analysis.read": "compare_hidden_states measure_hidden_states probe_hidden_states read_hidden_states save_findings",
    "callbacks.hf": "InspectionCallback",
    "callbacks.causal": "CausalCallback",
    "callbacks.layer_callbacks": "DriftCallback GeometryCallback ProbingCallback",
    "callbacks.schedule": "Schedule",
    "causal.editing.multedit": "EditConfig",
    "causal.effects.activation_patching": "TraceConfig",
    "causal.effects.knockout_curves": "KnockoutConfig",
    "causal.study": "StudyConfig",
    "core.errors": "UserError",
    "data.datamodule": "MMDataModule",
    "data.probe_sets.given": "Probes",
    "execution.prepare": "Compute",
    "layer_selection.select": "AutoRange Selection",
    "models.loading": "Backbone",
    "models.lora": "LoRA",
    "report.html": "write_report",
    "study.run": "run_study",
    "study.settings": "StudySettings",
    "training.module": "MMModule",
    "tuning.apply": "apply_policy",
    "tuning.layers": "resolve_layers",
    "tuning.optimizer": "OptimizerSettings",
    "tuning.policies": "ConnectorOnly EarlyLayers Full IntermediateOnly LateLayers LoRAOnMiddle PerRegion RandomLayers "
    "UniformSparse",
    "tuning.policy": "TuningPlan TuningPolicy",
    "verbs.check": "check",
    "verbs.check_result": "CheckResult",
    "verbs.edit": "EditResult edit",
    "verbs.export_model": "export_model",
    "verbs.inspect": "InspectionResult inspect",
    "verbs.plan": "PlanResult plan",
    "verbs.replay": "ReplayResult replay",
    "verbs.select_layers": "select_layers",
    "verbs.trace": "TraceResult trace",
}
_HOME = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """The public name, imported on first use: ``import lightning_mm`` alone loads neither torch nor transformers."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
