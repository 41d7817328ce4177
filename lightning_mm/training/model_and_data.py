"""Where a module's model, processor and rows come from: a path or what the user has loaded, a data module or loaders.

Data flow: arguments of ``MMModule`` -> the model and the processor, each loaded at first use; trainer -> data module.
"""

from functools import cached_property
from typing import Any

from torch import nn

from lightning_mm.core.errors import UserError
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.loading import Backbone, load_model, read_config
from lightning_mm.models.processor import ModelProcessor, load_processor, wrap_processor
from lightning_mm.training.evaluation_steps import EvaluationSteps


class ModelAndData(EvaluationSteps):
    """What ``MMModule`` works with.

    Attributes:
        backbone: The model to load.
    """

    backbone: Backbone
    _loaded: tuple[nn.Module | Any]
    _given_processor: Any

    @property
    def answering_model(self) -> Any:
        """The transformers model as it is now; it is loaded where no run has done so."""
        if hasattr(self, "model"):
            return self.model
        (loaded,) = self._loaded
        if loaded is None:
            loaded = load_model(self.backbone)
            if self.backbone.quantization == "none":  # else a fit quantizes other modules
                self._loaded = (loaded,)
        return loaded

    @property
    def processing(self) -> ModelProcessor:
        """The model's processor, which the data module takes too, with its bounds on pixels."""
        if (data := self._files) is not None:
            self._unbounded_processing.bound_pixels(data.bounds)
        return self._unbounded_processing

    @cached_property
    def _unbounded_processing(self) -> ModelProcessor:
        (loaded,) = self._loaded
        if self._given_processor is not None:
            config: Any = loaded.config if loaded is not None else read_config(self.backbone)
            return wrap_processor(self._given_processor, config)
        if not self.backbone.path:
            raise UserError(
                "The model comes without a processor.",
                "It was loaded from no folder or hub name that is still there.",
                "Give MMModule(model, ..., processor=processor).",
            )
        return load_processor(self.backbone.path, self.backbone.revision)

    @property
    def _files(self) -> MMDataModule | None:
        """The data module of the fit; None where the user's own loaders are in its place, or nothing is run."""
        data = None if self._trainer is None else self.trainer.datamodule  # type: ignore[attr-defined]
        return data if isinstance(data, MMDataModule) else None

    @cached_property
    def without_files(self) -> MMDataModule:
        """Stands for the data module in a run on the user's own loaders: it has no rows."""
        return MMDataModule()
