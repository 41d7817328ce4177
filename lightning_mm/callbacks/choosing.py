"""``layers: auto`` at the start of a fit: every rank reads its share of the probe set, rank 0 chooses, all obey.

Data flow: backbone + data module -> reading and gradients of the untuned model -> ``tuning.selection`` -> one range.
"""

from typing import Any

import lightning as L
import torch

from lightning_mm import state
from lightning_mm.callbacks.live import data_of
from lightning_mm.models.anatomy import Anatomy
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.taps.reading import gather, read
from lightning_mm.tuning.gradients import GradientScores, gradient_scores
from lightning_mm.tuning.policy import TuningPolicy
from lightning_mm.tuning.selection import GRADIENT, AutoRange, Selection, asks_for_selection, select_layers, tell


def choose_layers(backbone: Backbone, policy: TuningPolicy, options: AutoRange, trainer: L.Trainer) -> Selection:
    """Read the untuned model and choose; the same choice on every rank.

    Args:
        backbone: The model; it is loaded for this and given back.
        policy: The policy that says ``auto``.
        options: How to choose.
        trainer: With its data module, in whose precision and on whose device the model is read.
    """
    generators = state.rng_state()
    data, device = data_of(trainer), trainer.strategy.root_device
    probe_set = data.probe_set()
    with torch.device("cpu"):  # Lightning configures models with the accelerator as the default device
        model: Any = load_model(backbone)
        anatomy = Anatomy.of(model)
        model.eval().requires_grad_(False).to(device)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            reading = gather(read(model, anatomy, data.probe_loader(probe_set), device), probe_set)
        selection = None
        if reading is not None:
            gradients = _gradients(model, anatomy, options, trainer) if backbone.quantization == "none" else None
            spec = str(getattr(policy, asks_for_selection(policy) or "layers"))
            selection = select_layers(reading, probe_set, gradients, options, device, spec)
    chosen: Selection = state.gathered(selection)[0]
    tell(chosen)
    state.restore_rng(generators)
    return chosen


def _gradients(model: Any, anatomy: Anatomy, options: AutoRange, trainer: L.Trainer) -> GradientScores | None:
    batches = data_of(trainer).sample_batches(options.batches)
    if len(batches) < 2 or not set(GRADIENT) & set(options.criteria):
        return None
    with trainer.precision_plugin.forward_context():
        return gradient_scores(model, anatomy, batches, trainer.strategy.root_device)
