"""The frozen vision tower apart: where the connector or the embedding trains, what the tower sees never changes.

Data flow: each row with its pictures -> ``FrozenTower.states``, what the tower's last block puts out -> kept by row ->
``FrozenTower.entering``: the model on grey pictures of the same sizes, its tower's blocks passed by, and these states
put out by the last one. What stands before and behind the blocks (patches, windows, feature selection, connector) is
the family's own.

Shapes: P patches of a row, D hidden size of the tower; a row's states are (n, P / n, D) or (P, D), as the family has
them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_mm.core.errors import UserError, first_line
from lightning_mm.data.batch import Batch, CachedFeatures
from lightning_mm.data.collator import Collator
from lightning_mm.execution.cache.activation_cache import RowCache
from lightning_mm.execution.cache.collators import FEATURES, FeatureCollator
from lightning_mm.execution.cache.frozen_prefix import (
    RUN_ERRORS,
    gap_between,
    outputs_of,
    own_randomness,
    untouched,
)
from lightning_mm.execution.cache.store import RecordStore
from lightning_mm.execution.loss import gathered_before, supervised_nll
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import replace_forward, skipped, uncompiled

_SAME = 1e-4
_COARSE = 3e-2
"""Relative to the largest feature: sums in another order, in float32 or in 16 bits. Other pictures change far more."""


class FrozenTower:
    """A model split at the output of its vision blocks.

    Args:
        model: The plain model.
        layout: Of it.
        unread: The topmost vision blocks, if nothing reads them and they are passed by anyway.
    """

    def __init__(self, mm: MultimodalModel, unread: Sequence[str] = ()) -> None:
        self.mm = mm
        read = [name for name in mm.layout.vision_blocks if name not in unread]
        if not read:
            raise _refusal("no vision blocks are known")
        self.top = read[-1]
        self.share, self.dtype = 0.0, torch.float32
        self._below = [mm.model.get_submodule(name) for name in read[:-1]]
        self._top = mm.model.get_submodule(self.top)
        self._layers = [mm.model.get_submodule(name) for name in mm.layout.layers]
        self._dim, self._in_tuple, self._layer_in_tuple = 0, False, False

    def __str__(self) -> str:
        return f"vision features ({self.share:.0%} of a forward pass)"

    @torch.no_grad()
    def states(self, row: Batch) -> Tensor | None:
        """What the last block puts out for one row; nothing where it has no picture."""
        head = self.mm.model.get_submodule(self.mm.layout.head)
        with (
            # What trains behind the tower may draw; whether a row is known must make no difference to later draws.
            own_randomness(row.regions.device),
            uncompiled(self.mm.model),
            outputs_of(self._top) as outputs,
            skipped(self._layers, self._layer_in_tuple),
            gathered_before(head, row.supervised[:0]),
        ):
            self.mm.model(**row.inputs, use_cache=False)
        # A weight that was cast here without a graph must not be found by what trains.
        torch.clear_autocast_cache()
        return torch.cat([_hidden(each) for each in outputs], self._dim) if outputs else None

    @contextmanager
    def entering(self, states: Sequence[Tensor | None]) -> Iterator[None]:
        """While active, the tower puts out these states, of the rows of a batch, whatever it is given."""
        having = [each for each in states if each is not None]
        joined = torch.cat(having, self._dim) if having else None

        def known(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if joined is None or joined.shape != hidden.shape:
                had = None if joined is None else tuple(joined.shape)
                raise _refusal(f"features of shape {had} are known, the tower has {tuple(hidden.shape)}")
            output = joined.to(hidden.dtype)
            return (output,) if self._in_tuple else output

        with skipped(self._below, self._in_tuple), ExitStack() as undo:
            replace_forward(undo, self._top, lambda _: known)
            yield

    @torch.no_grad()
    def verify(self, batch: Batch, grey: Batch, rows: Sequence[Batch]) -> None:
        """Compare with the whole model; nothing is left changed. Finds the tower's share of a forward pass, too.

        Args:
            batch: Rows with their pictures.
            grey: The same rows with grey ones.
            rows: Each of them alone, with its pictures.

        Raises:
            UserError: They are not the same, or the model needs more of the tower than its last block's output.
        """
        head = self.mm.model.get_submodule(self.mm.layout.head)
        with untouched(self.mm.model, batch.regions.device):
            try:
                with (
                    outputs_of(self._top) as outputs,
                    outputs_of(self._layers[-1]) as last,
                    FlopCounterMode(display=False) as all_flops,
                ):
                    whole = supervised_nll(self.mm.model, head, batch).nll
                if len(outputs) != 1:
                    raise _refusal(f"the tower runs {len(outputs)} times on a batch")
                self._in_tuple, self._layer_in_tuple = isinstance(outputs[0], tuple), isinstance(last[0], tuple)
                with FlopCounterMode(display=False) as tower_flops:
                    states = [self.states(row) for row in rows]
                self._dim = _joint(states, _hidden(outputs[0]))
                with self.entering(states):
                    halves = supervised_nll(self.mm.model, head, grey).nll
            except RUN_ERRORS as error:
                raise _refusal(
                    f"the model needs more than what its last block puts out: {first_line(error)}"
                ) from error
        self.dtype = _hidden(outputs[0]).dtype
        gap = gap_between(whole, halves, self.dtype)
        if gap:
            raise _refusal(f"the loss of one batch differs by {gap:.2g} of itself with the tower left out")
        self.share = tower_flops.get_total_flops() / max(all_flops.get_total_flops(), 1)


class FeatureCache(RowCache):
    """What the vision tower makes of pictures, kept by row.

    Args:
        tower: The model, split behind it.
        store: Where it is kept.
        kept: As what: float32, bfloat16 or int8.
        dtype: Of the features in a batch.
    """

    def __init__(self, tower: FrozenTower, store: RecordStore, kept: str, dtype: torch.dtype) -> None:
        super().__init__(store, kept, dtype)
        self.tower = tower

    def collator(self, collator: Collator) -> FeatureCollator:
        """A collator that decodes no picture of rows that are known."""
        return FeatureCollator(collator, self.store, self.dtype)

    def states(self, kept: CachedFeatures) -> list[Tensor | None]:
        """Of every row; those that were not known are computed and kept."""
        states = list(kept.states)
        for b, row, key, record in zip(kept.uncached_rows, kept.uncached, kept.keys, kept.records, strict=True):
            made = self.tower.states(row)
            if made is None:
                self.store.put(key, record)
                continue
            states[b] = self._rounded(made)
            self._keep(made, partial(self._put, key, record))
        return states

    def _put(self, key: str, record: Mapping[str, Tensor], made: Tensor) -> None:
        self.store.put(key, {**record, FEATURES: made})


def verified_tower(mm: MultimodalModel, unread: Sequence[str], batch: Batch, collator: Collator) -> FrozenTower:
    """The model split behind its vision tower, shown to give the same loss on a batch.

    Args:
        mm: The plain model, its tower frozen.
        unread: Vision blocks that are passed by anyway.
        batch: Some rows with pictures, on the model's device.
        collator: Of the model.

    Raises:
        UserError: It does not, or cannot be split.
    """
    device = batch.regions.device
    tower = FrozenTower(mm, unread)
    rows = [collator.collate_valid([sample], []) for sample in batch.samples]
    grey = collator.collate_valid(batch.samples, [], blank_images=True)
    if grey is None or not batch.has_images:
        raise _refusal("no picture is in the data")
    tower.verify(batch, grey.to(device), [row.to(device) for row in rows if row is not None])
    return tower


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _joint(states: Sequence[Tensor | None], whole: Tensor) -> int:
    """Along which dimension the states of rows are those of their batch."""
    having = [each for each in states if each is not None]
    if len(having) < 2:
        raise _refusal("one row with pictures does not show how rows stand side by side")
    for dim in range(whole.ndim - 1):
        others = [each.shape[:dim] + each.shape[dim + 1 :] for each in (*having, whole)]
        if len(set(others)) == 1 and sum(each.shape[dim] for each in having) == whole.shape[dim]:
            gap = float((torch.cat(having, dim).float() - whole.float()).abs().max())
            scale = float(whole.float().abs().max())
            exact = whole.dtype == torch.float32 and not torch.is_autocast_enabled(whole.device.type)
            if gap <= (_SAME if exact else _COARSE) * scale:
                return dim
            raise _refusal(f"what it makes of a picture changes by {gap / scale:.2g} with those beside it")
    raise _refusal(f"the features of a batch, {tuple(whole.shape)}, are not those of its rows side by side")


def _refusal(why: str) -> UserError:
    return UserError("The vision tower cannot be left out.", why[0].upper() + why[1:] + ".", "--model.cache.mode off")
