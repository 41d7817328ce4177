"""From a path on the command line to a model that can be read: a model folder, a run or one of its checkpoints.

Data flow: path and options -> ``ModelSource`` (checked, nothing loaded) -> ``InspectedModel`` (hidden states, layer
selection), and one probe set for all models.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from lightning_mm.analysis.hidden_states import (
    HiddenStates,
    common_samples,
    extract_hidden_states,
)
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.probe_sets.build import open_probe_set
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.layer_selection.forward_criteria import drift_criterion
from lightning_mm.layer_selection.gradient_criteria import GRADIENT_CRITERIA, try_gradient_scores
from lightning_mm.layer_selection.layer_range_search import Criterion
from lightning_mm.layer_selection.select import AutoRange, Selection, select_layers
from lightning_mm.layer_selection.transplant_criterion import transplant_criterion, transplant_gains
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone, load_model, read_config
from lightning_mm.training import checkpoint as state
from lightning_mm.verbs.trained_run import load_run


@dataclass(eq=False)
class InspectedModel:
    """A model whose layers are read, and the data to read them with.

    Args:
        name: The model's path as given on the command line.
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
        """Hidden states of every layer on every row; rejected rows also go to the ledger of ``data``."""
        with torch.no_grad(), self._precision():
            reading = extract_hidden_states(self.mm, self.data.probe_loader(probe_set), self.device, step=step)
        self.data.rejected_samples.add(replace(each, kind="probe") for each in reading.rejected)
        return reading

    def select(
        self, reading: HiddenStates, probe_set: ProbeSet, pilot: "tuple[InspectedModel, HiddenStates] | None" = None
    ) -> Selection:
        """Select the layers worth training.

        Args:
            reading: Hidden states of this model.
            probe_set: The rows they were read on.
            pilot: A second, tuned model and its hidden states, for the criteria drift and transplant; None: no pilot.

        Raises:
            UserError: No row was read, or none of the criteria can be computed.
        """
        batches = self._batches() if pilot or set(GRADIENT_CRITERIA) & set(self.auto.criteria) else []
        pilot_criteria = self._pilot_criteria(reading, probe_set, *pilot, batches) if pilot else ()
        with self._precision():
            gradients = try_gradient_scores(self.mm, batches, self.device, self.auto.criteria)
        return select_layers(reading, probe_set, gradients, self.auto, self.device, pilot=pilot_criteria)

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
    shapes = {each.name: (each.kind, each.mm.layout.num_layers, each.width) for each in models}
    if len(set(shapes.values())) > 1:
        descriptions = [f"{name} is {kind} with {n} blocks of width {d}" for name, (kind, n, d) in shapes.items()]
        raise UserError(
            f"{' and '.join(shapes)} cannot be compared.",
            f"{'; '.join(descriptions)}.",
            "Compare a model with one that was made from it.",
        )


_IMAGES = 256
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """What a path on the command line names, checked but not loaded.

    Args:
        path: The path or hub name as given.
        run: The run that it is or belongs to; None: a model folder or hub name.
        checkpoint: Checkpoint file of the run; None: a model folder or hub name.
    """

    path: str
    run: RunDirectory | None = None
    checkpoint: Path | None = None

    @classmethod
    def of(cls, path: str, checkpoint: str) -> "ModelSource":
        """Find out what a path names, without loading it.

        Args:
            path: Path or hub name.
            checkpoint: Name of a checkpoint, for paths of runs.

        Raises:
            UserError: It is no model, no run and no checkpoint of a run.
        """
        if path.endswith(".ckpt"):
            return cls._of_checkpoint(path, Path(path))
        if (Path(path) / "config.yaml").is_file():
            return cls._of_checkpoint(path, Path(path) / "checkpoints" / f"{checkpoint}.ckpt")
        what = f"{path} is no model folder or hub name, no run, and no checkpoint."
        folder = Path(path).parent
        local = not _HUB_NAME.fullmatch(path) or (folder != Path() and folder.is_dir())
        if local and not Path(path).exists():
            near = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
            raise UserError(
                what, "There is no such folder or file.", f"Beside it: {', '.join(near[:10]) or 'nothing'}."
            )
        try:
            read_config(Backbone(path=path))
        except UserError as error:
            raise UserError(what, error.why, error.fix) from error
        return cls(path)

    @classmethod
    def _of_checkpoint(cls, path: str, checkpoint: Path) -> "ModelSource":
        state.read_checkpoint(checkpoint)
        folder = checkpoint.absolute().parent.parent
        if not (folder / "config.yaml").is_file():
            raise UserError(
                f"{path} belongs to no run.",
                f"There is no {folder / 'config.yaml'}, which says what model it is a part of.",
                "Name a checkpoint where the run has written it: RUN/checkpoints/NAME.ckpt.",
            )
        return cls(path, RunDirectory(folder), checkpoint)


def model_label(path: str) -> str:
    """Short name of a model: that of its folder, or of its run if that says more.

    Example:
        >>> [model_label(path) for path in ("runs/middle/export", "runs/middle/checkpoints/last.ckpt", "org/model")]
        ['middle', 'middle-last', 'model']
    """
    named = Path(path)
    parts = (named.resolve() if named.name in ("", "..") else named).parts
    if parts[-1] == "export" and len(parts) > 1:
        return parts[-2]
    if parts[-1].endswith(".ckpt") and len(parts) > 2:
        return f"{parts[-3]}-{parts[-1].removesuffix('.ckpt')}"
    return parts[-1]


def open_models(paths: Sequence[str], options: Namespace, auto: AutoRange) -> tuple[list[InspectedModel], ProbeSet]:
    """Open all models to inspect, and the probe set for all of them.

    Raises:
        UserError: A path names nothing, there is nothing to probe with, or two models cannot be compared.
    """
    if options.images is not None and options.images < 2:
        raise UserError(f"images is {options.images}.", "Pictures are compared.", "Give --images 2 or more.")
    sources = [ModelSource.of(path, options.checkpoint) for path in paths]
    early = None
    if not any(source.run for source in sources):  # mistakes in the file show before a model is loaded
        early = _probe_set(_data_from_options(paths[0], None, options), options)
    models = [open_model(source, options, auto) for source in sources]
    check_same_architecture(models)
    if early is not None:
        return models, early
    own = next(model for model, source in zip(models, sources, strict=True) if source.run)
    return models, _probe_set(own.data, options)


def _probe_set(data: MMDataModule, options: Namespace) -> ProbeSet:
    """The probe set of --probes FILE, else the run's own."""
    most = options.images or data.probe_images
    if options.probes:
        return open_probe_set(
            options.probes,
            options.image_root,
            data.rejected_samples,
            max_pictures=most,
            prompt=data.probe_prompt,
            max_megapixels=data.max_megapixels,
        )
    if not (data.probes or data.paths["val"] or data.paths["test"]):
        raise UserError(
            "There is nothing to probe with.",
            "A model folder comes without pictures, and no run here has data.probes, data.val or data.test.",
            "Give --probes FILE: pictures with captions and objects, such as nano/data/probes.json.",
        )
    data.probe_images = most
    return data.probe_set()


def open_model(source: ModelSource, options: Namespace, auto: AutoRange) -> InspectedModel:
    """Load the model that a path names, in eval mode, with its data."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained: tuple[int, ...] = ()
    if source.run is not None and source.checkpoint is not None:
        module, data = load_run(source.run, source.checkpoint)
        mm, trained = module.mm, module.plan.layers
        data.batch_size = data.eval_batch_size = options.batch_size
        data.max_length = options.max_length or data.max_length
        backbone = module.backbone
        conversations = _data_from_options(backbone.path, backbone.revision, options) if options.data else data
    else:
        data = conversations = _data_from_options(source.path, None, options)
        mm = MultimodalModel.of(load_model(Backbone(path=source.path)), source=source.path)
        trained = _trained_layers(Path(source.path).absolute().parent)
    mm.model.eval().requires_grad_(False).to(device)
    kind = type(mm.model).__name__
    return InspectedModel(source.path, kind, mm, data, conversations, trained, options.bf16, auto)


def _data_from_options(processor: str, revision: str | None, options: Namespace) -> MMDataModule:
    """A data module from command line options only."""
    length = {} if options.max_length is None else {"max_length": options.max_length}
    return MMDataModule(
        processor=processor,
        revision=revision,
        train=options.data,
        image_root=options.image_root,
        batch_size=options.batch_size,
        num_workers=0,
        probe_images=options.images or _IMAGES,
        **length,
    )


def _trained_layers(run: Path) -> tuple[int, ...]:
    """The layers that a run trained, for a folder exported from it; empty if ``run`` is no run."""
    if not (run / "census.json").is_file():
        return ()
    return tuple(read_json(run / "census.json")["layers"]["trained"])
