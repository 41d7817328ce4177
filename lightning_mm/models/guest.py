"""Models that others loaded and train: found inside their modules, and opened for reading as they stand.

Data flow: any module -> ``find_models`` or ``model_at`` -> ``open_model`` (looks through wrappers of PEFT, DDP and
torch.compile, copies the processor) -> ``MultimodalModel``. Nothing of the model or the processor is changed.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch.distributed.tensor as dtensor
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from lightning_mm.core.errors import UserError
from lightning_mm.models.handle import MultimodalModel, unwrap_model
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.processor import ModelProcessor, wrap_processor


def find_models(module: nn.Module) -> dict[str, nn.Module]:
    """The transformers models for pictures and text inside a module, by path; parts of such a model are left out."""
    found: dict[str, nn.Module] = {}
    for path, part in module.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in found)
        if (
            not inside
            and isinstance(part, PreTrainedModel)
            and type(part.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        ):
            found[path] = part
    return found


def the_only_model(module: nn.Module) -> tuple[str, nn.Module]:
    """Path and model of the one transformers model for pictures and text inside a module.

    Raises:
        UserError: There is none, or more than one.
    """
    for part in module.modules():
        _refuse_prompts(part)
    found = find_models(module)
    if len(found) == 1:
        return next(iter(found.items()))
    held = type(module).__name__
    if found:
        raise UserError(
            f"{held} holds {len(found)} multimodal models.",
            f"They are {', '.join(found)}.",
            f'Say which, by its path from the module: model="{next(iter(found))}".',
        )
    others = [f"{path or held} is a {type(part).__name__}" for path, part in module.named_modules() if _is_text(part)]
    raise UserError(
        f"{held} holds no multimodal model.",
        f"{others[0]}, which takes no pictures."
        if others
        else "None of its modules is an image-text-to-text model of transformers.",
        "Look inside a model that takes pictures and text; one that is kept out of the module's parameters, in a plain "
        'dictionary or list, is found by its path: model="parts.model".',
    )


def _is_text(part: nn.Module) -> bool:
    return isinstance(part, PreTrainedModel) and type(part.config) in MODEL_FOR_CAUSAL_LM_MAPPING


def model_at(module: nn.Module, path: str) -> nn.Module:
    """The model, in its wrappers, at a path below a module: attributes, keys of dictionaries, places in lists.

    Args:
        module: Any module.
        path: Such as ``model.backbone``.

    Raises:
        UserError: There is nothing, or no model of transformers.
    """
    if not isinstance(path, str):
        raise UserError(
            f"model= was given a {type(path).__name__}.",
            "It is the path of the model in the module that is trained.",
            'Give it as text, such as model="model.backbone".',
        )
    held: Any = module
    for name in path.split("."):
        held = _step(held, name)
    plain = unwrap_model(held) if isinstance(held, nn.Module) else held
    if not isinstance(plain, PreTrainedModel):
        others = ", ".join(find_models(module)) or "none"
        is_what = f"is a {type(plain).__name__}, not a model of transformers" if plain is not None else "does not exist"
        raise UserError(
            f"There is no multimodal model at {path!r} of {type(module).__name__}.",
            f"It {is_what}. Multimodal models there: {others}.",
            "Give the path of one of them as model=, or leave it out where there is one.",
        )
    return held


def _step(held: Any, name: str) -> Any:
    """What ``held`` has under a name; None if nothing."""
    if isinstance(held, Mapping):
        return held.get(name)
    if isinstance(held, (list, tuple)):
        return held[int(name)] if name.isdigit() and int(name) < len(held) else None
    return getattr(held, name, None)


def open_model(model: nn.Module, processor: Any, source: str = "") -> MultimodalModel:
    """A handle of a loaded model, which may be wrapped and have adapters, with its processor.

    Args:
        model: A multimodal LLM of transformers.
        processor: What ``AutoProcessor`` gave for it, or a ``ModelProcessor``; it is copied.
        source: Folder or hub name that the model was loaded from; '' (default) takes what its config says.

    Raises:
        UserError: The model is sharded, has prompts for adapters, or its parts cannot be told apart; or the processor
            does not take pictures and text.
    """
    _refuse_prompts(model)
    plain: Any = unwrap_model(model)
    if not isinstance(plain, PreTrainedModel):
        raise UserError(
            f"A {type(plain).__name__} cannot be looked into.",
            "It is no model of transformers, nor one in a wrapper of PEFT, DDP or torch.compile.",
            "Give the model that from_pretrained returned.",
        )
    _refuse_sharded(plain)
    if type(plain.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and plain.get_output_embeddings() is None:
        raise UserError(
            f"A {type(plain).__name__} cannot be looked into.",
            "It has no output head: it is a part of a model, or was loaded by AutoModel.",
            "Give the whole model, as AutoModelForImageTextToText.from_pretrained returns it.",
        )
    source = source or str(getattr(plain.config, "_name_or_path", ""))
    # A pad token may be set in the copy.
    copied = processor if isinstance(processor, ModelProcessor) else copy.deepcopy(processor)
    processing = wrap_processor(copied, plain.config, source or type(plain).__name__)
    return MultimodalModel(plain, ModelLayout.of(plain).without_adapters(), processing, source)


def _refuse_prompts(model: Any) -> None:
    for name, config in dict(getattr(model, "peft_config", None) or {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise UserError(
                f"The adapter {name!r} cannot be looked into.",
                f"{type(config).__name__} puts vectors before the tokens, whose places would be wrong.",
                "Take the callbacks off, or train adapters of weights (LoRA).",
            )


def _refuse_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, dtensor.DTensor) or hasattr(parameter, "ds_id") or "_flat_param" in name:
            raise UserError(
                "A sharded model cannot be looked into.",
                f"{name} lies on several devices (FSDP, DeepSpeed ZeRO-3 or tensor parallel).",
                "Take the callbacks off, or train with DDP.",
            )
