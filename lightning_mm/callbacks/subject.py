"""What the callbacks look at, and the loop that trains it: our module and data module, or anyone's.

Data flow: LightningModule and trainer, or the model of transformers' Trainer + what the callbacks were given ->
``Subject`` (model handle, probe set, precision) and ``Loop`` (steps, loggers) -> ``runner``, ``reader``, the analyses.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from torch import nn

from lightning_mm.analysis.findings import Findings
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.probe_sets.collator import ProbeCollator, probe_loader
from lightning_mm.data.probe_sets.given import Probes, open_probes
from lightning_mm.data.probe_sets.probe_set import ProbeBatch, ProbeSet
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.execution.activation_checkpointing import unchanged_slices
from lightning_mm.execution.cache.frozen_prefix import FrozenPrefix
from lightning_mm.execution.step import TrainingStep
from lightning_mm.models.guest import model_at, open_model, the_only_model
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.side_effects import without_side_effects
from lightning_mm.training.eval_context import live
from lightning_mm.training.module import MMModule
from lightning_mm.tuning.found_plan import plan_as_found
from lightning_mm.tuning.policy import TuningPlan

Log = Callable[[dict[str, float], Findings], None]
Precision = Callable[[], AbstractContextManager[Any]]


class Loop(Protocol):
    """The loop that trains: how far it is, and where its metrics go."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        ...

    @property
    def total(self) -> int | None:
        """Optimizer steps of the whole run; None where that is not known."""
        ...

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process analyzes and writes."""
        ...

    def loggers(self) -> dict[str, Log]:
        """Name -> what takes the metrics of one inspection and its rows; called on rank 0 only."""
        ...


@dataclass(frozen=True)
class Given:
    """What the callbacks of a run were told about the model, together.

    Args:
        model: Path of the model in the module that is trained; None: the one that is there.
        processor: The model's processor; None: that of the module or the loop.
        probes: Probe set, file, rows or ``Probes``; None: those of the data module.
    """

    model: str | None = None
    processor: Any = None
    probes: Any = None

    @property
    def how(self) -> Probes | None:
        """How the rows are read, if that was told."""
        return self.probes if isinstance(self.probes, Probes) else None

    @classmethod
    def together(cls, parts: Iterable["Given"]) -> "Given":
        """What some callbacks were told, each thing once.

        Raises:
            UserError: They were told different things.
        """
        told: dict[str, Any] = {}
        for part in parts:
            for name, value in vars(part).items():
                if value is not None and told.setdefault(name, value) is not value and told[name] != value:
                    raise UserError(
                        f"The callbacks were given different {name}.",
                        "All of them look at one model with one forward pass.",
                        f"Give {name}= to one of them.",
                    )
        return cls(**told)


@dataclass(eq=False)
class Subject:
    """A model in training, as the callbacks see it.

    Args:
        root: The module that holds the model: its modes and random generators are kept.
        mm: The model's handle, with its processor.
        probe_set: The rows to read.
        precision: Context of the forward passes.
        rejected: Takes probe rows that cannot be read.
        data: Our data module, where the run has one.
        probes: How to read the rows; None: as the data module does, where there is none as ``Probes`` by default.
        step: Our training step, where the module is ours: its frozen prefix, and a plan that no one else changes.
        own_plan: The plan of our module; None: what trains is found anew at each look.
    """

    root: nn.Module
    mm: MultimodalModel
    probe_set: ProbeSet
    precision: Precision = nullcontext
    rejected: RejectedSamples = field(default_factory=lambda: RejectedSamples(1.0))
    data: MMDataModule | None = None
    probes: Probes | None = None
    step: TrainingStep | None = None
    own_plan: TuningPlan | None = None

    @property
    def device(self) -> torch.device:
        """Device of the analyses: that of the model's inputs."""
        return self.mm.device

    @property
    def plan(self) -> TuningPlan:
        """What trains now."""
        return self.own_plan or plan_as_found(self.mm)

    @property
    def unchanged(self) -> int:
        """Slices of hidden states that training cannot change; 0 for others' modules, which may unfreeze anything."""
        return unchanged_slices(self.own_plan) if self.own_plan else 0

    @property
    def prefix(self) -> FrozenPrefix | None:
        """The frozen prefix whose outputs our module caches, if it does."""
        return self.step.prefix if self.step is not None else None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context of forward passes that leave no trace."""
        # The model may be in a plain dictionary of the module, and so none of its parts.
        with without_side_effects(self.root), without_side_effects(self.mm.model), self.precision():
            yield

    def batches(self, probe_set: ProbeSet) -> Iterable[ProbeBatch]:
        """This rank's share of a probe set."""
        if self.data is not None and self.probes is None:
            return self.data.probe_loader(probe_set)
        how = self.probes or Probes(probe_set)
        limits = {} if self.data is None else {"max_megapixels": self.data.max_megapixels}
        longest = self.data.max_length if how.max_length is None and self.data is not None else how.max_length
        collator = ProbeCollator(self.mm.required_processor, longest, **limits)
        return probe_loader(probe_set.rows, collator, batch_size=how.batch_size, num_workers=0)


def our_data(trainer: L.Trainer) -> MMDataModule | None:
    """The trainer's data module if it is ours, else None."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, MMDataModule) else None


def draw_probes(given: Given, data: MMDataModule | None, rejected: RejectedSamples) -> ProbeSet:
    """The rows to read: those that a callback was given, or else the data module's.

    Raises:
        UserError: There are none, or they cannot be read.
    """
    if (how := given.how) is not None:
        rows = how.rows.subset(how.max_pictures) if isinstance(how.rows, ProbeSet) else how.rows
        return open_probes(rows, rejected, image_root=how.image_root, max_pictures=how.max_pictures)
    if given.probes is not None:
        return open_probes(given.probes, rejected)
    if data is not None:
        return data.probe_set()
    raise UserError(
        "There is nothing to look inside the model with.",
        "No callback was given probes, and the data module is not an MMDataModule.",
        'Give one of them a file of pictures with captions and objects: probes="probes.json".',
    )


def subject_of_trainer(
    trainer: L.Trainer, module: L.LightningModule, given: Given, probe_set: ProbeSet, rejected: RejectedSamples
) -> Subject:
    """The subject of a Lightning fit, at its start.

    Args:
        trainer: The trainer.
        module: Our module, or any that holds a multimodal LLM of transformers.
        given: What the callbacks were told.
        probe_set: The rows to read.
        rejected: Takes probe rows that cannot be read, where there is no data module of ours.

    Raises:
        UserError: The model or its processor is not found, or cannot be read.
    """
    data = our_data(trainer)
    if isinstance(module, MMModule):
        if given.model is not None:
            raise UserError("model= was given for an MMModule.", "It knows its model.", "Leave model= out.")
        own, precision = live(module), trainer.precision_plugin.forward_context
        kept = data.rejected_samples if data is not None else rejected
        return Subject(module, own.mm, probe_set, precision, kept, data, given.how, own.step, own.plan)
    plugin = trainer.precision_plugin
    # These two only set torch's default dtype: the weights have theirs already.
    true = isinstance(plugin, (HalfPrecision, DoublePrecision))
    return guest_subject(module, given, probe_set, rejected, nullcontext if true else plugin.forward_context)


def guest_subject(
    root: nn.Module,
    given: Given,
    probe_set: ProbeSet,
    rejected: RejectedSamples,
    precision: Precision,
) -> Subject:
    """A model in a module that is not ours; arguments and errors as ``subject_of_trainer``."""
    if given.model is not None:
        model = model_at(root, given.model)
    else:
        path, model = the_only_model(root)
        if path:
            log_decision("callbacks.model", path, f"the one multimodal model of {type(root).__name__}")
    processor = given.processor if given.processor is not None else getattr(root, "processor", None)
    if processor is None:
        raise UserError(
            "The callbacks have no processor.",
            f"{type(root).__name__} has none as 'processor', and no callback was given one.",
            "Give one of them processor=AutoProcessor.from_pretrained(...).",
        )
    return Subject(root, open_model(model, processor), probe_set, precision, rejected, probes=given.how)
