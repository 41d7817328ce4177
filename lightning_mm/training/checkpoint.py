"""Contents of a partial fine-tuning checkpoint, and the checks of the run that loads it.

Data flow: module + ranks -> plain tensors, numbers and strings -> checkpoint -> validated and restored. Frozen weights
are left out: the base model is identified by its fingerprint. Every checkpoint loads with ``weights_only=True``.
"""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import rank_and_world_size
from lightning_mm.core.errors import UserError
from lightning_mm.core.random_state import restore_rng
from lightning_mm.tuning.census import Census

KEY = "lightning_mm"


def read_checkpoint(path: Path, mapped: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, read on the CPU with ``weights_only=True``.

    Args:
        path: The checkpoint file.
        mapped: Memory-map the tensors; default True. A run that resumes needs False: its own saving may replace the
            file.

    Raises:
        UserError: The file is missing, damaged, contains code, or was not written by lightning_mm.
    """
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.ckpt"))
        raise UserError(
            f"There is no checkpoint {path}.", f"Beside it: {', '.join(near) or 'none'}.", "Name one of them."
        )
    try:
        checkpoint = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The checkpoint {path} cannot be read.",
            str(error).splitlines()[0],
            "It is damaged, or holds code, which is never run; use an earlier one.",
        ) from error
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise UserError(f"{path} is no checkpoint of lightning_mm.", f"It has no '{KEY}' entry.", "Name another file.")
    return checkpoint


class LoadedCheckpoint(TorchCheckpointIO):
    """Checkpoint IO that returns an already loaded checkpoint instead of reading it again.

    Args:
        path: Where the checkpoint was read from; other paths are read as usual.
        checkpoint: Its content; released once the trainer has loaded it.
    """

    def __init__(self, path: Path, checkpoint: dict[str, Any]) -> None:
        super().__init__()
        self._path, self._checkpoint = path.absolute(), checkpoint

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint at ``path``."""
        if Path(path).absolute() == self._path and self._checkpoint:
            checkpoint, self._checkpoint = self._checkpoint, {}
            return checkpoint
        return super().load_checkpoint(path, map_location, weights_only)


def checkpoint_metadata(
    census: Census, base: str, settings: Mapping[str, Any], unread: Iterable[str], rng: list[dict[str, Any]]
) -> dict[str, Any]:
    """The ``lightning_mm`` entry of a checkpoint.

    Args:
        census: Census of the model: policy, layers and their digest.
        base: Fingerprint of the frozen weights.
        settings: Settings that a resumed run compares with its own.
        unread: Names of parameters that the policy names but the forward pass never uses.
        rng: ``rng_state`` of every rank.
    """
    return {
        "version": 1,
        "policy": census.policy,
        "layers": list(census.layers),
        "census_digest": census.digest,
        "base_fingerprint": base,
        "unread": list(unread),
        "settings": dict(settings),
        "rng": rng,
    }


def drop_frozen_weights(checkpoint: dict[str, Any], trainable: set[str]) -> None:
    """Remove all tensors but the trainable ones from a checkpoint's state dict, in place."""
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: tensor for name, tensor in weights.items() if name in trainable}


def validate_checkpoint(
    checkpoint: Mapping[str, Any], census: Census, base: str | None, trainable: set[str], optimizer: str | None = None
) -> None:
    """Refuse a checkpoint of another policy, another base model, or with other tensors than this run trains.

    Args:
        checkpoint: The loaded checkpoint.
        census: Census of this run's model.
        base: Fingerprint of this run's frozen weights; None skips the comparison, for weights held in another form.
        trainable: Names of this run's trainable parameters.
        optimizer: Name of this run's optimizer; None (default) where the optimizer state is not resumed.

    Raises:
        UserError: Checkpoint and run differ; the message states both values.
    """
    saved = checkpoint[KEY]
    if saved["census_digest"] != census.digest:
        raise UserError(
            "The checkpoint was trained under another policy.",
            f"Checkpoint: {saved['policy']}, layers {saved['layers']}. "
            f"This run: {census.policy}, layers {[*census.layers]}.",
            "Ask for the checkpoint's policy, or begin a new run from an exported model.",
        )
    if base is not None and saved["base_fingerprint"] != base:
        raise UserError(
            "The checkpoint belongs to another base model.",
            f"Frozen weights: {saved['base_fingerprint'][:12]} in the checkpoint, {base[:12]} in model.backbone.path.",
            "Name the model (and dtype, quantization) that the run was started from.",
        )
    held = saved["settings"].get("model.optimizer.name")
    if optimizer is not None and held is not None and held != optimizer:
        raise UserError(
            f"model.optimizer.name: {optimizer} cannot take up the checkpoint.",
            f"Its state was kept by {held}.",
            f"Set model.optimizer.name {held}, or begin a new run from an exported model.",
        )
    if set(checkpoint["state_dict"]) != trainable:
        raise UserError("The checkpoint is incomplete.", "It lacks tensors that train.", "Use an earlier checkpoint.")


def log_setting_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Log every setting that differs from the checkpoint's; this run's value is used."""
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            log_decision(
                name, now.get(name), f"the checkpoint was made with {saved.get(name)}; the command line counts"
            )


def restore_rank_rng(saved: Mapping[str, Any]) -> None:
    """Restore this rank's random generators; log that the run is not bit-exact if the number of ranks differs."""
    rank, ranks = rank_and_world_size()
    states = saved["rng"]
    if len(states) != ranks:
        log_decision("resume", "not bit-exact", f"the checkpoint was made by {len(states)} ranks, this run has {ranks}")
        return
    restore_rng(states[rank])
