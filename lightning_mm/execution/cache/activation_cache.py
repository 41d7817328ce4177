"""What is frozen computed once per row and kept on disk: the first epoch fills the cache, the others begin above it.

Data flow: settings + model + plan -> ``verified``, ``open_store`` -> ``PrefixCache``: a collator for the loader, and
for the step the states that are known, and those of new rows, computed and kept. ``features`` does the same with what
the vision tower makes of pictures, where something between it and the blocks trains.

Shapes: B rows, L tokens, D hidden size, M rows that are not known.
"""

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, CachedStates
from lightning_mm.data.collator import Collator
from lightning_mm.execution.activation_checkpointing import unchanged_slices
from lightning_mm.execution.cache.collators import STATES, Inseparable, KeptCollator, cut, joined
from lightning_mm.execution.cache.frozen_prefix import FrozenPrefix
from lightning_mm.execution.cache.store import RecordStore
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region
from lightning_mm.tuning.policy import TuningPlan

_PENDING = 2
"""Batches whose states are on their way from the device; a step waits for the oldest beyond that."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Where the frozen prefix's hidden states, or the vision tower's features, are kept.

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


class RowCache:
    """What does not change, kept by row; off the device without waiting for it.

    Args:
        store: Where it is kept.
        kept: As what: float32, bfloat16 or int8.
        dtype: Of the states in a batch.
    """

    def __init__(self, store: RecordStore, kept: str, dtype: torch.dtype) -> None:
        self.store, self.kept, self.dtype = store, kept, dtype
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, Callable[[Tensor], None]]] = deque()

    def flush(self) -> None:
        """Write everything that is on its way: a run resumed from here must find what this one has used."""
        self._write(0)
        self.store.flush()

    def close(self) -> None:
        """Nothing more is kept."""
        self._write(0)
        self.store.close()

    def _rounded(self, made: Tensor) -> Tensor:
        """As they will come back, so that it makes no difference whether a row is known."""
        rounded = made
        if self.kept == "int8":
            scale = made.float().abs().amax(-1, keepdim=True) / 127
            rounded = (made / scale).nan_to_num(0.0).round().clamp(-127, 127) * scale
        elif self.kept == "bfloat16":
            rounded = made.bfloat16()
        return rounded.to(self.dtype).to(made.dtype)

    def _keep(self, made: Tensor, put: Callable[[Tensor], None]) -> None:
        """``put`` is given the states on the host as soon as they are there."""
        if made.device.type != "cuda":
            self._pending.append((made, None, put))
        else:
            host = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
            host.copy_(made, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._pending.append((host, arrived, put))
        self._write(_PENDING)

    def _write(self, waiting: int) -> None:
        while self._pending and (len(self._pending) > waiting or self._pending[0][1] is None):
            made, arrived, put = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            put(made)


class PrefixCache(RowCache):
    """What enters the lowest trainable block, kept by row.

    Args:
        prefix: The model, split there.
        store: Where it is kept.
        kept: As what: float32, bfloat16 or int8.
        dtype: Of the states in a batch.
    """

    def __init__(self, prefix: FrozenPrefix, store: RecordStore, kept: str, dtype: torch.dtype) -> None:
        super().__init__(store, kept, dtype)
        self.prefix = prefix

    def collator(self, collator: Collator, width: int) -> KeptCollator:
        """A collator that leaves out the pictures of rows that are known."""
        return KeptCollator(collator, self.store, width, self.dtype)

    def states(self, kept: CachedStates) -> Tensor:
        """(B, L, D) of all rows."""
        if kept.uncached is None:
            return kept.states
        made_MLD = self.prefix.states(kept.uncached)
        states_BLD = kept.states.to(made_MLD.dtype)
        states_BLD[kept.uncached_rows, : made_MLD.shape[1]] = self._rounded(made_MLD)

        def put(host_MLD: Tensor) -> None:
            for row_LD, key, record in zip(host_MLD, kept.keys, kept.records, strict=True):
                self.store.put(key, {**record, STATES: row_LD[: len(record["regions"])]})

        self._keep(made_MLD, put)
        return states_BLD


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


def verified(mm: MultimodalModel, plan: TuningPlan, batch: Batch, pad_token_id: int) -> FrozenPrefix:
    """The model split at its boundary, shown to give the same loss on a batch.

    Raises:
        UserError: It does not, or cannot be split.
    """
    prefix = FrozenPrefix(mm, boundary_of(plan))
    try:
        rest = joined(cut(batch), batch.samples, pad_token_id)
    except Inseparable as error:
        raise _none(str(error)) from error
    prefix.verify(batch, rest.to(batch.regions.device))
    return prefix


def _none(why: str) -> UserError:
    return UserError("There is no frozen prefix to be kept.", why[0].upper() + why[1:] + ".", "--model.cache.mode off")
