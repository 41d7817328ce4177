"""A model that the user has loaded: whether it can be tuned in place, and where it came from.

Data flow: a model of transformers -> ``describe_loaded`` -> the ``Backbone`` that would load it again.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from lightning_mm.core.errors import UserError
from lightning_mm.models.loading import Backbone
from lightning_mm.models.lora import adapted_modules

_LOAD = 'AutoModelForImageTextToText.from_pretrained("org/name")'


def describe_loaded(model: nn.Module) -> Backbone:
    """How to load the model again; its ``path`` is '' where the weights came from no folder or hub name.

    Args:
        model: A multimodal LLM of transformers, in float32 or bfloat16 on one device.

    Raises:
        UserError: It cannot be tuned in place: adapters, quantization, float16, several devices, another class.
    """
    name = type(model).__name__
    if hasattr(model, "peft_config") or adapted_modules(model):
        raise UserError(
            f"This {name} has adapters already.",
            "The policy decides which modules have adapters.",
            "Give the model without them (after merge_and_unload()), with LoRAOnMiddle(...) as policy.",
        )
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{name} is no model of transformers.", "Its parts are found by the methods of one.", f"Give {_LOAD}."
        )
    if type(model.config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or model.get_output_embeddings() is None:
        raise UserError(f"{name} cannot answer questions about pictures.", "It lacks a part.", f"Give {_LOAD}.")
    if getattr(model, "quantization_method", None) is not None:
        raise UserError(
            f"This {name} is quantized.",
            "What trains at full rank must be left out of quantization, and only the policy knows what that is.",
            'Give MMModule(Backbone("org/name", quantization="nf4"), ...).',
        )
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        raise UserError(
            f"Gradient checkpointing is on in this {name}.",
            "It would recompute blocks that backward does not cross.",
            "Call model.gradient_checkpointing_disable(), and give MMModule(..., activation_checkpointing=True).",
        )
    return Backbone(
        path=_source(model),
        revision=getattr(model.config, "_commit_hash", None),
        dtype=_dtype(model),
        attention=_attention(model),
    )


def _source(model: PreTrainedModel) -> str:
    """Folder or hub name of the weights; '' if unknown."""
    path = str(model.name_or_path or "")
    if not path or (Path(path) / "config.json").is_file():
        return str(Path(path).absolute()) if path else ""
    from_hub = getattr(model.config, "_commit_hash", None) is not None and not Path(path).exists()
    return path if from_hub else ""


def _dtype(model: PreTrainedModel) -> Literal["float32", "bfloat16"]:
    tensors = list(model.parameters())
    types = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    devices = {tensor.device for tensor in tensors}
    if stray := types - {torch.float32, torch.bfloat16}:
        raise UserError(
            f"This model's weights are {', '.join(sorted(str(each) for each in stray))}.",
            "Steps of training are lost in it.",
            "Load the model with dtype=torch.float32, or torch.bfloat16.",
        )
    if len(devices) > 1 or torch.device("meta") in devices:
        raise UserError(
            f"This model's weights are on {', '.join(sorted(str(each) for each in devices))}.",
            "The trainer moves a whole model to its device.",
            "Load the model without device_map.",
        )
    return "bfloat16" if torch.bfloat16 in types else "float32"


def _attention(model: PreTrainedModel) -> Any:
    """The attention kernel where it is not transformers' own choice."""
    kernel = getattr(model.config, "_attn_implementation", None)
    return kernel if kernel in ("eager", "flash_attention_2", "flex_attention") else "auto"
