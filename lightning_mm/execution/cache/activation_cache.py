"""The cache of the frozen prefix's hidden states: the first epoch fills it, later epochs start above the prefix.

Data flow: settings + model + plan -> ``split_verified_prefix``, ``fingerprint.open_store`` -> ``PrefixCache``: a
collator for the loader, and for the training step the hidden states of all rows, cached or newly computed.
``vision_features`` does the same for the vision tower's features, if connector or embedding train.

Shapes: B rows, L tokens, T tokens of one row, D hidden size.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.core.choices import refuse_other_choices
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, CachedFeatures, CachedStates
from lightning_mm.data.collator import Collator
from lightning_mm.execution.activation_checkpointing import unchanged_slices
from lightning_mm.execution.cache.collators import (
    ACTIVATIONS,
    CachedPrefixCollator,
    InseparableRowsError,
    merge_rows,
    split_row,
)
from lightning_mm.execution.cache.frozen_prefix import FrozenPrefix
from lightning_mm.execution.cache.store import RecordStore
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region
from lightning_mm.tuning.policy import TuningPlan

_MAX_PENDING = 16
"""Maximum number of rows being copied from the device to the host; a step waits for the oldest one beyond that."""


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
        refuse_other_choices(self, "model.cache")
        if self.limit <= 0:
            raise UserError(f"model.cache.limit: {self.limit} is out of range.", "It is in GiB.", "Give more than 0.")

    @property
    def path(self) -> Path:
        """Folder of the cache, shared by all runs."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(self.folder) if self.folder else Path(home) / "lightning_mm"


class RowCache:
    """Caches activations that do not change, by row; copies them from the device asynchronously.

    Args:
        store: The store on disk.
        storage_dtype: Storage dtype: 'float32', 'bfloat16' or 'int8'.
        dtype: dtype of the activations in a batch.
    """

    def __init__(self, store: RecordStore, storage_dtype: str, dtype: torch.dtype) -> None:
        self.store, self.storage_dtype, self.dtype = store, storage_dtype, dtype
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, Callable[[Tensor], None]]] = deque()

    def flush(self) -> None:
        """Write pending activations: a run resumed from here must find those that this run has used."""
        self._write_pending(0)
        self.store.flush()

    def close(self) -> None:
        """Write pending activations and close the store."""
        self._write_pending(0)
        self.store.close()

    def _new_rows(
        self, cached: CachedStates | CachedFeatures, compute: Callable[[Batch], Tensor | None]
    ) -> Iterator[tuple[int, Tensor | None]]:
        """Index and activations of each uncached row, rounded as the store returns them; they are cached, too.

        Args:
            cached: Of a batch.
            compute: Activations of a batch of one row, None where it has none; once for rows with the same key.
        """
        known: dict[str, Tensor | None] = {}
        for b, row, key, record in zip(cached.uncached_rows, cached.uncached, cached.keys, cached.records, strict=True):
            if key not in known:
                made = compute(row)
                known[key] = None if made is None else self._rounded(made)
                if made is None:
                    self.store.put(key, record)
                else:
                    self._enqueue(made, partial(self._put, key, record))
            yield b, known[key]

    def _put(self, key: str, record: Mapping[str, Tensor], made: Tensor) -> None:
        self.store.put(key, {**record, ACTIVATIONS: made})

    def _rounded(self, made: Tensor) -> Tensor:
        """The activations rounded as the store will return them, so that cached and new rows give equal results."""
        rounded = made
        if self.storage_dtype == "int8":
            scale = made.float().abs().amax(-1, keepdim=True) / 127
            rounded = (made / scale).nan_to_num(0.0).round().clamp(-127, 127) * scale
        elif self.storage_dtype == "bfloat16":
            rounded = made.bfloat16()
        return rounded.to(self.dtype).to(made.dtype)

    def _enqueue(self, made: Tensor, put: Callable[[Tensor], None]) -> None:
        """Copy activations to the host asynchronously; ``put`` is called with the copy once it is complete."""
        if made.device.type != "cuda":
            self._pending.append((made, None, put))
        else:
            host = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
            host.copy_(made, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._pending.append((host, arrived, put))
        self._write_pending(_MAX_PENDING)

    def _write_pending(self, waiting: int) -> None:
        while self._pending and (len(self._pending) > waiting or self._pending[0][1] is None):
            made, arrived, put = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            put(made)


class PrefixCache(RowCache):
    """Caches the input of the lowest trainable block, by row.

    Args:
        prefix: The model split at that block.
        store: The store on disk.
        storage_dtype: Storage dtype: 'float32', 'bfloat16' or 'int8'.
        dtype: dtype of the states in a batch.
    """

    def __init__(self, prefix: FrozenPrefix, store: RecordStore, storage_dtype: str, dtype: torch.dtype) -> None:
        super().__init__(store, storage_dtype, dtype)
        self.prefix = prefix

    def collator(self, collator: Collator) -> CachedPrefixCollator:
        """A collator that leaves out the images of cached rows."""
        return CachedPrefixCollator(collator, self.store, self.prefix.width, self.dtype)

    def states(self, cached: CachedStates) -> Tensor:
        """Hidden states (B, L, D) of all rows; those of uncached rows are computed and cached. Zeros at padding."""
        for b, row_TD in self._new_rows(cached, lambda row: self.prefix.states(row)[0]):
            assert row_TD is not None
            cached.states[b, : len(row_TD)] = row_TD
        return cached.states


def first_layer_above_prefix(plan: TuningPlan) -> int:
    """Index of the first block above the frozen prefix.

    Raises:
        UserError: A region below the blocks trains, so that their input changes with every step.
    """
    slices = unchanged_slices(plan)
    if not slices:
        trained = [
            region.value for region in (Region.VISION, Region.CONNECTOR, Region.EMBEDDING) if is_trained(plan, region)
        ]
        raise _no_prefix_error(f"{', '.join(trained)} trained: what enters the blocks changes at every step")
    return min(slices - 1, plan.num_layers - 1)


def is_trained(plan: TuningPlan, region: Region) -> bool:
    """Whether any weight of a region trains."""
    return plan.modes[region] != "frozen"


def split_verified_prefix(mm: MultimodalModel, plan: TuningPlan, batch: Batch, collator: Collator) -> FrozenPrefix:
    """The model split above its frozen prefix, proved to compute the same on a batch.

    Args:
        mm: The plain model.
        plan: Which weights train.
        batch: Rows with their images, on the model's device.
        collator: The model's collator.

    Raises:
        UserError: It does not, or the model or the batch cannot be split.
    """
    prefix = FrozenPrefix(mm, first_layer_above_prefix(plan))
    rows = [row for sample in batch.samples if (row := collator.collate_valid([sample], [])) is not None]
    pad = int(collator.processing.processor.tokenizer.pad_token_id)
    try:
        rest = merge_rows([split_row(row) for row in rows], batch.samples, pad)
    except InseparableRowsError as error:
        raise _no_prefix_error(str(error)) from error
    device = batch.regions.device
    prefix.verify(batch, [row.to(device) for row in rows], rest.to(device))
    return prefix


def _no_prefix_error(why: str) -> UserError:
    return UserError("There is no frozen prefix to cache.", why[0].upper() + why[1:] + ".", "--model.cache.mode off")
