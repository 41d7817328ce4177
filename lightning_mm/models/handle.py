"""The handle of one multimodal LLM: the model, where its parts are, and its processor.

Data flow: ``loading`` gives the model, ``layout`` says where its parts are, ``processor`` makes its inputs -> one
``MultimodalModel`` that every room above is given.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.processor import Processing


class TransformersModel(Protocol):
    """What a multimodal LLM of transformers offers beyond ``nn.Module``, as far as this package uses it."""

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
        layout: Where its parts are.
        processor: Makes its inputs; None where only tensors are passed.
        source: Folder or hub name it was loaded from; '' where that is not known.
    """

    model: nn.Module
    layout: ModelLayout
    processor: Processing | None = None
    source: str = ""

    @classmethod
    def of(cls, model: nn.Module, processor: Processing | None = None, source: str = "") -> "MultimodalModel":
        """Find the parts of a plain model; see ``ModelLayout.of`` for what it raises."""
        return cls(model, ModelLayout.of(model), processor, source)

    @property
    def required_processor(self) -> Processing:
        """The processor, where the caller cannot do without it."""
        assert self.processor is not None, "this handle was made without a processor"
        return self.processor

    @property
    def transformers(self) -> TransformersModel:
        """The model with the methods that transformers gives it."""
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
        """Where the token embedding is: inputs go there."""
        return next(self.embedding.parameters()).device

    def on_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs on the model's device."""
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}


def unwrap_model(model: Any) -> nn.Module:
    """The transformers model inside what others have wrapped around it: torch.compile, DDP, PEFT."""
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
