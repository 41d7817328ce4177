"""Which base model a checkpoint belongs to: digests of its frozen weights, its config and its processor.

Data flow: model and processor as loaded -> ``base_identity`` (plain strings, kept in every checkpoint) ->
``identity_differences``: what differs, by name.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from lightning_mm.models.processor import ModelProcessor

BaseIdentity = dict[str, dict[str, str]]
"""Part (weights, config, processor) -> name -> digest or value."""

_OF_THE_PLACE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Entries of a config that say where a model came from and how it is held, not what it computes."""
_NAMED = 3
"""Names that are told of each part."""


def base_identity(model: nn.Module, processing: ModelProcessor) -> BaseIdentity:
    """The identity of a base model. All frozen values count: it reads them once, at some gigabytes a second.

    Args:
        model: The model under its policy, with its weights as loaded; what trains is left out.
        processing: Its processor.
    """
    return {
        "weights": {name: _digest(tensor) for name, tensor in _frozen(model).items()},
        "config": _flat(getattr(model, "config").to_dict()),  # noqa: B009  (a PreTrainedModel, wrapped or not)
        "processor": processing.loaded_as,
    }


def identity_differences(saved: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What differs between two base models: one sentence part for weights, config and processor each.

    Entries of config and processor that only one of both has are no difference: versions of transformers add some.

    Args:
        saved: Identity in a checkpoint.
        now: Identity of this run's model.

    Example:
        >>> identity_differences({"config": {"dropout": "0.0"}}, {"config": {"dropout": "0.1", "new": "1"}})
        ['config: dropout 0.0, now 0.1']
    """
    told = []
    for part, old in saved.items():
        new = now.get(part, {})
        both = old.keys() & new.keys()
        differ = [name for name in old if name in both and old[name] != new[name]]
        if part == "weights":
            differ += sorted(old.keys() ^ new.keys())
            if differ:
                told.append(f"{len(differ)} of {len(old)} frozen tensors: {_named(differ)}")
        elif differ:
            told.append(f"{part}: {_named([f'{name} {old[name]}, now {new[name]}' for name in differ])}")
    return told


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """All that is saved with a model and does not train, by name: parameters, packed ones too, and buffers."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = {name: parameter for name, parameter in model.named_parameters() if name not in trained}
    saved = model.state_dict()
    return kept | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _digest(tensor: Tensor) -> str:
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested options by dotted name, as text."""
    found: dict[str, str] = {}
    for name, each in value.items():
        if name in _OF_THE_PLACE:
            continue
        if isinstance(each, Mapping):
            found |= _flat(each, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.dumps(each, default=str, sort_keys=True)
    return found


def _named(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
