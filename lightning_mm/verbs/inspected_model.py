"""A model whose layers are read, and the data that they are read with.

Data flow: ``ModelSource`` + ``ReadingOptions`` -> ``InspectedModel`` (hidden states, layer selection), and one probe
set for all models.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mm.analysis.hidden_states import (
    HiddenStates,
    common_samples,
    extract_hidden_states,
    merge_hidden_states,
)
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.probe_sets.build import open_probe_set
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.layer_selection.forward_criteria import drift_criterion
from lightning_mm.layer_selection.gradient_criteria import GRADIENT_CRITERIA, try_gradient_scores
from lightning_mm.layer_selection.layer_range_search import Criterion
from lightning_mm.layer_selection.select import AutoRange, Selection, select_layers
from lightning_mm.layer_selection.transplant_criterion import transplant_criterion, transplant_gains
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone
from lightning_mm.verbs.model_source import ModelSource, open_handle
from lightning_mm.verbs.rows import PathLike

_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """What models are read with.

    Args:
        probes: File of pictures with captions and objects, or a ``ProbeSet``; None: that of a run.
        data: File of conversations, for losses, or a data module, whose probes count too; None: that of a run.
        image_root: Folder that the pictures of ``probes`` and ``data`` are relative to; None: each file's own folder.
        images: Most pictures; None: a run's own number, else 256.
        max_length: Longest row in tokens; None: a run's own, else 2048.
        batch_size: Rows per forward pass.
        bf16: Whether forward passes run under bfloat16 autocast.
        both_last: Whether a probe set that is drawn holds each picture with its caption in one prompt too, once with
            either of them last.
    """

    probes: PathLike | ProbeSet | None = None
    data: PathLike | MMDataModule | None = None
    image_root: PathLike | None = None
    images: int | None = None
    max_length: int | None = None
    batch_size: int = 16
    bf16: bool = False
    both_last: bool = False

    def __post_init__(self) -> None:
        if self.images is not None and self.images < 2:
            raise UserError(f"images is {self.images}.", "Pictures are compared.", "Give --images 2 or more.")
        kinds = {"probes": (str, Path, ProbeSet), "data": (str, Path, MMDataModule), "image_root": (str, Path)}
        for name, allowed in kinds.items():
            given = getattr(self, name)
            if given is not None and not isinstance(given, allowed):
                named = " or ".join("path" if kind is str else kind.__name__ for kind in allowed if kind is not Path)
                raise UserError(f"{name} cannot be {given!r:.60}.", f"It is a {named}.", "Give the path of a file.")
        for name, value in (("max_length", self.max_length), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}.", "Nothing would be read.", f"Give --{name} 1 or more.")


@dataclass(eq=False)
class InspectedModel:
    """A model whose layers are read, and the data to read them with.

    Args:
        name: The model's path as given.
        kind: Class name of the model.
        mm: The model in eval mode.
        data: Data module that makes batches of probe rows.
        conversations: Data module with the conversations for losses, if there are any.
        trained: Indices of the trained decoder blocks; empty if not known.
        bf16: Whether the forward pass runs under bfloat16 autocast.
        auto: Settings of the layer selection.
    """

    name: str
    kind: str
    mm: MultimodalModel
    data: MMDataModule
    conversations: MMDataModule
    trained: tuple[int, ...]
    bf16: bool
    auto: AutoRange

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.mm.device

    @property
    def width(self) -> int:
        """D, the hidden size of the decoder."""
        return int(self.mm.transformers.config.get_text_config(decoder=True).hidden_size)

    def read(self, probe_set: ProbeSet, step: int = 0) -> HiddenStates:
        """Hidden states of every layer on every row, in the set's order; rejected rows go to the ledger of ``data``."""
        with torch.no_grad(), self._precision():
            reading = extract_hidden_states(self.mm, self.data.probe_loader(probe_set), self.device, step=step)
        self.data.rejected_samples.add(replace(each, kind="probe") for each in reading.rejected)
        # In the order of the set, as in training: control labels and resamples go by it.
        return merge_hidden_states([reading], probe_set)

    def select(
        self,
        reading: HiddenStates,
        probe_set: ProbeSet,
        pilot: "tuple[InspectedModel, HiddenStates] | None" = None,
        spec: str = "auto",
    ) -> Selection:
        """Select the layers worth training.

        Args:
            reading: Hidden states of this model.
            probe_set: The rows they were read on.
            pilot: A second, tuned model and its hidden states, for the criteria drift and transplant; None: no pilot.
            spec: 'auto', or 'auto:8' and 'auto:25%' for an exact number of layers.

        Raises:
            UserError: No row was read, or none of the criteria can be computed.
        """
        batches = self._batches() if pilot or set(GRADIENT_CRITERIA) & set(self.auto.criteria) else []
        pilot_criteria = self._pilot_criteria(reading, probe_set, *pilot, batches) if pilot else ()
        with self._precision():
            gradients = try_gradient_scores(self.mm, batches, self.device, self.auto.criteria)
        return select_layers(reading, probe_set, gradients, self.auto, self.device, spec, pilot_criteria)

    def _batches(self) -> list[Batch]:
        try:
            return self.conversations.sample_batches(self.auto.batches)
        except UserError as error:
            log_decision("auto.batches", "none", f"{error.what} {error.why}")
            return []

    def _pilot_criteria(
        self,
        reading: HiddenStates,
        probe_set: ProbeSet,
        tuned: "InspectedModel",
        after: HiddenStates,
        batches: list[Batch],
    ) -> list[Criterion]:
        """Criteria from the tuned model: drift of its hidden states, and the gain of its blocks window by window."""
        before, after, _ = common_samples(reading, after)
        drifted = drift_criterion(before, after, probe_set, self.auto.resamples, self.auto.seed, self.device)
        gains = self._transplant_gains(tuned, batches)
        gained = None if gains is None else transplant_criterion(gains, self.auto.resamples)
        return [criterion for criterion in (drifted, gained) if criterion is not None]

    def _transplant_gains(self, tuned: "InspectedModel", batches: Sequence[Batch]) -> Tensor | None:
        """(K, L) gains by batch and block; None, with the reason logged, if they cannot be computed."""
        types = [each.mm.embedding.weight.dtype for each in (self, tuned)]
        if len(batches) < 2:
            why = f"{len(batches)} batches to take a loss of, and 2 are needed: give --data FILE"
        elif types[0] != types[1]:
            why = f"the weights are {types[0]} here and {types[1]} there"
        else:
            with self._precision():
                return transplant_gains(self.mm, tuned.mm.model, batches, self.device)
        log_decision("auto.criteria", "without transplant", why)
        return None

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def check_same_architecture(models: Sequence[InspectedModel]) -> None:
    """Raise a ``UserError`` if the models differ in class, number of blocks or hidden size."""
    shapes = [(each.kind, each.mm.layout.num_layers, each.width) for each in models]
    if len(set(shapes)) > 1:
        names = [each.name for each in models]
        told = [f"{name} is {k} with {n} blocks of width {d}" for name, (k, n, d) in zip(names, shapes, strict=True)]
        raise UserError(
            f"{' and '.join(names)} cannot be compared.",
            f"{'; '.join(told)}.",
            "Compare a model with one that was made from it.",
        )


def open_models(
    sources: Sequence[ModelSource], options: ReadingOptions, auto: AutoRange, stack: ExitStack
) -> tuple[list[InspectedModel], ProbeSet]:
    """Open all models to inspect, and the probe set for all of them; ``stack`` gives back what is borrowed.

    Raises:
        UserError: There is nothing to probe with, or two models cannot be compared.
    """
    given = options.data if isinstance(options.data, MMDataModule) else None
    early, probe_set = own_data(given, options), None
    if given is not None or not any(source.run or source.data for source in sources):
        probe_set = read_probe_set(early, options)  # mistakes in the file show before a model is loaded
    models = [open_model(source, options, auto, stack) for source in sources]
    check_same_architecture(models)
    if probe_set is not None:
        models[0].data.rejected_samples.add(early.rejected_samples)
        return models, probe_set
    own = next(model for model, source in zip(models, sources, strict=True) if source.run or source.data)
    return models, read_probe_set(own.data, options)


def read_probe_set(data: MMDataModule, options: ReadingOptions) -> ProbeSet:
    """The probe set that was given, else the one of the data module."""
    if isinstance(options.probes, ProbeSet):
        _check_both_last(options, options.probes)
        return options.probes if options.images is None else options.probes.subset(options.images)
    if not (options.probes or data.probes or data.paths["val"] or data.paths["test"]):
        raise UserError(
            "There is nothing to probe with.",
            "A model folder comes without pictures, and no run here has data.probes, data.val or data.test.",
            "Give --probes FILE, in Python probes=: pictures with captions and objects, as in nano/data/probes.json.",
        )
    max_pictures = options.images or data.probe_images
    if not options.probes:
        drawn = data.draw_probe_set(max_pictures)
        _check_both_last(options, drawn)
        return drawn
    return open_probe_set(
        options.probes,
        options.image_root,
        data.rejected_samples,
        max_pictures=max_pictures,
        prompt=data.probe_prompt,
        max_megapixels=data.max_megapixels,
        both_last=options.both_last,
    )


def _check_both_last(options: ReadingOptions, probe_set: ProbeSet) -> None:
    """Raise a ``UserError`` where a set that is drawn already lacks the rows that ``both_last`` asks for."""
    if options.both_last and not any(row.role == "picture_last" for row in probe_set.rows):
        raise UserError(
            "both_last cannot be had with this probe set.",
            "It is drawn already, without prompts that hold picture and caption.",
            "Give --probes FILE, from which one with them is drawn.",
        )


def open_model(source: ModelSource, options: ReadingOptions, auto: AutoRange, stack: ExitStack) -> InspectedModel:
    """Load the model that a source names, in eval mode, with its data; ``stack`` gives back what is borrowed."""
    opened = open_handle(source, stack)
    mm, backbone = opened.mm, opened.backbone
    given = options.data if isinstance(options.data, MMDataModule) else opened.data
    data = own_data(given, options)
    conversations = data if given is options.data or options.data is None else own_data(None, options)
    for each in (data, conversations):
        _set_processor(each, mm, backbone)
    kind = type(mm.model).__name__
    return InspectedModel(source.path, kind, mm, data, conversations, opened.trained, options.bf16, auto)


def own_data(given: MMDataModule | None, options: ReadingOptions) -> MMDataModule:
    """A data module for reading: from options only, or a copy of a run's or a caller's, which stays as it is."""
    if given is None:
        file = None if isinstance(options.data, MMDataModule) else options.data
        made = MMDataModule(
            train=None if file is None else str(file),
            image_root=None if options.image_root is None else str(options.image_root),
            batch_size=options.batch_size,
            num_workers=0,
            probe_images=options.images or _IMAGES,
        )
        if options.max_length is not None:
            made.max_length = options.max_length
        return made
    data = copy.copy(given)
    data.rejected_samples = RejectedSamples(given.rejected_samples.max_bad_fraction)
    data.rejected_samples.num_rows.update(given.rejected_samples.num_rows)
    data.rejected_samples.is_counted.update(given.rejected_samples.is_counted)
    data.rejected_samples.add(given.rejected_samples)
    data.batch_size = data.eval_batch_size = options.batch_size
    if options.max_length is not None:
        data.max_length = options.max_length
    return data


def _set_processor(data: MMDataModule, mm: MultimodalModel, backbone: Backbone | None) -> None:
    """Batches are made by the processor of the model that reads them."""
    if backbone is not None and (data.processor, data.revision) != (backbone.path, backbone.revision):
        data.processor, data.revision = backbone.path, backbone.revision
        vars(data).pop("_own_processing", None)  # that of another model
    if mm.processor is not None:
        data.processor = mm.processor
