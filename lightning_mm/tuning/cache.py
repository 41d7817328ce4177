"""The frozen prefix computed once per row and kept on disk: its first epoch fills the cache, the others begin above it.

Data flow: settings + model + plan -> ``verified``, ``open_store`` -> ``PrefixCache``: a collator for the loader, and
for the step the states that are known, and those of new rows, computed and kept.

Shapes: B rows, L tokens, D hidden size, M rows that are not known.
"""

import hashlib
import json
import os
from collections import deque
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mm.data.batch import Batch, Kept
from lightning_mm.data.collator import Collator
from lightning_mm.data.encoded import Inseparable, cut, joined
from lightning_mm.data.kept import STATES, KeptCollator
from lightning_mm.data.store import RecordStore
from lightning_mm.errors import UserError
from lightning_mm.models.anatomy import Anatomy, Region
from lightning_mm.models.processing import Processing
from lightning_mm.tuning.boundary import unchanged_slices
from lightning_mm.tuning.policy import TuningPlan
from lightning_mm.tuning.prefix import FrozenPrefix

_PENDING = 2
"""Batches whose states are on their way from the device; a step waits for the oldest beyond that."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Where the frozen prefix's hidden states are kept.

    Args:
        mode: 'auto' keeps them where rows are seen more than once, or where some are kept already.
        folder: Shared by all runs; <XDG cache>/lightning_mm if not given.
        limit: Most GiB on disk, over all models; never more than half of what is free.
        dtype: 'auto' is float32 where the run computes in it, else bfloat16; int8 takes half of that. What rounding
            costs is said.
    """

    mode: Literal["auto", "on", "off"] = "auto"
    folder: str | None = None
    limit: float = 16.0
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise UserError(f"model.cache.limit: {self.limit} is out of range.", "It is in GiB.", "Give more than 0.")

    @property
    def path(self) -> Path:
        """The folder."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(self.folder) if self.folder else Path(home) / "lightning_mm"


class PrefixCache:
    """What enters the lowest trainable block, kept by row.

    Args:
        prefix: The model, split there.
        store: Where it is kept.
        kept: As what: float32, bfloat16 or int8.
        dtype: Of the states in a batch.
    """

    def __init__(self, prefix: FrozenPrefix, store: RecordStore, kept: str, dtype: torch.dtype) -> None:
        self.prefix, self.store, self.kept, self.dtype = prefix, store, kept, dtype
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, Kept]] = deque()

    def collator(self, collator: Collator, width: int) -> KeptCollator:
        """A collator that leaves out the pictures of rows that are known."""
        return KeptCollator(collator, self.store, width, self.dtype)

    def states(self, kept: Kept) -> Tensor:
        """(B, L, D) of all rows."""
        if kept.fresh is None:
            return kept.states
        made_MLD = self.prefix.states(kept.fresh)
        states_BLD = kept.states.to(made_MLD.dtype)
        states_BLD[kept.missing, : made_MLD.shape[1]] = self._rounded(made_MLD)
        self._fetch(made_MLD, kept)
        self._write(_PENDING)
        return states_BLD

    def flush(self) -> None:
        """Write everything that is on its way: a run resumed from here must find what this one has used."""
        self._write(0)
        self.store.flush()

    def close(self) -> None:
        """Nothing more is kept."""
        self._write(0)
        self.store.close()

    def _rounded(self, made_MLD: Tensor) -> Tensor:
        """As they will come back, so that it makes no difference whether a row is known."""
        rounded_MLD = made_MLD
        if self.kept == "int8":
            scale_ML1 = made_MLD.float().abs().amax(-1, keepdim=True) / 127
            rounded_MLD = (made_MLD / scale_ML1).nan_to_num(0.0).round().clamp(-127, 127) * scale_ML1
        elif self.kept == "bfloat16":
            rounded_MLD = made_MLD.bfloat16()
        return rounded_MLD.to(self.dtype).to(made_MLD.dtype)

    def _fetch(self, made_MLD: Tensor, kept: Kept) -> None:
        """Off the device, without waiting for it."""
        if made_MLD.device.type != "cuda":
            self._pending.append((made_MLD, None, kept))
            return
        host_MLD = torch.empty(made_MLD.shape, dtype=made_MLD.dtype, pin_memory=True)
        host_MLD.copy_(made_MLD, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending.append((host_MLD, arrived, kept))

    def _write(self, waiting: int) -> None:
        while self._pending and (len(self._pending) > waiting or self._pending[0][1] is None):
            made_MLD, arrived, kept = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            for row_LD, key, record in zip(made_MLD, kept.keys, kept.records, strict=True):
                self.store.put(key, {**record, STATES: row_LD[: len(record["regions"])]})


def boundary_of(plan: TuningPlan) -> int:
    """The block above the frozen prefix.

    Raises:
        UserError: Something below the blocks trains, so that nothing stays the same.
    """
    slices = unchanged_slices(plan)
    if not slices:
        moving = [region.value for region in (Region.VISION, Region.CONNECTOR, Region.EMBEDDING) if moves(plan, region)]
        raise _none(f"{', '.join(moving)} trained: what enters the blocks changes at every step")
    return min(slices - 1, plan.num_layers - 1)


def moves(plan: TuningPlan, region: Region) -> bool:
    """Whether a region trains."""
    return plan.modes[region] != "frozen"


def verified(model: nn.Module, anatomy: Anatomy, plan: TuningPlan, batch: Batch, pad_token_id: int) -> FrozenPrefix:
    """The model split at its boundary, shown to give the same loss on a batch.

    Raises:
        UserError: It does not, or cannot be split.
    """
    prefix = FrozenPrefix(model, anatomy, boundary_of(plan))
    try:
        rest = joined(cut(batch), batch.samples, pad_token_id)
    except Inseparable as error:
        raise _none(str(error)) from error
    prefix.verify(batch, rest.to(batch.regions.device))
    return prefix


def open_store(
    settings: CacheSettings, prefix: FrozenPrefix, processing: Processing, facts: dict[str, Any], kept: Any
) -> RecordStore:
    """The place of this prefix on disk.

    Args:
        settings: As configured.
        prefix: Whose states are kept.
        processing: Makes the rows.
        facts: What else the states depend on (longest row, precision, attention kernel).
        kept: How states are kept.
    """
    identity = {
        "weights": prefix_digest(prefix.model, prefix.anatomy, prefix.first),
        "config": config_digest(prefix.model),
        "block": prefix.first,
        "processor": processor_digest(processing),
        "versions": [version("torch"), version("transformers")],
        **facts,
    }
    limit = int(settings.limit * 2**30)
    return RecordStore.open(settings.path, identity, limit_bytes=limit, dtype=kept)


def prefix_digest(model: nn.Module, anatomy: Anatomy, first: int) -> str:
    """SHA-256 over every weight and buffer below a block, and over the scales of those that are quantised."""
    above = tuple(f"{name}." for name in anatomy.layers[first:])
    digest = hashlib.sha256()
    # A state dict holds what quantised weights are scaled by; rotary tables are in the buffers only.
    for name, tensor in {**dict(model.named_buffers()), **model.state_dict()}.items():
        if name.startswith(above) or not isinstance(tensor, Tensor):
            continue
        if name in anatomy.places and anatomy.places[name].region in (Region.NORM, Region.HEAD):
            continue
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


def _none(why: str) -> UserError:
    return UserError("There is no frozen prefix to be kept.", why[0].upper() + why[1:] + ".", "--model.cache.mode off")
