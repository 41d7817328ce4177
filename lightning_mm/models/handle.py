"""One multimodal LLM: the model, the layout of its parts, and its processor.

Data flow: model from ``loading``, parts from ``layout``, inputs from ``processor`` -> one ``MultimodalModel`` that the
packages above take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.processor import ModelProcessor


class TransformersModel(Protocol):
    """The methods of a transformers multimodal LLM, beyond ``nn.Module``, that this package uses."""

    config: PretrainedConfig
    dtype: torch.dtype
    base_model: nn.Module

    def get_decoder(self) -> nn.Module:
        """The text decoder."""
        ...

    def get_encoder(self, modality: str) -> nn.Module | None:
        """The encoder of a modality, such as the vision tower for 'image'."""
        ...

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        ...

    def get_output_embeddings(self) -> nn.Module | None:
        """The output projection."""
        ...

    def set_attn_implementation(self, attn_implementation: str | dict[str, str]) -> None:
        """Choose an attention function by its registered name, for this model only."""
        ...

    def generate(self, **inputs: Any) -> Tensor:
        """Token ids (B, L + new)."""
        ...


@dataclass(frozen=True, eq=False)
class MultimodalModel:
    """One multimodal LLM.

    Args:
        model: The transformers model itself, without wrappers.
        layout: Module names of the model's parts.
        processor: Makes the model's inputs; None (default) if only tensors are passed.
        source: Folder or hub name that the model was loaded from; '' (default) if unknown.
    """

    model: nn.Module
    layout: ModelLayout
    processor: ModelProcessor | None = None
    source: str = ""

    @classmethod
    def of(cls, model: nn.Module, processor: ModelProcessor | None = None, source: str = "") -> "MultimodalModel":
        """A handle of a plain model, with its layout resolved; raises as ``ModelLayout.of``."""
        return cls(model, ModelLayout.of(model), processor, source)

    @property
    def required_processor(self) -> ModelProcessor:
        """The processor; asserts that there is one."""
        assert self.processor is not None, "this handle was made without a processor"
        return self.processor

    @property
    def transformers(self) -> TransformersModel:
        """The model, typed with the methods of transformers."""
        return cast(TransformersModel, self.model)

    @property
    def head(self) -> nn.Module:
        """The output projection."""
        return self.model.get_submodule(self.layout.head)

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_submodule(self.layout.embedding)

    @property
    def device(self) -> torch.device:
        """Device of the token embedding, where inputs go."""
        return next(self.embedding.parameters()).device

    def on_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs on the model's device."""
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}


def unwrap_model(model: Any) -> nn.Module:
    """The transformers model inside wrappers of torch.compile, DDP and PEFT."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        else:
            assert isinstance(model, nn.Module)
            return model
