"""The cache of the frozen vision tower's features, for runs in which the connector or the embedding trains.

Data flow: each row with its images -> ``FrozenTower.states``, the outputs of the blocks that the model reads -> cached
by row -> ``FrozenTower.starting_from``: the model on blank images of the same sizes, the tower's blocks skipped, those
that are read returning these states. Everything before and after the blocks (patches, windows, feature selection,
connector) is computed by the model's own code.

Most models read one block, their tower's last or last but one. A list in ``vision_feature_layer`` reads several, and so
do models that add the states of lower blocks to the decoder's (Qwen3-VL).

Shapes: P patches of a row, n images or tiles of a row, K blocks that are read, D hidden size of the tower; a row's
states are (n, P / n, D) or (P, D), depending on the model family, and (n, P / n, K, D) or (P, K, D) where K > 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_mm.core.errors import UserError, first_line
from lightning_mm.data.batch import Batch, CachedFeatures
from lightning_mm.data.collator import Collator
from lightning_mm.execution.cache.activation_cache import RowCache
from lightning_mm.execution.cache.collators import CachedVisionCollator
from lightning_mm.execution.cache.frozen_prefix import fork_rng, record_inputs, record_outputs, temporary_eval_mode
from lightning_mm.execution.cache.proof import (
    FORWARD_ERRORS,
    decoder_states,
    differs,
    poisoned,
    poisoned_pixels,
    relative_gap,
    rounding_bound,
    structure_gap,
)
from lightning_mm.execution.cache.store import RecordStore
from lightning_mm.execution.loss import select_positions_before_head, supervised_nll
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import Forward, replace_forward, skipped, uncompiled
from lightning_mm.tuning.unused_parameters import blocks_read_directly


class FrozenTower:
    """A model split at the outputs of its vision blocks.

    Args:
        mm: The plain model.
        unread: Module names of the topmost vision blocks that are skipped because nothing reads them; none by default.
    """

    def __init__(self, mm: MultimodalModel, unread: Sequence[str] = ()) -> None:
        self.mm = mm
        read = [name for name in mm.layout.vision_blocks if name not in unread]
        if not read:
            raise _refusal("no vision blocks are known")
        self.read: tuple[str, ...] = (read[-1],)
        self.share, self.dtype = 0.0, torch.float32
        self._computed = read
        self._layers = [mm.model.get_submodule(name) for name in mm.layout.layers]
        self._dim, self._in_tuple, self._layer_in_tuple, self._keeps_shape = 0, False, False, True

    def __str__(self) -> str:
        return f"vision features ({self.share:.0%} of a forward pass)"

    @torch.no_grad()
    def states(self, row: Batch) -> Tensor | None:
        """Outputs of the blocks that are read for one row; None if the row has no image."""
        head = self.mm.model.get_submodule(self.mm.layout.head)
        with (
            # Trained modules after the tower may draw random numbers; caching must not change later draws.
            fork_rng(row.regions.device),
            uncompiled(self.mm.model),
            self._recorded() as outputs,
            skipped(self._layers, self._layer_in_tuple),
            select_positions_before_head(head, row.supervised[:0]),
        ):
            self.mm.model(**row.inputs, use_cache=False)
        # Autocast must not reuse in training a weight that was cast here without a graph.
        torch.clear_autocast_cache()
        runs = [_stacked(each) for each in zip(*outputs, strict=True)]
        return torch.cat(runs, self._dim) if runs else None

    @contextmanager
    def _recorded(self) -> Iterator[list[list[Any]]]:
        """While active, the outputs of every block that is read are appended to its list."""
        with ExitStack() as stack:
            yield [stack.enter_context(record_outputs(self.mm.model.get_submodule(name))) for name in self.read]

    @contextmanager
    def starting_from(self, states: Sequence[Tensor | None]) -> Iterator[None]:
        """While active, the blocks that are read return these states and the others are skipped.

        Args:
            states: States of each row of a batch; None for rows without images.
        """
        present = [each for each in states if each is not None]
        joined = torch.cat(present, self._dim) if present else None
        by_block = [None] * len(self.read) if joined is None else _unstacked(joined, len(self.read))
        with skipped(self._unread(), self._in_tuple), self._returning(by_block):
            yield

    def _unread(self) -> list[nn.Module]:
        """The blocks that are computed and not read."""
        return [self.mm.model.get_submodule(name) for name in self._computed if name not in self.read]

    @contextmanager
    def _returning(self, by_block: Sequence[Tensor | None]) -> Iterator[None]:
        """While active, the blocks that are read return these states."""
        with ExitStack() as undo:
            for name, known in zip(self.read, by_block, strict=True):
                replace_forward(undo, self.mm.model.get_submodule(name), partial(self._known_forward, known))
            yield

    def _known_forward(self, known: Tensor | None, _: Forward) -> Forward:
        return partial(self._known, known)

    def _known(self, known: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """What a block returns whose output is known."""
        hidden = args[0] if args else kwargs["hidden_states"]
        same = hidden.ndim if self._keeps_shape else 1  # convolutions keep the number of images or tiles only
        if known is None or known.shape[:same] != hidden.shape[:same]:
            shape = None if known is None else tuple(known.shape)
            raise _refusal(f"features of shape {shape} are known, the tower has {tuple(hidden.shape)}")
        output = known.to(self.dtype)
        return (output,) if self._in_tuple else output

    @torch.no_grad()
    def verify(self, batch: Batch, grey: Batch, rows: Sequence[Batch]) -> None:
        """Prove that the model on known features computes what the whole model does; it is left unchanged.

        With the outputs of the blocks that are read put back, pixels and all other blocks giving NaN, what enters and
        what leaves the decoder must be the same; and the features of each row computed alone must be those of the row
        in the batch, up to rounding. Measures the tower's share of FLOPs.

        Args:
            batch: Rows with their images.
            grey: The same rows with blank images.
            rows: One batch per row, with its images.

        Raises:
            UserError: They do not, or the model needs more of the tower than its blocks' outputs.
        """
        ends, device = (0, self.mm.layout.num_layers), batch.regions.device
        with temporary_eval_mode(self.mm.model, device):
            try:
                self.read = blocks_read_directly(
                    self.mm.model, self._computed, lambda: supervised_nll(self.mm.model, self.mm.head, batch).nll
                )
                with (
                    self._recorded() as outputs,
                    record_inputs(self.mm.model.get_submodule(self.read[-1])) as entering,
                    record_outputs(self._layers[-1]) as last,
                    FlopCounterMode(display=False) as all_flops,
                ):
                    whole = decoder_states(self.mm, batch, ends)
                if len(outputs[-1]) != 1:
                    raise _refusal(f"the tower runs {len(outputs[-1])} times on a batch")
                together = [each for (each,) in outputs]
                self._in_tuple, self._layer_in_tuple = isinstance(together[0], tuple), isinstance(last[0], tuple)
                own = [_hidden_states(each) for each in together]
                if len({each.shape for each in own}) > 1:
                    raise _refusal(f"the blocks that are read put out {' and '.join(str(tuple(x.shape)) for x in own)}")
                again = decoder_states(self.mm, batch, ends)
                self._keeps_shape, self.dtype = own[-1].shape == entering[0].shape, own[-1].dtype
                with poisoned(self._unread(), self._in_tuple), self._returning(own):
                    halves = decoder_states(self.mm, poisoned_pixels(grey), ends)
                with FlopCounterMode(display=False) as tower_flops:
                    states = [self.states(row) for row in rows]
            except FORWARD_ERRORS as error:
                raise _refusal(f"the model needs more than what its blocks put out: {first_line(error)}") from error
        if gap := structure_gap(whole, again, halves):
            raise _refusal(
                f"what leaves the decoder {differs(gap)} with the tower left out: it reads more than what is kept"
            )
        bound = rounding_bound(self.dtype, device.type, max(own[0].shape[1:]), len(self._computed))
        self._dim = _row_dim(states, _stacked(together), bound)
        self.share = tower_flops.get_total_flops() / max(all_flops.get_total_flops(), 1)


class FeatureCache(RowCache):
    """Caches the vision tower's features, by row.

    Args:
        tower: The model split after its vision blocks.
        store: The store on disk.
        storage_dtype: Storage dtype: 'float32', 'bfloat16' or 'int8'.
        dtype: dtype of the features in a batch.
    """

    def __init__(self, tower: FrozenTower, store: RecordStore, storage_dtype: str, dtype: torch.dtype) -> None:
        super().__init__(store, storage_dtype, dtype)
        self.tower = tower

    def collator(self, collator: Collator) -> CachedVisionCollator:
        """A collator that does not decode the images of cached rows."""
        return CachedVisionCollator(collator, self.store, self.dtype)

    def states(self, cached: CachedFeatures) -> list[Tensor | None]:
        """Features of every row, None for rows without images; those of uncached rows are computed and cached."""
        states = list(cached.states)
        for b, made in self._new_rows(cached, self.tower.states):
            states[b] = made
        return states


def split_verified_tower(mm: MultimodalModel, unread: Sequence[str], batch: Batch, collator: Collator) -> FrozenTower:
    """The model split after its vision blocks, proved to compute the same on a batch.

    Args:
        mm: The plain model, its vision tower frozen.
        unread: Module names of vision blocks that are skipped because nothing reads them.
        batch: Rows with images, two or more, on the model's device.
        collator: The model's collator.

    Raises:
        UserError: It does not, or the model cannot be split.
    """
    device = batch.regions.device
    tower = FrozenTower(mm, unread)
    rows = [collator.collate_valid([sample], []) for sample in batch.samples]
    grey = collator.collate_valid(batch.samples, [], blank_images=True)
    if grey is None or not batch.has_images:
        raise _refusal("no picture is in the data")
    tower.verify(batch, grey.to(device), [row.to(device) for row in rows if row is not None])
    return tower


def _hidden_states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _stacked(outputs: Sequence[Tensor | tuple[Tensor, ...]]) -> Tensor:
    """The blocks' hidden states (..., K, D); those of one block (..., D) are left as they are."""
    states = [_hidden_states(each) for each in outputs]
    return states[0] if len(states) == 1 else torch.stack(states, -2)


def _unstacked(states: Tensor, blocks: int) -> Sequence[Tensor]:
    """What ``_stacked`` was given, for this number of blocks."""
    return [states] if blocks == 1 else [each.contiguous() for each in states.unbind(-2)]


def _row_dim(states: Sequence[Tensor | None], whole: Tensor, bound: float) -> int:
    """Dimension along which the rows' states, concatenated, equal the batch's states.

    Args:
        states: States of each row, run alone; None for rows without images.
        whole: States of the batch.
        bound: Largest relative difference that rounding explains.
    """
    present = [each for each in states if each is not None]
    if len(present) < 2:
        raise _refusal("one row with pictures does not show how rows stand side by side")
    for dim in range(whole.ndim - 1):
        others = [each.shape[:dim] + each.shape[dim + 1 :] for each in (*present, whole)]
        if len(set(others)) == 1 and sum(each.shape[dim] for each in present) == whole.shape[dim]:
            gap = relative_gap(whole, torch.cat(present, dim))
            if gap <= bound:
                return dim
            raise _refusal(f"what it makes of a picture changes by {gap:.2g} with those beside it")
    raise _refusal(f"the features of a batch, {tuple(whole.shape)}, are not those of its rows side by side")


def _refusal(why: str) -> UserError:
    return UserError("The vision tower cannot be left out.", why[0].upper() + why[1:] + ".", "--model.cache.mode off")
