"""Contents of a partial fine-tuning checkpoint, and the checks of the run that loads it.

Data flow: module + ranks -> plain tensors, numbers and strings -> checkpoint -> validated and restored. Frozen weights
are left out: the base model is known by digests. ``training.checkpoint_file`` writes and reads the file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import lightning as L
from torch import Tensor, nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import rank_and_world_size
from lightning_mm.core.errors import UserError
from lightning_mm.core.random_state import restore_rng
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.base_identity import BaseIdentity, identity_differences
from lightning_mm.training.checkpoint_file import FORMAT, KEY, check_format
from lightning_mm.training.run_length import total_steps
from lightning_mm.tuning.census import Census
from lightning_mm.tuning.optimizer import OptimizerSettings


def checkpoint_metadata(
    census: Census, base: BaseIdentity, settings: Mapping[str, Any], unread: Iterable[str], rng: list[dict[str, Any]]
) -> dict[str, Any]:
    """The ``lightning_mm`` entry of a checkpoint.

    Args:
        census: Census of the model: policy, layers and their digest.
        base: Identity of the base model.
        settings: Settings that a resumed run compares with its own.
        unread: Names of parameters that the policy names but the forward pass never uses.
        rng: ``rng_state`` of every rank.
    """
    return {
        "version": FORMAT,
        "policy": census.policy,
        "layers": list(census.layers),
        "census_digest": census.digest,
        "base": base,
        "unread": list(unread),
        "settings": dict(settings),
        "rng": rng,
    }


def settings_of(trainer: L.Trainer, data: MMDataModule | None, optimizer: OptimizerSettings | None) -> dict[str, Any]:
    """Settings of a fit that decide what it learns, by option name.

    Args:
        trainer: The trainer of the fit.
        data: Its data module; None: the user's own loaders.
        optimizer: Settings of AdamW; None: the user's own optimizer.
    """
    settings = {"name": "yours"} if optimizer is None else {**asdict(optimizer), "betas": list(optimizer.betas)}
    learned_from = ("batch_size", "max_length", "max_tokens", "group_by_length", "seed")
    return {
        **{f"model.optimizer.{name}": value for name, value in settings.items()},
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.precision": str(trainer.precision),
        "trainer.steps": total_steps(trainer),
        **({f"data.{name}": getattr(data, name) for name in learned_from} if data else {}),
    }


def drop_frozen_weights(checkpoint: dict[str, Any], trainable: set[str]) -> None:
    """Remove all tensors but the trainable ones from a checkpoint's state dict, in place."""
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: tensor for name, tensor in weights.items() if name in trainable}


def validate_checkpoint(
    checkpoint: Mapping[str, Any],
    census: Census,
    base: BaseIdentity | None,
    trainable: Mapping[str, nn.Parameter],
    optimizer: str | None = None,
) -> None:
    """Refuse a checkpoint of another policy, another base model, or with other tensors than this run trains.

    Args:
        checkpoint: The loaded checkpoint.
        census: Census of this run's model.
        base: Identity of this run's base model; None skips the comparison, for weights held in another form.
        trainable: This run's trainable parameters by name.
        optimizer: Name of this run's optimizer; None (default) where the optimizer state is not resumed.

    Raises:
        UserError: Checkpoint and run differ; the message states both values.
    """
    saved = checkpoint[KEY]
    check_format(saved)
    _check_parts(checkpoint, optimizer is not None)
    if saved["census_digest"] != census.digest:
        raise UserError("The checkpoint was trained under another policy.", *_other_policy(saved, census))
    if base is not None and "base" not in saved:
        log_decision("ckpt_path", "the base model is not compared", "the checkpoint is of an earlier format")
    elif base is not None and (differing := identity_differences(saved["base"], base)):
        raise UserError(
            "The checkpoint belongs to another base model.",
            f"{'; '.join(differing)}.",
            "Name the model (and dtype, quantization) that the run was started from.",
        )
    held = saved["settings"].get("model.optimizer.name")
    if optimizer is not None and held is not None and held != optimizer:
        raise UserError(
            f"model.optimizer.name: {optimizer} cannot take up the checkpoint.",
            f"Its state was kept by {held}.",
            f"Set model.optimizer.name {held}, or begin a new run from an exported model.",
        )
    _check_tensors(checkpoint["state_dict"], trainable)


def _other_policy(saved: Mapping[str, Any], census: Census) -> tuple[str, str]:
    """Why a checkpoint's census is another one, and what helps."""
    old, new = (saved["policy"], list(saved["layers"])), (census.policy, list(census.layers))
    if old == new:
        why = f"Both are {census.policy} of layers {new[1]}, over models of other shapes or parts."
        return why, "Name the base model that the run was started from."
    why = f"Checkpoint: {old[0]}, layers {old[1]}. This run: {new[0]}, layers {new[1]}."
    return why, "Ask for the checkpoint's policy, or begin a new run from an exported model."


def _check_parts(checkpoint: Mapping[str, Any], resumes: bool) -> None:
    """Refuse a checkpoint without one of its parts.

    Args:
        checkpoint: The loaded checkpoint.
        resumes: Whether a run goes on from it, with optimizer, schedule and place in the data.
    """
    needed = ["state_dict", "global_step"] + (["optimizer_states", "lr_schedulers", "loops"] if resumes else [])
    ours = ("census_digest", "policy", "layers", "settings", "unread", "rng")
    missing = [name for name in needed if name not in checkpoint]
    missing += [f"{KEY}.{name}" for name in ours if name not in checkpoint[KEY]]
    if missing:
        raise UserError("The checkpoint is incomplete.", f"It lacks {', '.join(missing)}.", "Use an earlier one.")


def _check_tensors(weights: Mapping[str, Tensor], trainable: Mapping[str, nn.Parameter]) -> None:
    """Refuse weights that are not those that train, by name and shape."""
    told = [f"it lacks {name}" for name in trainable if name not in weights]
    told += [f"{name} does not train here" for name in weights if name not in trainable]
    told += [
        f"{name} has shape {tuple(weights[name].shape)}, here {tuple(parameter.shape)}"
        for name, parameter in trainable.items()
        if name in weights and weights[name].shape != parameter.shape
    ]
    if told:
        more = f", and {len(told) - 1} more" if len(told) > 1 else ""
        raise UserError("The checkpoint holds other tensors.", f"{told[0]}{more}.", "Use an earlier checkpoint.")


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
