"""From the command line of ``inspect`` to what is inspected: each path checked, then opened, and one probe set for all.

Data flow: paths and options -> ``Source`` (checked, nothing loaded) -> probe set -> ``InspectedModel``.

What is to be inspected: a model folder, a run, or one of its checkpoints, each as a model that can be read.

Data flow: a path on the command line -> ``InspectedModel`` -> readings and a layer selection.
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

from lightning_mm.analysis.hidden_states import Reading, read, shared
from lightning_mm.cli.export import restored
from lightning_mm.core.decisions import decide
from lightning_mm.core.errors import UserError
from lightning_mm.core.run_directory import RunDirectory, read_json
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.probe_sets.build import open_probe_set
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.layer_selection.forward_criteria import drift_criterion
from lightning_mm.layer_selection.gradient_criteria import GRADIENT, scores_if_possible
from lightning_mm.layer_selection.layer_range_search import Criterion
from lightning_mm.layer_selection.select import AutoRange, Selection, select_layers
from lightning_mm.layer_selection.transplant_criterion import transplant_criterion, transplant_gains
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone, load_model, read_config
from lightning_mm.training import checkpoint as state


@dataclass(eq=False)
class InspectedModel:
    """A model whose layers are read, and the data to read them with.

    Args:
        name: As given.
        kind: Its class.
        mm: The model in eval mode.
        data: Makes its batches of probe rows.
        conversations: Has the conversations that a loss is taken of, if there are any.
        trained: Blocks that were trained; empty where that is not known.
        bf16: Whether its forward pass computes in bfloat16.
        auto: How layers are chosen.
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
        """Where the model is."""
        return self.mm.device

    @property
    def width(self) -> int:
        """D, the hidden size of its decoder."""
        return int(self.mm.transformers.config.get_text_config(decoder=True).hidden_size)

    def read(self, probe_set: ProbeSet, step: int = 0) -> Reading:
        """Every layer, on every row; rows that fall out are in the ledger of ``data`` too."""
        with torch.no_grad(), self._precision():
            reading = read(self.mm, self.data.probe_loader(probe_set), self.device, step=step)
        self.data.rejected_samples.add(replace(each, kind="probe") for each in reading.rejected)
        return reading

    def select(
        self, reading: Reading, probe_set: ProbeSet, pilot: "tuple[InspectedModel, Reading] | None" = None
    ) -> Selection:
        """The layers worth training, also by what a second, tuned model says.

        Raises:
            UserError: No row was read, or none of the criteria can be computed.
        """
        batches = self._batches() if pilot or set(GRADIENT) & set(self.auto.criteria) else []
        said = self._piloted(reading, probe_set, *pilot, batches) if pilot else ()
        with self._precision():
            gradients = scores_if_possible(self.mm, batches, self.device, self.auto.criteria)
        return select_layers(reading, probe_set, gradients, self.auto, self.device, pilot=said)

    def _batches(self) -> list[Batch]:
        try:
            return self.conversations.sample_batches(self.auto.batches)
        except UserError as error:
            decide("auto.batches", "none", f"{error.what} {error.why}")
            return []

    def _piloted(
        self, reading: Reading, probe_set: ProbeSet, tuned: "InspectedModel", after: Reading, batches: list[Batch]
    ) -> list[Criterion]:
        """Criteria 3 and 5: what the tuned model changed, and what its blocks are worth one window at a time."""
        before, after, _ = shared(reading, after)
        drifted = drift_criterion(before, after, probe_set, self.auto.resamples, self.auto.seed, self.device)
        gains = self._transplanted(tuned, batches)
        worth = None if gains is None else transplant_criterion(gains, self.auto.resamples)
        return [criterion for criterion in (drifted, worth) if criterion is not None]

    def _transplanted(self, tuned: "InspectedModel", batches: Sequence[Batch]) -> Tensor | None:
        """(K, L) gains; None, and said why, where they cannot be had."""
        types = [each.mm.embedding.weight.dtype for each in (self, tuned)]
        if len(batches) < 2:
            why = f"{len(batches)} batches to take a loss of, and 2 are needed: give --data FILE"
        elif types[0] != types[1]:
            why = f"the weights are {types[0]} here and {types[1]} there"
        else:
            with self._precision():
                return transplant_gains(self.mm, tuned.mm.model, batches, self.device)
        decide("auto.criteria", "without transplant", why)
        return None

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def check_alike(subjects: Sequence[InspectedModel]) -> None:
    """Refuse to compare models of different shape, block by block.

    Raises:
        UserError: Naming both sides.
    """
    shapes = {each.name: (each.kind, each.mm.layout.num_layers, each.width) for each in subjects}
    if len(set(shapes.values())) > 1:
        told = [f"{name} is {kind} with {n} blocks of width {d}" for name, (kind, n, d) in shapes.items()]
        raise UserError(
            f"{' and '.join(shapes)} cannot be compared.",
            f"{'; '.join(told)}.",
            "Compare a model with one that was made from it.",
        )


_IMAGES = 256
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """What a path names.

    Args:
        path: As given.
        run: The run that it is or belongs to; None for a model folder or hub name.
        checkpoint: Of the run.
    """

    path: str
    run: RunDirectory | None = None
    checkpoint: Path | None = None

    @classmethod
    def of(cls, path: str, checkpoint: str) -> "Source":
        """See what a path names, without loading it.

        Args:
            path: On the command line.
            checkpoint: Name in the run's checkpoints, where the path is a run.

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
    def _of_checkpoint(cls, path: str, checkpoint: Path) -> "Source":
        state.read_checkpoint(checkpoint)
        folder = checkpoint.absolute().parent.parent
        if not (folder / "config.yaml").is_file():
            raise UserError(
                f"{path} belongs to no run.",
                f"There is no {folder / 'config.yaml'}, which says what model it is a part of.",
                "Name a checkpoint where the run has written it: RUN/checkpoints/NAME.ckpt.",
            )
        return cls(path, RunDirectory(folder), checkpoint)


def open_subjects(paths: Sequence[str], options: Namespace, auto: AutoRange) -> tuple[list[InspectedModel], ProbeSet]:
    """Open all that is to be inspected, and draw the probe set that all of it is asked.

    Raises:
        UserError: A path names nothing, there is nothing to probe with, or two models cannot be compared.
    """
    if options.images is not None and options.images < 2:
        raise UserError(f"images is {options.images}.", "Pictures are compared.", "Give --images 2 or more.")
    sources = [Source.of(path, options.checkpoint) for path in paths]
    early = None
    if not any(source.run for source in sources):  # a mistake in the file shows before a model is loaded
        early = _probe_set(_fresh(paths[0], None, options), options)
    subjects = [opened(source, options, auto) for source in sources]
    check_alike(subjects)
    if early is not None:
        return subjects, early
    own = next(subject for subject, source in zip(subjects, sources, strict=True) if source.run)
    return subjects, _probe_set(own.data, options)


def _probe_set(data: MMDataModule, options: Namespace) -> ProbeSet:
    """--probes FILE; else what the run itself is looked into with."""
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


def opened(source: Source, options: Namespace, auto: AutoRange) -> InspectedModel:
    """Load what a path names, ready to be read."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained: tuple[int, ...] = ()
    if source.run is not None and source.checkpoint is not None:
        module, data = restored(source.run, source.checkpoint)
        mm, trained = module.mm, module.plan.layers
        data.batch_size = data.eval_batch_size = options.batch_size
        data.max_length = options.max_length or data.max_length
        backbone = module.backbone
        conversations = _fresh(backbone.path, backbone.revision, options) if options.data else data
    else:
        data = conversations = _fresh(source.path, None, options)
        mm = MultimodalModel.of(load_model(Backbone(path=source.path)), source=source.path)
        trained = _trained(Path(source.path).absolute().parent)
    mm.model.eval().requires_grad_(False).to(device)
    kind = type(mm.model).__name__
    return InspectedModel(source.path, kind, mm, data, conversations, trained, options.bf16, auto)


def _fresh(processor: str, revision: str | None, options: Namespace) -> MMDataModule:
    """What the command line alone says of data."""
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


def _trained(run: Path) -> tuple[int, ...]:
    """The layers that a run has trained, for the folder that was exported from it; none where it is no run."""
    if not (run / "census.json").is_file():
        return ()
    return tuple(read_json(run / "census.json")["layers"]["trained"])
