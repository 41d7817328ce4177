"""``layers: auto`` at the start of a fit: every rank reads its share of the probe set, rank 0 chooses, all obey.

Data flow: backbone + data module -> reading and gradients of the untuned model -> ``tuning.selection`` -> one range.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_mm.analysis.hidden_states import HiddenStates, extract_hidden_states, gather_hidden_states
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import Made, all_gather_object, run_on_all_ranks
from lightning_mm.core.errors import UserError
from lightning_mm.core.random_state import restore_rng, rng_state
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.layer_selection.gradient_criteria import GRADIENT_CRITERIA, try_gradient_scores
from lightning_mm.layer_selection.select import AutoRange, Selection, auto_layers_option, log_selection, select_layers
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.training.eval_context import data_of
from lightning_mm.tuning.policy import TuningPolicy


def choose_layers(
    backbone: Backbone,
    policy: TuningPolicy,
    options: AutoRange,
    trainer: L.Trainer,
    loaded: nn.Module | None = None,
) -> Selection:
    """Read the untuned model and choose; the same choice on every rank.

    Args:
        backbone: The model; it is loaded for this and given back.
        policy: The policy that says ``auto``.
        options: How to choose.
        trainer: With its data module, in whose precision and on whose device the model is read.
        loaded: The model, if the user has loaded it; None (default): it is loaded.

    Raises:
        UserError: Some rank cannot read, or nothing can be chosen; the same on every rank.
    """
    generators = rng_state()
    probe_set = data_of(trainer).probe_set()
    spec = str(getattr(policy, auto_layers_option(policy) or "layers"))
    try:
        with torch.device("cpu"):  # Lightning configures models with the accelerator as the default device
            model, layout = _agreed(lambda: _loaded(backbone, trainer, loaded))
            mine = _agreed(lambda: _read(MultimodalModel(model, layout), probe_set, trainer))
            reading = _agreed(lambda: gather_hidden_states(mine, probe_set))
            selection = _agreed(
                lambda: _selected(MultimodalModel(model, layout), reading, probe_set, options, trainer, spec)
            )
        chosen: Selection = all_gather_object(selection)[0]
    finally:
        restore_rng(generators)
    log_selection(chosen)
    return chosen


def _agreed(attempt: Callable[[], Made]) -> Made:
    """What is made, or one error on all ranks."""
    made, failure = run_on_all_ranks(attempt)
    if isinstance(failure, UserError):
        raise failure
    if failure:
        raise UserError(
            "Layers cannot be chosen (layers: auto).", failure, "Mend that, or name the layers, such as 25%-50%."
        )
    return made  # type: ignore[return-value]  # None is what was made, where there was no failure


def _loaded(backbone: Backbone, trainer: L.Trainer, loaded: nn.Module | None) -> tuple[Any, ModelLayout]:
    model: Any = load_model(backbone) if loaded is None else loaded
    layout = ModelLayout.of(model)
    return model.eval().requires_grad_(False).to(trainer.strategy.root_device), layout


def _read(mm: MultimodalModel, probe_set: ProbeSet, trainer: L.Trainer) -> HiddenStates:
    data = data_of(trainer)
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        mine = extract_hidden_states(mm, data.probe_loader(probe_set), trainer.strategy.root_device)
    data.rejected_samples.add(replace(each, kind="probe") for each in mine.rejected)
    return mine


def _selected(
    mm: MultimodalModel,
    reading: HiddenStates | None,
    probe_set: ProbeSet,
    options: AutoRange,
    trainer: L.Trainer,
    spec: str,
) -> Selection | None:
    """On rank 0, which holds all that was read."""
    if reading is None:
        return None
    for problem in reading.problems:
        log_decision("auto.probes", "not all are read", problem)
    device = trainer.strategy.root_device
    batches = data_of(trainer).sample_batches(options.batches) if set(GRADIENT_CRITERIA) & set(options.criteria) else []
    with trainer.precision_plugin.forward_context():
        gradients = try_gradient_scores(mm, batches, device, options.criteria)
    return select_layers(reading, probe_set, gradients, options, device, spec)
