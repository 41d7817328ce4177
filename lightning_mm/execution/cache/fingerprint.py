"""What tells one store of kept states from another: everything that they depend on.

Data flow: weights, config, processor and the facts of a run -> digests -> ``open_store``: the folder of just these.
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
from lightning_mm.execution.cache.store import RecordStore
from lightning_mm.execution.cache.vision_features import FrozenTower
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region
from lightning_mm.models.processor import Processing


def open_store(
    settings: CacheSettings,
    part: FrozenPrefix | FrozenTower,
    processing: Processing,
    facts: dict[str, Any],
    kept: Any,
) -> RecordStore:
    """The place of a frozen part's states on disk.

    Args:
        settings: As configured.
        part: Whose states are kept.
        processing: Makes the rows.
        facts: What else the states depend on (longest row, precision, attention kernel).
        kept: How states are kept.
    """
    identity = {
        **_of(part),
        "config": config_digest(part.mm.model),
        "processor": processor_digest(processing),
        "versions": [version("torch"), version("transformers")],
        **facts,
    }
    limit = int(settings.limit * 2**30)
    return RecordStore.open(settings.path, identity, limit_bytes=limit, dtype=kept)


def _of(part: FrozenPrefix | FrozenTower) -> dict[str, Any]:
    if isinstance(part, FrozenTower):
        return {"weights": tower_digest(part.mm), "block": part.top}
    return {"weights": prefix_digest(part.mm, part.first), "block": part.first}


def prefix_digest(mm: MultimodalModel, first: int) -> str:
    """SHA-256 over every weight and buffer below a block, and over the scales of those that are quantised."""
    above = tuple(f"{name}." for name in mm.layout.layers[first:])

    def below(name: str) -> bool:
        behind = name in mm.layout.locations and mm.layout.locations[name].region in (Region.NORM, Region.HEAD)
        return not name.startswith(above) and not behind

    return _digest(mm.model, below)


def tower_digest(mm: MultimodalModel) -> str:
    """SHA-256 over every weight and buffer of the vision tower, and over the scales of those that are quantised."""
    root = commonpath([name.replace(".", "/") for name in mm.layout.parameters_in(Region.VISION)]).split("/")

    def inside(name: str) -> bool:
        try:
            return mm.layout.location_of(name).region is Region.VISION
        except KeyError:  # a buffer, or the scale of a weight
            return name.split(".")[: len(root)] == root

    return _digest(mm.model, inside)


def _digest(model: nn.Module, counts: Callable[[str], bool]) -> str:
    digest = hashlib.sha256()
    # A state dict holds what quantised weights are scaled by; rotary tables are in the buffers only.
    for name, tensor in {**dict(model.named_buffers()), **model.state_dict()}.items():
        if isinstance(tensor, Tensor) and counts(name):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def config_digest(model: Any) -> str:
    """SHA-256 over what the weights do not tell: features that are read, epsilons, scalings; not where it came from."""

    def told(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): told(v) for k, v in value.items() if k not in ("_name_or_path", "transformers_version")}
        return [told(each) for each in value] if isinstance(value, list | tuple) else str(value)

    return hashlib.sha256(json.dumps(told(model.config.to_dict()), sort_keys=True).encode()).hexdigest()


def processor_digest(processing: Processing) -> str:
    """SHA-256 over all that makes inputs of a row: tokenizer, picture processor, chat template."""
    processor = processing.processor
    told = [processor.tokenizer.backend_tokenizer.to_str(), processing.template, type(processor).__name__]
    told += [repr(sorted((k, str(v)) for k, v in processor.image_processor.to_dict().items()))]
    told += [repr(sorted((k, str(v)) for k, v in vars(processor).items() if isinstance(v, str | int | float | bool)))]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()
