"""What a checkpoint of a partial run holds beside the optimizer, and how it is held against the run that loads it.

Data flow: module + ranks -> plain tensors, numbers and strings -> checkpoint -> checked and restored. Frozen weights
stay out: the base they come from is known by its fingerprint. Every checkpoint loads with ``weights_only=True``.
"""

import pickle
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import all_gather_object, rank_and_world_size
from lightning_mm.core.errors import UserError
from lightning_mm.tuning.census import Census

KEY = "lightning_mm"


def rng_state() -> dict[str, Any]:
    """States of all generators of this rank, as tensors and numbers."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put this rank's generators back where ``rng_state`` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def read_checkpoint(path: Path, mapped: bool = True) -> dict[str, Any]:
    """A checkpoint, without running anything that it may hold.

    Args:
        path: The file.
        mapped: Leave the tensors on disk until they are used. A run that resumes needs them in memory: its own saving
            may replace the file.

    Raises:
        UserError: There is none, it is damaged, it wants to run code, or it is not one of ours.
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
    """Lightning's checkpoint reader, which hands out a checkpoint that was read already instead of reading it again.

    Args:
        path: Where the checkpoint was read from; other paths are read as usual.
        checkpoint: Its content; held until the trainer has taken it.
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


def record(census: Census, base: str, settings: Mapping[str, Any], unread: Iterable[str]) -> dict[str, Any]:
    """What goes under ``lightning_mm`` in a checkpoint; a collective, since it holds every rank's generators."""
    return {
        "version": 1,
        "policy": census.policy,
        "layers": list(census.layers),
        "census_digest": census.digest,
        "base_fingerprint": base,
        "unread": list(unread),
        "settings": dict(settings),
        "rng": all_gather_object(rng_state()),
    }


def keep_trainable(checkpoint: dict[str, Any], trainable: set[str]) -> None:
    """Drop every tensor that does not train from a checkpoint's state dict, in place."""
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: tensor for name, tensor in weights.items() if name in trainable}


def check(
    checkpoint: Mapping[str, Any], census: Census, base: str | None, trainable: set[str], optimizer: str | None = None
) -> None:
    """Refuse a checkpoint of another policy, another base model, or with other tensors than this run trains.

    Args:
        checkpoint: As loaded.
        census: Of this run.
        base: Fingerprint of this run's frozen weights; None where they are knowingly held in another form.
        trainable: Names of what trains in this run.
        optimizer: Name of this run's optimizer, if it goes on from the checkpoint's state.

    Raises:
        UserError: Naming both sides.
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


def narrate_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say every setting that differs from the checkpoint's: the command line counts."""
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            log_decision(
                name, now.get(name), f"the checkpoint was made with {saved.get(name)}; the command line counts"
            )


def restore_rank(saved: Mapping[str, Any]) -> None:
    """This rank's generators, or a word that the resumed run is not bit-exact."""
    rank, ranks = rank_and_world_size()
    states = saved["rng"]
    if len(states) != ranks:
        log_decision("resume", "not bit-exact", f"the checkpoint was made by {len(states)} ranks, this run has {ranks}")
        return
    restore_rng(states[rank])
