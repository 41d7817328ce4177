"""The identity of a store of cached activations: digests of everything that they depend on.

Data flow: weights, config, processor and the facts of a run -> digests -> ``open_store``: the store of this identity.
"""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from os.path import commonpath
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.execution.cache.activation_cache import CacheSettings
from lightning_mm.execution.cache.frozen_prefix import FrozenPrefix
from lightning_mm.execution.cache.store import RecordStore, StorageDtype
from lightning_mm.execution.cache.vision_features import FrozenTower
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region
from lightning_mm.models.processor import ModelProcessor


def open_store(
    settings: CacheSettings,
    part: FrozenPrefix | FrozenTower,
    processing: ModelProcessor,
    facts: dict[str, Any],
    storage_dtype: StorageDtype,
) -> RecordStore:
    """The store on disk of a frozen part's activations.

    Args:
        settings: The cache's settings.
        part: The frozen part whose activations are cached.
        processing: The model's processor.
        facts: What the activations depend on beside weights, config and processor, to the bit (longest row, precision,
            attention kernel, hardware).
        storage_dtype: Storage dtype: 'float32', 'bfloat16' or 'int8'.
    """
    identity = {
        **_part_identity(part),
        "computed": "row by row",
        "config": config_digest(part.mm.model),
        "processor": processor_digest(processing),
        "versions": [version("torch"), version("transformers")],
        **facts,
    }
    limit = int(settings.limit * 2**30)
    return RecordStore.open(settings.path, identity, limit_bytes=limit, dtype=storage_dtype)


def _part_identity(part: FrozenPrefix | FrozenTower) -> dict[str, Any]:
    if isinstance(part, FrozenTower):
        return {"weights": tower_digest(part.mm), "block": " ".join(part.read)}
    return {"weights": prefix_digest(part.mm, part.first), "block": part.first}


def prefix_digest(mm: MultimodalModel, first: int) -> str:
    """SHA-256 of all weights and buffers below a block, and of the scales of quantized ones.

    Args:
        mm: The plain model.
        first: Index of the block.
    """
    above = tuple(f"{name}." for name in mm.layout.layers[first:])

    def below(name: str) -> bool:
        behind = name in mm.layout.locations and mm.layout.locations[name].region in (Region.NORM, Region.HEAD)
        return not name.startswith(above) and not behind

    return _digest(mm.model, below)


def tower_digest(mm: MultimodalModel) -> str:
    """SHA-256 of all weights and buffers of the vision tower, and of the scales of quantized ones."""
    root = commonpath([name.replace(".", "/") for name in mm.layout.parameters_in(Region.VISION)]).split("/")

    def inside(name: str) -> bool:
        try:
            return mm.layout.location_of(name).region is Region.VISION
        except KeyError:  # a buffer, or the scale of a weight
            return name.split(".")[: len(root)] == root

    return _digest(mm.model, inside)


def _digest(model: nn.Module, counts: Callable[[str], bool]) -> str:
    digest = hashlib.sha256()
    # The state dict includes the scales of quantized weights; rotary tables are in the buffers only.
    for name, tensor in {**dict(model.named_buffers()), **model.state_dict()}.items():
        if isinstance(tensor, Tensor) and counts(name):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def config_digest(model: Any) -> str:
    """SHA-256 of the model's config (feature layers, epsilons, scalings) without its name and transformers version."""

    def plain_values(value: object) -> object:
        if isinstance(value, dict):
            return {
                str(k): plain_values(v) for k, v in value.items() if k not in ("_name_or_path", "transformers_version")
            }
        return [plain_values(each) for each in value] if isinstance(value, list | tuple) else str(value)

    return hashlib.sha256(json.dumps(plain_values(model.config.to_dict()), sort_keys=True).encode()).hexdigest()


def processor_digest(processing: ModelProcessor) -> str:
    """SHA-256 of what turns a row into inputs: tokenizer, image processor, chat template, processor options."""
    processor = processing.processor
    parts = [processor.tokenizer.backend_tokenizer.to_str(), processing.template, type(processor).__name__]
    parts += [repr(processing.bounds)]
    parts += [repr(sorted((k, str(v)) for k, v in processor.image_processor.to_dict().items()))]
    parts += [repr(sorted((k, str(v)) for k, v in vars(processor).items() if isinstance(v, str | int | float | bool)))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
