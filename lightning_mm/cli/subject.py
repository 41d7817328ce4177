"""What is to be inspected: a model folder, a run, or one of its checkpoints, each as a model that can be read.

Data flow: a path on the command line -> ``Subject`` -> readings and a layer selection.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.probe_sets import ProbeSet
from lightning_mm.decisions import decide
from lightning_mm.errors import UserError
from lightning_mm.models.anatomy import Anatomy
from lightning_mm.taps.reading import Reading, read, shared
from lightning_mm.tuning.criteria import drift_criterion
from lightning_mm.tuning.gradients import GRADIENT, scores_if_possible
from lightning_mm.tuning.selection import AutoRange, Selection, select_layers
from lightning_mm.tuning.transplanting import transplant_criterion, transplant_gains
from lightning_mm.tuning.window import Criterion


@dataclass(eq=False)
class Subject:
    """A model to be read.

    Args:
        name: As given.
        kind: Its class.
        model: In eval mode.
        anatomy: Of the plain model.
        data: Makes its batches of probe rows.
        conversations: Has the conversations that a loss is taken of, if there are any.
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
    conversations: MMDataModule
    trained: tuple[int, ...]
    device: torch.device
    bf16: bool
    auto: AutoRange

    @property
    def width(self) -> int:
        """D, the hidden size of its decoder."""
        model: Any = self.model
        return int(model.config.get_text_config(decoder=True).hidden_size)

    def read(self, probe_set: ProbeSet, step: int = 0) -> Reading:
        """Every layer, on every row; rows that fall out are in the ledger of ``data`` too."""
        with torch.no_grad(), self._precision():
            reading = read(self.model, self.anatomy, self.data.probe_loader(probe_set), self.device, step=step)
        self.data.ledger.add(replace(each, kind="probe") for each in reading.rejected)
        return reading

    def select(
        self, reading: Reading, probe_set: ProbeSet, pilot: "tuple[Subject, Reading] | None" = None
    ) -> Selection:
        """The layers worth training, also by what a second, tuned model says.

        Raises:
            UserError: No row was read, or none of the criteria can be computed.
        """
        batches = self._batches() if pilot or set(GRADIENT) & set(self.auto.criteria) else []
        said = self._piloted(reading, probe_set, *pilot, batches) if pilot else ()
        with self._precision():
            gradients = scores_if_possible(self.model, self.anatomy, batches, self.device, self.auto.criteria)
        return select_layers(reading, probe_set, gradients, self.auto, self.device, pilot=said)

    def _batches(self) -> list[Batch]:
        try:
            return self.conversations.sample_batches(self.auto.batches)
        except UserError as error:
            decide("auto.batches", "none", f"{error.what} {error.why}")
            return []

    def _piloted(
        self, reading: Reading, probe_set: ProbeSet, tuned: "Subject", after: Reading, batches: list[Batch]
    ) -> list[Criterion]:
        """Criteria 3 and 5: what the tuned model changed, and what its blocks are worth one window at a time."""
        before, after, _ = shared(reading, after)
        drifted = drift_criterion(before, after, probe_set, self.auto.resamples, self.auto.seed, self.device)
        gains = self._transplanted(tuned, batches)
        worth = None if gains is None else transplant_criterion(gains, self.auto.resamples)
        return [criterion for criterion in (drifted, worth) if criterion is not None]

    def _transplanted(self, tuned: "Subject", batches: Sequence[Batch]) -> Tensor | None:
        """(K, L) gains; None, and said why, where they cannot be had."""
        types = [each.model.get_submodule(each.anatomy.embedding).weight.dtype for each in (self, tuned)]
        if len(batches) < 2:
            why = f"{len(batches)} batches to take a loss of, and 2 are needed: give --data FILE"
        elif types[0] != types[1]:
            why = f"the weights are {types[0]} here and {types[1]} there"
        else:
            with self._precision():
                return transplant_gains(self.model, tuned.model, self.anatomy, batches, self.device)
        decide("auto.criteria", "without transplant", why)
        return None

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def check_alike(subjects: Sequence[Subject]) -> None:
    """Refuse to compare models of different shape, block by block.

    Raises:
        UserError: Naming both sides.
    """
    shapes = {each.name: (each.kind, each.anatomy.num_layers, each.width) for each in subjects}
    if len(set(shapes.values())) > 1:
        told = [f"{name} is {kind} with {n} blocks of width {d}" for name, (kind, n, d) in shapes.items()]
        raise UserError(
            f"{' and '.join(shapes)} cannot be compared.",
            f"{'; '.join(told)}.",
            "Compare a model with one that was made from it.",
        )
