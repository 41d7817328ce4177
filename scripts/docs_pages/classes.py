"""The pages of policies and callbacks: every class with its options, types, defaults and meanings.

Data flow: signatures and docstrings -> Markdown.
"""

import dataclasses
import inspect
import re
from typing import Any

from docs_pages.markdown import arguments_of, cell, code, summary_of, table
from lightning_mm import tuning
from lightning_mm.analysis.probing import ProbingOptions
from lightning_mm.callbacks.causal import CausalCallback
from lightning_mm.callbacks.layer_callbacks import DriftCallback, GeometryCallback, ProbingCallback
from lightning_mm.callbacks.schedule import Schedule
from lightning_mm.models.layout import Region
from lightning_mm.models.lora import LoRA
from lightning_mm.training.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from lightning_mm.training.callbacks.evaluation import HeldOutEvaluation
from lightning_mm.training.callbacks.progress import ProgressBar
from lightning_mm.training.callbacks.run_recorder import RunRecorder
from lightning_mm.training.callbacks.throughput import Throughput
from lightning_mm.tuning.policy import RegionPolicy, TuningPolicy

_POLICIES = """# Policies

A policy says which weights train. It is chosen by `--model.tuning NAME` with options such as
`--model.tuning.layers 6-16`, by a file of `configs/tuning/`, or in Python: `MMModule(model, IntermediateOnly("25%-50%"))`.
Only what a policy names trains; a census of the trainable weights is printed before the first step, and a selector that
matches nothing is an error. Costs of the policies side by side: `lightning-mm plan` ([Choose layers](../choose-layers.md)).

Layer ranges are written `6-16` (0-based, inclusive), `25%-50%`, `first:8`, `last:8`, `middle:25%`, `uniform:25%`,
`random:25%:7`, `[3, 7, 11]`, `all`, or `auto`.

"""
_CALLBACKS = """# Callbacks

The first four analyze the layers while a model trains; losses and weights stay bit-identical to a run without them. They
share one forward pass per look. See [Look inside](../look-inside.md). The others are in every run; the module adds those
that a trainer lacks, and one that is given with options of its own stays.

"""


def policies() -> list[type[TuningPolicy]]:
    """All policies, in the order of their module."""
    named = [getattr(tuning, name) for name in tuning.__all__]
    kinds = [kind for kind in named if isinstance(kind, type) and issubclass(kind, TuningPolicy)]
    return [kind for kind in kinds if kind not in (TuningPolicy, RegionPolicy)]


def callbacks() -> tuple[type, ...]:
    """All callbacks with something to say about them."""
    inside = (ProbingCallback, GeometryCallback, DriftCallback, CausalCallback)
    return (*inside, HeldOutEvaluation, LastCheckpoint, BestCheckpoint, RunRecorder, Throughput, ProgressBar)


def policies_page() -> str:
    """Markdown: what each policy trains, and its options."""
    regions = list(Region)
    rows = [(f"[`{kind.__name__}`](#{kind.__name__.lower()})", *_modes(kind)) for kind in policies()]
    text = _POLICIES + table(("policy", *(region.value for region in regions)), rows) + "\n"
    text += "Empty: frozen. Every region can be set on its own: `--model.tuning.connector full`.\n\n"
    for kind in policies():
        text += f"## {kind.__name__}\n\n{summary_of(kind)}\n\n{_options(kind)}\n"
    return text + f"## LoRA\n\n{summary_of(LoRA)}\n\n{_options(LoRA)}"


def _modes(kind: type[TuningPolicy]) -> list[str]:
    policy: Any = kind()
    modes = [policy.mode_of(region) for region in Region]
    return ["" if mode == "frozen" else mode for mode in modes]


def callbacks_page() -> str:
    """Markdown: each callback and its options."""
    text = _CALLBACKS
    for kind in callbacks():
        text += f"## {kind.__name__}\n\n{summary_of(kind)}\n\n{_options(kind)}\n"
    for kind in (Schedule, ProbingOptions):
        text += f"## {kind.__name__}\n\n{summary_of(kind)}\n\n{_options(kind)}\n"
    return text


def _options(kind: type) -> str:
    """Table of a class's arguments; a sentence where it has none."""
    told = arguments_of(kind)
    rows = []
    for name, parameter in inspect.signature(kind).parameters.items():
        if name not in told and parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        rows.append((code(name), code(_type(parameter.annotation)), code(_default(kind, parameter)), cell(told.get(name, ""))))
    return table(("option", "type", "default", "meaning"), rows) if rows else "It has no options.\n"


def _type(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    written = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=\w)", "", written).replace("NoneType", "None")


def _default(kind: type, parameter: inspect.Parameter) -> str | None:
    value = parameter.default
    if dataclasses.is_dataclass(kind):
        field = next((each for each in dataclasses.fields(kind) if each.name == parameter.name), None)
        if field is not None and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
    if value is inspect.Parameter.empty:
        return None
    return type(value).__name__ + "()" if dataclasses.is_dataclass(value) else repr(value)
