"""What the layers of a model say: probes, geometry, and how far they are from the model that the arms begin from.

Data flow: module + probe set -> hidden states -> probing, geometry, drift (of hidden states and of weights) ->
``Findings`` -> layers.csv.gz of the job. The hidden states of the starting model are kept under work/, for the drift of
all arms of its seed.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.analysis.drift import measure_drift
from lightning_mm.analysis.findings import Findings, FindingsWriter
from lightning_mm.analysis.geometry import measure_geometry, resolve_measures
from lightning_mm.analysis.hidden_states import HiddenStates, extract_hidden_states
from lightning_mm.analysis.probing import ProbingOptions, run_probes
from lightning_mm.core.estimate import Estimate
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.models.lora import ADAPTER, adapted_weights
from lightning_mm.study.opened import Reader
from lightning_mm.study.settings import LayerReading
from lightning_mm.training.module import MMModule

DRIFT_OF_WEIGHTS = "drift_weights"


def probe_set_of(reader: Reader, options: LayerReading) -> tuple[MMDataModule, ProbeSet]:
    """The rows that all models of the study are read on, and what makes batches of them.

    Args:
        reader: How models are read.
        options: Which pictures.
    """
    given = {"train": None, "val": None, "test": None, "predict": None, "probes": options.probes}
    data = MMDataModule(
        **{**reader.data.arguments, **given, "probe_images": options.images, "max_length": reader.data.max_length}
    )
    return data, data.draw_probe_set(options.images)


def read_layers(
    module: MMModule, start: MMModule | None, reader: Reader, options: LayerReading, kept: RunDirectory
) -> Findings:
    """Probes and geometry of every layer; with a starting model, the drift from it.

    Args:
        module: The model.
        start: The model that it began from; None: it is that model.
        reader: How models are read.
        options: What is read.
        kept: Folder of the starting model's hidden states.
    """
    data, probe_set = probe_set_of(reader, options)
    device = module.mm.device
    reading = _read(module, data, probe_set, reader)
    found = Findings(0)
    found.problems += reading.problems
    found.extend(run_probes(reading, None, probe_set, ProbingOptions(), device))
    measures = resolve_measures(options.measures)
    found.extend(measure_geometry(reading, probe_set, measures, options.neighbors, device))
    if start is None:
        FindingsWriter(kept).save_start(reading, probe_set)
        return found
    began = FindingsWriter(kept).load_start(probe_set)
    if began is None:
        began = _read(start, data, probe_set, reader)
    found.extend(measure_drift(began, reading, probe_set, options.neighbors, device))
    found.add("drift", DRIFT_OF_WEIGHTS, "", weight_drift(start, module), first=0)
    return found


def _read(module: MMModule, data: MMDataModule, probe_set: ProbeSet, reader: Reader) -> HiddenStates:
    device = module.mm.device
    with torch.no_grad(), reader.autocast(device):
        return extract_hidden_states(module.mm, data.probe_loader(probe_set), device, step=0)


def weight_drift(start: MMModule, module: MMModule) -> list[Estimate]:
    """How far the weights of each block have moved: norm of the change over norm of the weights.

    Args:
        start: The model at the beginning.
        module: The same, tuned; the product of its adapters counts as change.
    """
    before = {name: parameter.detach() for name, parameter in _model(start).named_parameters()}
    layout = start.mm.layout
    changed, whole = torch.zeros(2, layout.num_layers, dtype=torch.float64)
    deltas = _deltas(before, module)
    for name, parameter in before.items():
        layer = layout.location_of(name).layer
        if layer is not None:
            whole[layer] += parameter.double().square().sum().cpu()
            if name in deltas:
                changed[layer] += deltas[name].double().square().sum().cpu()
    ratios = (changed / whole).sqrt().tolist()
    return [Estimate.of(ratio, None, null=0.0) for ratio in ratios]


def _deltas(before: dict[str, Tensor], module: MMModule) -> dict[str, Tensor]:
    """Change of each tensor that trained, by its name in the starting model."""
    model = _model(module)
    deltas = {
        name: parameter.detach().to(before[name].device, torch.float32) - before[name].float()
        for name, parameter in model.named_parameters()
        if name in before and name in module.plan.full
    }
    for name, found in adapted_weights(model).items():
        adapter: Any = found
        deltas[name] = adapter.get_delta_weight(ADAPTER).detach().to(before[name].device)
    return deltas


def _model(module: MMModule) -> nn.Module:
    model: nn.Module = module.mm.model
    return model
