"""How a batch becomes a loss: without padding inside the blocks, from cached activations where they are known.

Data flow: Batch -> ``TrainingStep.objective`` -> summed NLL. ``open_cache`` finds out once, when a fit starts, whether
frozen activations can and shall be cached; ``collate_function`` then leaves out what is cached.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, CachedFeatures
from lightning_mm.data.collator import Collator
from lightning_mm.execution.activation_checkpointing import unchanged_slices
from lightning_mm.execution.cache.activation_cache import CacheSettings, PrefixCache, verified
from lightning_mm.execution.cache.fingerprint import open_store
from lightning_mm.execution.cache.frozen_prefix import FrozenPrefix
from lightning_mm.execution.cache.store import RecordStore
from lightning_mm.execution.cache.vision_features import FeatureCache, FrozenTower, verified_tower
from lightning_mm.execution.loss import Objective, supervised_nll
from lightning_mm.execution.prepare import Compute, apply_techniques
from lightning_mm.execution.vision_truncation import truncate_tower
from lightning_mm.models.attention.varlen import RealTokens, unpadded
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region
from lightning_mm.tuning.policy import TuningPlan

_WORTH = 1.2
"""From so many epochs on, keeping what enters the boundary pays for writing it."""

_TOWER_SHARE = 0.1
"""Of a forward pass: below it, reading features from disk saves nothing that shows."""

_ROWS = 3
"""So many rows show that what the tower makes of one does not hang on those beside it."""


class TrainingStep:
    """One model under one plan, prepared to be trained.

    Args:
        model: Frozen and adapted as planned; its blocks are prepared in place.
        layout: Of it.
        plan: What trains.
        compute: How a step is computed.
        checkpointing: Whether blocks are recomputed in backward.
    """

    def __init__(
        self,
        mm: MultimodalModel,
        plan: TuningPlan,
        compute: Compute,
        checkpointing: bool,
        precision: str | None = None,
    ) -> None:
        self.mm, self.plan, self.compute = mm, plan, compute
        self.checkpointing, self.precision = checkpointing, precision
        self.cache: PrefixCache | FeatureCache | None = None
        self.prefix: FrozenPrefix | None = None
        self._asked = False
        self._undo: ExitStack | None = None
        self.open()

    def open(self) -> None:
        """Prepare the model, if it is not prepared."""
        if self._undo is None:
            self._undo = apply_techniques(self.mm, self.plan, self.compute, self.checkpointing, self.precision)

    def objective(self, batch: Batch) -> Objective:
        """Summed NLL of a batch."""
        head = self.mm.head
        with self._begun(batch), unpadded(self._tokens(batch)):
            return supervised_nll(self.mm.model, head, batch, self.compute.loss_chunk)

    def open_cache(
        self,
        settings: CacheSettings,
        collator: Collator,
        example: Callable[[int], Batch],
        epochs: float,
        facts: dict[str, Any],
    ) -> None:
        """Find out, once, whether frozen activations can and shall be cached; open their store if so.

        Args:
            settings: As configured.
            collator: Makes the model's batches.
            example: Returns a batch of the given number of rows, on the model's device, to verify with.
            epochs: How often each row is seen.
            facts: What else the activations depend on.

        Raises:
            UserError: The cache is asked for (mode 'on') and not possible.
        """
        if self._asked:
            return
        self._asked = True
        assert self._undo is not None, "the cache is opened while the model is prepared"
        batch = example(1)
        unread = truncate_tower(self.mm, batch, self._undo)
        try:
            if settings.mode == "off":
                pass
            elif self.plan.modes[Region.VISION] == "frozen" and not unchanged_slices(self.plan):
                self._keep_features(settings, collator, example(_ROWS), unread, epochs, facts)
            else:
                self._keep_prefix(settings, collator, batch, epochs, facts)
        except UserError as error:
            if settings.mode == "on":
                raise
            log_decision("model.cache", "off", error.why)

    def collate_function(self, collator: Collator) -> Callable[..., Batch]:
        """What makes batches: the collator, or where the cache is open, one that leaves out what is cached."""
        if self.cache is None:
            return collator
        if isinstance(self.cache, FeatureCache):
            return self.cache.collator(collator)
        return self.cache.collator(collator, self._width)

    def flush(self) -> None:
        """Write what is on its way: a checkpoint is being saved."""
        if self.cache is not None:
            self.cache.flush()

    def close_cache(self) -> None:
        """Write what is on its way; from now on every batch is computed whole."""
        if self.cache is not None:
            self.cache.close()
            self.cache = None

    def close(self) -> None:
        """Close the cache and take everything off the model that preparing it has put on."""
        self.close_cache()
        if self._undo is not None:
            self._undo.close()
            self._undo = None

    def _keep_prefix(
        self, settings: CacheSettings, collator: Collator, batch: Batch, epochs: float, facts: dict[str, Any]
    ) -> None:
        pad = int(collator.processing.processor.tokenizer.pad_token_id)
        prefix = self.prefix = verified(self.mm, self.plan, batch, pad)
        states = prefix.states(batch)
        self._width = states.shape[-1]
        opened = self._opened(settings, prefix, collator, epochs, facts, states.dtype)
        if opened is not None:
            self.cache = PrefixCache(prefix, *opened)

    def _keep_features(
        self,
        settings: CacheSettings,
        collator: Collator,
        batch: Batch,
        unread: tuple[str, ...],
        epochs: float,
        facts: dict[str, Any],
    ) -> None:
        tower = verified_tower(self.mm, unread, batch, collator)
        if settings.mode == "auto" and tower.share < _TOWER_SHARE:
            why = f"the tower, all that is frozen below what trains, is {tower.share:.0%} of a forward pass"
            log_decision("model.cache", "off", why)
            return
        opened = self._opened(settings, tower, collator, epochs, facts, tower.dtype)
        if opened is not None:
            self.cache = FeatureCache(tower, *opened)

    def _opened(
        self,
        settings: CacheSettings,
        part: FrozenPrefix | FrozenTower,
        collator: Collator,
        epochs: float,
        facts: dict[str, Any],
        dtype: torch.dtype,
    ) -> tuple[RecordStore, str, torch.dtype] | None:
        """The store, how it keeps, and the type of states in a batch; nothing where it is not worth it."""
        exact = dtype == torch.float32 and not torch.is_autocast_enabled(facts["device"])
        kept = ("float32" if exact else "bfloat16") if settings.dtype == "auto" else settings.dtype
        store = open_store(settings, part, collator.processing, facts, kept)
        if settings.mode == "auto" and epochs < _WORTH and not len(store):
            log_decision(
                "model.cache", "off", f"each row is seen {epochs:.1f} times, and none is kept from another run"
            )
            store.close()
            return None
        held = f"{len(store)} rows, {store.bytes / 2**30:.2f} GiB" if len(store) else "empty"
        log_decision("model.cache", f"{part}, in {kept}", f"{held}; {store.folder}")
        return store, kept, torch.float32 if exact else torch.bfloat16

    def _tokens(self, batch: Batch) -> RealTokens | None:
        return RealTokens(batch.real, *batch.regions.shape) if self.compute.packing else None

    def _begun(self, batch: Batch) -> AbstractContextManager[None]:
        if batch.cached is None:
            return nullcontext()
        assert self.cache is not None, "batches without pixels are made for a cache"
        if isinstance(batch.cached, CachedFeatures):
            assert isinstance(self.cache, FeatureCache), "features are kept for one"
            with unpadded(None):
                return self.cache.tower.entering(self.cache.states(batch.cached))
        assert isinstance(self.cache, PrefixCache), "states are kept for one"
        fresh = batch.cached.uncached
        with unpadded(None if fresh is None else self._tokens(fresh)):
            states = self.cache.states(batch.cached)
        return self.cache.prefix.entering(states)
