"""What is to be inspected: a model folder, a run, or one of its checkpoints, each as a model that can be read.

Data flow: a path on the command line -> ``Subject`` -> readings and a layer selection.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn

from lightning_mm.cli.exporting import restored
from lightning_mm.dashboards.rundir import RunDirectory, read_json
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.probe_sets import ProbeSet
from lightning_mm.decisions import decide
from lightning_mm.errors import UserError
from lightning_mm.models.anatomy import Anatomy
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.taps.reading import Reading, read
from lightning_mm.tuning.criteria import drift_criterion
from lightning_mm.tuning.gradients import GradientScores, gradient_scores
from lightning_mm.tuning.selection import GRADIENT, AutoRange, Selection, select_layers, transplant_criterion
from lightning_mm.tuning.transplanting import transplant_gains
from lightning_mm.tuning.window import Criterion


@dataclass(eq=False)
class Subject:
    """A model to be read.

    Args:
        name: As given.
        kind: Its class.
        model: In eval mode.
        anatomy: Of the plain model.
        data: Makes its batches.
        trained: Blocks that were trained; empty where that is not known.
        device: Where it is.
        bf16: Whether its forward pass computes in bfloat16.
        auto: How layers are chosen.
    """

    name: str
    kind: str
    model: nn.Module
    anatomy: Anatomy
    data: MMDataModule
    trained: tuple[int, ...]
    device: torch.device
    bf16: bool
    auto: AutoRange

    def read(self, probe_set: ProbeSet, step: int = 0) -> Reading:
        """Every layer, on every row."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return read(self.model, self.anatomy, self.data.probe_loader(probe_set), self.device, step=step)

    def select(
        self, reading: Reading, probe_set: ProbeSet, pilot: "tuple[Subject, Reading] | None" = None
    ) -> Selection:
        """The layers worth training, also by what a second, tuned model says."""
        batches = self.data.sample_batches(self.auto.batches)
        if len(batches) < 2:
            decide("auto.criteria", "without gradients", "no conversations to take a loss of: give --data FILE")
        said = self._piloted(reading, probe_set, *pilot, batches) if pilot else ()
        gradients = self._gradients(batches)
        return select_layers(reading, probe_set, gradients, self.auto, self.device, pilot=said)

    def _gradients(self, batches: list[Batch]) -> GradientScores | None:
        if len(batches) < 2 or not set(GRADIENT) & set(self.auto.criteria):
            return None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return gradient_scores(self.model, self.anatomy, batches, self.device)

    def _piloted(
        self, reading: Reading, probe_set: ProbeSet, tuned: "Subject", after: Reading, batches: list[Batch]
    ) -> list[Criterion]:
        """Criteria 3 and 5: what the tuned model changed, and what its blocks are worth one window at a time."""
        resamples, seed = self.auto.resamples, self.auto.seed
        said = [drift_criterion(reading, after, probe_set, resamples, seed, self.device)]
        if len(batches) >= 2:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                gains = transplant_gains(self.model, tuned.model, self.anatomy, batches, self.device)
            said.append(transplant_criterion(gains, resamples))
        return said


def _trained(run: Path) -> tuple[int, ...]:
    """The layers that a run has trained, for the folder that was exported from it; none where it is no run."""
    if not (run / "census.json").is_file():
        return ()
    return tuple(read_json(run / "census.json")["layers"]["trained"])


def open_subject(path: str, options: Namespace, auto: AutoRange) -> Subject:
    """Load what a path names.

    Raises:
        UserError: It is none of the three, or cannot be loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained: tuple[int, ...] = ()
    checkpoint = Path(path) if path.endswith(".ckpt") else None
    folder = checkpoint.parent.parent if checkpoint else Path(path)
    model: Any
    if (folder / "config.yaml").is_file():
        run = RunDirectory.open(folder)
        module, data = restored(run, checkpoint or run.checkpoints / f"{options.checkpoint}.ckpt")
        model, anatomy, trained = module.model, module.anatomy, module.plan.layers
        data.batch_size = data.eval_batch_size = options.batch_size
    else:
        data = MMDataModule(
            processor=path,
            batch_size=options.batch_size,
            train=options.data,
            num_workers=0,
            probes=options.probes,
            probe_images=options.images,
        )
        if not (options.probes or options.data):
            raise UserError(
                "There is nothing to probe with.",
                "A model folder comes without pictures.",
                "Give --probes FILE: pictures with captions and objects, such as nano/data/probes.json.",
            )
        data.probe_set()  # a mistake in the file shows before the model is loaded
        model = load_model(Backbone(path=path))
        anatomy = Anatomy.of(model)
        trained = _trained(folder.parent)
    data.probes, data.probe_images = options.probes or data.probes, options.images
    model.eval().requires_grad_(False).to(device)
    return Subject(path, type(model).__name__, model, anatomy, data, trained, device, options.bf16, auto)
