"""One training step: from a batch to its loss, without padding inside the blocks and with cached activations.

Data flow: Batch -> ``TrainingStep.objective`` -> summed NLL. ``open_cache`` decides once, when a fit starts, whether
frozen activations are cached; batches from ``wrap_collator`` then leave out the pixels of cached rows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, CachedFeatures
from lightning_mm.data.collator import Collator
from lightning_mm.execution.activation_checkpointing import unchanged_slices
from lightning_mm.execution.balancing import balancing_coefficient
from lightning_mm.execution.cache.activation_cache import CacheSettings, PrefixCache, split_verified_prefix
from lightning_mm.execution.cache.fingerprint import open_store
from lightning_mm.execution.cache.frozen_prefix import FrozenPrefix, temporary_eval_mode
from lightning_mm.execution.cache.store import RecordStore, StorageDtype
from lightning_mm.execution.cache.vision_features import FeatureCache, FrozenTower, split_verified_tower
from lightning_mm.execution.loss import LossOutput, supervised_nll
from lightning_mm.execution.prepare import Compute, apply_techniques
from lightning_mm.execution.shared_images import encode_images_once, keep_last_image, verify_sharing
from lightning_mm.execution.step_proof import StepProof, prove_step
from lightning_mm.execution.vision_truncation import truncate_tower
from lightning_mm.models.attention.varlen import RealTokens, unpadded
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region
from lightning_mm.tuning.policy import TuningPlan

_MIN_EPOCHS = 1.2
"""Number of epochs from which on caching activations pays for writing them."""

_MIN_TOWER_SHARE = 0.1
"""Share of a forward pass's FLOPs below which reading the tower's features from disk saves no measurable time."""

_NUM_VERIFIED_ROWS = 3
"""Rows in the batch that proves that what is cached of a row does not depend on the other rows."""

_SUSPECTS = (("cpu_kernels",), ("packing",), ("cpu_kernels", "packing"))
"""Options of ``Compute`` that are switched off, in this order, until the step computes the family's own losses."""


class TrainingStep:
    """One model under one tuning plan, prepared for training steps.

    Args:
        mm: The model, frozen and adapted as planned; its blocks are prepared in place.
        plan: Which weights train.
        compute: Settings of the computation.
        checkpointing: Whether blocks are recomputed in backward.
        precision: ``trainer.precision``; None (default) outside of a run: frozen weights keep their dtype.
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
        self.balancing = balancing_coefficient(mm, plan)
        self.cache: PrefixCache | FeatureCache | None = None
        self.prefix: FrozenPrefix | None = None
        self._cache_decided = False
        self._undo: ExitStack | None = None
        self.open()

    def open(self) -> None:
        """Prepare the model for training steps, unless it is prepared already."""
        if self._undo is None:
            self._undo = apply_techniques(self.mm, self.plan, self.compute, self.checkpointing, self.precision)

    def objective(self, batch: Batch) -> LossOutput:
        """Loss of a batch, summed over its supervised tokens."""
        head = self.mm.head
        with self._apply_cached(batch), unpadded(self._tokens(batch)), encode_images_once(self.mm, batch):
            return supervised_nll(self.mm.model, head, batch, self.compute.loss_chunk, self.balancing)

    def prove(self, batch: Batch) -> None:
        """Prove on rows of the run that the prepared step computes the family's own losses; switch off what does not.

        Args:
            batch: Rows on the model's device, as different as the run has them.

        Raises:
            UserError: The losses differ with every option switched off.
        """
        if not batch.num_supervised:
            return
        asked, first = self.compute, self._proved(batch)
        proof, off, suspects = first, tuple[str, ...](), list(_SUSPECTS)
        while not proof.holds and suspects:
            self.close()
            off = suspects.pop(0)
            kernels, packing = (getattr(asked, name) and name not in off for name in ("cpu_kernels", "packing"))
            self.compute = replace(asked, cpu_kernels=kernels, packing=packing)
            self.open()
            proof = self._proved(batch)
        said = f"losses of {first.tokens} tokens differ by {first.gap:.2g} nats from the family's own forward pass"
        bound = f"rounding allows {first.allowed:.2g}"
        if not proof.holds:
            raise UserError(
                "The prepared step does not compute this model's loss.",
                f"On rows of this run {said} (root mean square; {bound}), also with {' and '.join(off)} off.",
                "Report the model's type; a run on another loss than the model's is not begun.",
            )
        for name in off:
            log_decision(f"model.compute.{name}", "off", f"with it {said}; {bound}")

    def _proved(self, batch: Batch) -> StepProof:
        with temporary_eval_mode(self.mm.model, batch.regions.device):
            proof = prove_step(self.mm, batch, self.objective)
        for name, why in proof.padded.items():
            log_decision("model.compute.packing", f"{name} stays padded", why)
        if not proof.finite:
            log_decision("model.compute", "not proved", "the model's own losses of rows of this run are not finite")
        return proof

    def open_cache(
        self,
        settings: CacheSettings,
        collator: Collator,
        example: Callable[[int], Batch],
        epochs: float,
        facts: dict[str, Any],
    ) -> None:
        """Decide, on the first call, whether frozen activations are cached; open their store if so.

        Args:
            settings: The cache's settings.
            collator: Makes the model's batches.
            example: Returns a batch of the given number of rows, on the model's device, to verify the cache with.
            epochs: How often each row is seen during training.
            facts: What the activations depend on beside weights, config and processor; ``device`` is required.

        Raises:
            UserError: The cache is required (mode 'on') and not possible.
        """
        if self._cache_decided:
            return
        self._cache_decided = True
        assert self._undo is not None, "the cache is opened while the model is prepared"
        unread = truncate_tower(self.mm, example(1), self._undo)
        try:
            if settings.mode == "off":
                pass
            elif self.plan.modes[Region.VISION] == "frozen" and not unchanged_slices(self.plan):
                self._cache_vision_features(settings, collator, example(_NUM_VERIFIED_ROWS), unread, epochs, facts)
            else:
                self._cache_prefix(settings, collator, example(_NUM_VERIFIED_ROWS), epochs, facts)
        except UserError as error:
            if settings.mode == "on":
                raise
            log_decision("model.cache", "off", error.why)

    def verify_sharing(self, batch: Batch) -> None:
        """Prove that rows which share pictures train as if each stood alone.

        Args:
            batch: Rows of the run on the model's device; nothing is to be proved where they share nothing.

        Raises:
            UserError: They do not, or packing is off.
        """
        if batch.shared is None:
            return
        if self.balancing is not None:
            why = "The loss that balances experts counts every token of every row."
            raise UserError("data.share_images is not possible here.", why, "Leave data.share_images off.")
        if not self.compute.packing:
            why = "What rows share is left out of a block with the padding, and model.compute.packing is off."
            raise UserError("data.share_images is not possible here.", why, "Leave model.compute.packing on.")
        exact = self.mm.transformers.dtype == torch.float32 and not torch.is_autocast_enabled(batch.regions.device.type)
        with temporary_eval_mode(self.mm.model, batch.regions.device):
            verify_sharing(self.mm, batch, lambda given: self.objective(given).token_nll, exact)

    @property
    def cache_decided(self) -> bool:
        """Whether ``open_cache`` was called since the model was prepared."""
        return self._cache_decided

    def wrap_collator(self, collator: Collator) -> Callable[..., Batch]:
        """The collator, or if the cache is open, one that leaves out what is cached."""
        if self.cache is None:
            return collator
        if isinstance(self.cache, FeatureCache):
            return self.cache.collator(collator)
        return self.cache.collator(collator)

    def flush(self) -> None:
        """Write pending activations to disk, as when a checkpoint is saved."""
        if self.cache is not None:
            self.cache.flush()

    def close_cache(self) -> None:
        """Write pending activations and close the cache; later batches are computed without it."""
        if self.cache is not None:
            self.cache.close()
            self.cache = None

    def close(self) -> None:
        """Close the cache and undo the preparation of the model; a later fit decides anew about the cache."""
        self.close_cache()
        self._cache_decided = False
        if self._undo is not None:
            self._undo.close()
            self._undo = None

    def _cache_prefix(
        self, settings: CacheSettings, collator: Collator, batch: Batch, epochs: float, facts: dict[str, Any]
    ) -> None:
        if self.balancing is not None:
            why = "The loss that balances experts needs the routers of all layers."
            raise UserError("model.cache: not possible here.", why, "Set model.cache.mode off.")
        prefix = self.prefix = split_verified_prefix(self.mm, self.plan, batch, collator)
        opened = self._open_store(settings, prefix, collator, epochs, facts, prefix.dtype)
        if opened is not None:
            self.cache = PrefixCache(prefix, *opened)

    def _cache_vision_features(
        self,
        settings: CacheSettings,
        collator: Collator,
        batch: Batch,
        unread: tuple[str, ...],
        epochs: float,
        facts: dict[str, Any],
    ) -> None:
        tower = split_verified_tower(self.mm, unread, batch, collator)
        if settings.mode == "auto" and tower.share < _MIN_TOWER_SHARE:
            why = f"the tower, all that is frozen below what trains, is {tower.share:.0%} of a forward pass"
            log_decision("model.cache", "off", why)
            return
        opened = self._open_store(settings, tower, collator, epochs, facts, tower.dtype)
        if opened is not None:
            self.cache = FeatureCache(tower, *opened)

    def _open_store(
        self,
        settings: CacheSettings,
        part: FrozenPrefix | FrozenTower,
        collator: Collator,
        epochs: float,
        facts: dict[str, Any],
        dtype: torch.dtype,
    ) -> tuple[RecordStore, StorageDtype, torch.dtype] | None:
        """The store, its storage dtype and the dtype of states in a batch; None if caching does not pay."""
        exact = dtype == torch.float32 and not torch.is_autocast_enabled(facts["device"])
        storage_dtype: StorageDtype = (
            ("float32" if exact else "bfloat16") if settings.dtype == "auto" else settings.dtype
        )
        facts = {**facts, "video_frames": collator.video_frames, "liger": self.compute.liger}
        store = open_store(settings, part, collator.processing, facts, storage_dtype)
        if settings.mode == "auto" and epochs < _MIN_EPOCHS and not len(store):
            log_decision(
                "model.cache", "off", f"each row is seen {epochs:.1f} times, and none is kept from another run"
            )
            store.close()
            return None
        contents = f"{len(store)} rows, {store.bytes / 2**30:.2f} GiB" if len(store) else "empty"
        log_decision("model.cache", f"{part}, in {storage_dtype}", f"{contents}; {store.folder}")
        return store, storage_dtype, torch.float32 if exact else torch.bfloat16

    def _tokens(self, batch: Batch) -> RealTokens | None:
        if not self.compute.packing or self.balancing is not None:
            return None
        return RealTokens(batch.real, len(batch), batch.regions.shape[1], batch.shared)

    def _apply_cached(self, batch: Batch) -> AbstractContextManager[None]:
        if batch.cached is None:
            return nullcontext()
        assert self.cache is not None, "the batch has cached states, but no cache is open"
        # Rows that are not cached are computed alone: there is no padding, and of what rows share only the picture.
        with unpadded(None), keep_last_image(self.mm, batch):
            if isinstance(batch.cached, CachedFeatures):
                assert isinstance(self.cache, FeatureCache), "vision features belong to a feature cache"
                return self.cache.tower.starting_from(self.cache.states(batch.cached))
            assert isinstance(self.cache, PrefixCache), "hidden states belong to a prefix cache"
            return self.cache.prefix.starting_from(self.cache.states(batch.cached))
