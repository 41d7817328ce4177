"""What a caller names as a model: a path, a hub name, a run, a checkpoint, or a model in memory; checked, not loaded.

Data flow: ``ModelLike`` -> ``ModelSource`` -> ``open_handle``: the model in eval mode, as ``MultimodalModel``. A model
that was handed in is borrowed: it is given back as it was.
"""

import copy
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json
from lightning_mm.core.random_state import restore_rng, rng_state
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.handle import MultimodalModel, unwrap_model
from lightning_mm.models.loading import Backbone, load_model, read_config
from lightning_mm.models.processor import ModelProcessor, load_processor, wrap_processor
from lightning_mm.training.checkpoint_file import read_checkpoint
from lightning_mm.training.module import MMModule
from lightning_mm.verbs.trained_run import load_run

ModelLike = str | os.PathLike[str] | Backbone | nn.Module | MultimodalModel
"""A model folder, hub name, run or checkpoint by its path; a ``Backbone``; or in memory, an ``MMModule`` or a model of
transformers, within wrappers of PEFT, DDP or torch.compile or without."""
ProcessorLike = Any
"""A processor of transformers, or the folder or hub name that one is loaded from."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, eq=False)
class ModelSource:
    """What a caller named.

    Args:
        path: The path or hub name as given; of a model in memory, what it was loaded from, or the name of its class.
        backbone: What is loaded where it is neither a run's nor in memory.
        run: The run that it is or belongs to; None: none is known.
        checkpoint: Checkpoint file of the run; None: its weights are not loaded from one.
        loaded: The model itself, where it is in memory.
        trained: Indices of the decoder blocks that were trained, as far as known of a model in memory.
        data: The data module that it was trained with, as far as known of a model in memory.
    """

    path: str
    backbone: Backbone | None = None
    run: RunDirectory | None = None
    checkpoint: Path | None = None
    loaded: MultimodalModel | None = None
    trained: tuple[int, ...] = ()
    data: MMDataModule | None = None

    @classmethod
    def of(cls, model: ModelLike, checkpoint: str = "last", processor: ProcessorLike | None = None) -> "ModelSource":
        """Find out what a caller names, without loading it.

        Args:
            model: See ``ModelLike``.
            checkpoint: Name of a checkpoint, for paths of runs.
            processor: For a model in memory; None: the one beside the weights that it was loaded from.

        Raises:
            UserError: It is no model, no run and no checkpoint of a run.
        """
        if isinstance(model, MMModule):
            return cls._of_module(model)
        if isinstance(model, MultimodalModel):
            return cls(_name(model.model), loaded=_with_processor(model, processor))
        if isinstance(model, Backbone):
            read_config(model)
            return cls(model.path, backbone=model)
        if isinstance(model, nn.Module):
            inner = unwrap_model(model)
            return cls(_name(inner), loaded=_with_processor(MultimodalModel.of(inner), processor))
        if not isinstance(model, (str, os.PathLike)):
            raise UserError(
                f"{model!r:.60} is no model.",
                "A model is a path, a hub name, a Backbone, or a loaded model.",
                "Give one of those.",
            )
        return cls._of_path(os.fspath(model), checkpoint, may_be_hub=isinstance(model, str))

    @property
    def label(self) -> str:
        """Short name, for a folder or a title."""
        return model_label(self.path)

    @classmethod
    def _of_module(cls, module: MMModule) -> "ModelSource":
        trainer = module._trainer
        data = None if trainer is None else getattr(trainer, "datamodule", None)
        known = data if isinstance(data, MMDataModule) else None
        if not hasattr(module, "mm"):
            return cls(module.backbone.path, backbone=module.backbone, data=known)
        return cls(module.backbone.path, loaded=module.mm, trained=module.plan.layers, data=known)

    @classmethod
    def _of_path(cls, path: str, checkpoint: str, may_be_hub: bool) -> "ModelSource":
        if path.endswith(".ckpt"):
            return cls._of_checkpoint(path, Path(path))
        if (Path(path) / "config.yaml").is_file():
            return cls._of_checkpoint(path, Path(path) / "checkpoints" / f"{checkpoint}.ckpt")
        what = f"{path} is no model folder or hub name, no run, and no checkpoint."
        folder = Path(path).parent
        hub = may_be_hub and _HUB_NAME.fullmatch(path) is not None
        local = not hub or (folder != Path() and folder.is_dir())
        if local and not Path(path).exists():
            near = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
            raise UserError(
                what, "There is no such folder or file.", f"Beside it: {', '.join(near[:10]) or 'nothing'}."
            )
        try:
            read_config(Backbone(path=path))
        except UserError as error:
            raise UserError(what, error.why, error.fix) from error
        return cls(path, backbone=Backbone(path=path))

    @classmethod
    def _of_checkpoint(cls, path: str, checkpoint: Path) -> "ModelSource":
        read_checkpoint(checkpoint)
        folder = checkpoint.absolute().parent.parent
        if not (folder / "config.yaml").is_file():
            raise UserError(
                f"{path} belongs to no run.",
                f"There is no {folder / 'config.yaml'}, which says what model it is a part of.",
                "Name a checkpoint where the run has written it: RUN/checkpoints/NAME.ckpt.",
            )
        return cls(path, run=RunDirectory(folder), checkpoint=checkpoint)


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model that is ready to be read.

    Args:
        mm: The model, in eval mode, and without gradients.
        backbone: What it, or the model it was made from, was loaded from; None: it came in memory.
        trained: Indices of the trained decoder blocks; empty if not known.
        data: The data module of its run; None: none is known.
    """

    mm: MultimodalModel
    backbone: Backbone | None
    trained: tuple[int, ...] = ()
    data: MMDataModule | None = None


def open_handle(source: ModelSource, stack: ExitStack, quantized: bool = True) -> OpenModel:
    """Load the model that a source names; it is on the GPU where there is one, or where its owner has it.

    Args:
        source: What the caller named.
        stack: Gives back, when it is closed, what was borrowed.
        quantized: Whether the frozen weights of a run that were quantized in training stay so.
    """
    if source.loaded is not None:
        stack.enter_context(borrowed(source.loaded.model))
        return OpenModel(source.loaded, None, source.trained, source.data)
    trained: tuple[int, ...] = ()
    data = source.data
    if source.run is not None and source.checkpoint is not None:
        module, data = load_run(source.run, source.checkpoint, quantized)
        mm, trained, backbone = module.mm, module.plan.layers, module.backbone
    else:
        assert source.backbone is not None
        backbone = source.backbone
        mm = MultimodalModel.of(load_model(backbone), source=backbone.path)
        trained = _trained_layers(Path(backbone.path).absolute().parent)
    mm.model.eval().requires_grad_(False).to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return OpenModel(mm, backbone, trained, data)


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """While active, the model is in eval mode without gradients; modes, gradients and random state are given back."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    generators = rng_state()
    model.eval().requires_grad_(False)
    for parameter, *_ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wanted, gradient in gradients:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        restore_rng(generators)


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


def _name(model: nn.Module) -> str:
    """What a model in memory was loaded from, or the name of its class."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def _with_processor(mm: MultimodalModel, given: ProcessorLike | None) -> MultimodalModel:
    """The handle with a processor, which is a copy: what makes batches may give it a padding token."""
    if given is None and mm.processor is not None:
        return mm
    if isinstance(given, ModelProcessor):
        return replace(mm, processor=given)
    if given is None or isinstance(given, (str, os.PathLike)):
        return replace(mm, processor=_load_beside(mm, given))
    return replace(mm, processor=wrap_processor(copy.deepcopy(given), mm.transformers.config))


def _load_beside(mm: MultimodalModel, given: str | os.PathLike[str] | None) -> ModelProcessor:
    path = str(getattr(mm.model, "name_or_path", "")) if given is None else os.fspath(given)
    kind = type(mm.model).__name__
    if not path:
        raise UserError(
            f"The processor of this {kind} is not known.", "The model says no path.", "Give processor=PROCESSOR."
        )
    try:
        return load_processor(path)
    except UserError as error:
        raise UserError(error.what, error.why, "Give processor=PROCESSOR, as AutoProcessor loads it.") from error


def _trained_layers(run: Path) -> tuple[int, ...]:
    """The layers that a run trained, for a folder exported from it; empty if ``run`` is no run."""
    if not (run / "census.json").is_file():
        return ()
    return tuple(read_json(run / "census.json")["layers"]["trained"])
