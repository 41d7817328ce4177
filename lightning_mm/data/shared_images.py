"""Rows about the same pictures side by side, so that what they have in common is computed once.

Rows are never changed: each sees its pictures and its own text, as if it stood alone, and its loss and gradients are
the same. What several rows of a picture begin with (system prompt, picture, start of the question) is computed by the
first of them only; see ``models.attention.varlen``.

Data flow: ``RowTable`` -> ``ImageGroups``, a sequence of groups of rows, which loaders shuffle in place of rows -> the
collator on the rows of several groups -> ``share_prefixes`` -> ``Batch.shared``.

Shapes: B rows, L tokens after padding, N rows of a table, G groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import overload

import numpy as np
import torch
import xxhash
from torch import Tensor

from lightning_mm.core.decisions import log_decision
from lightning_mm.data.batch import Batch, SharedPrefix, TokenRegion
from lightning_mm.data.row_table import Indices, RowTable
from lightning_mm.data.sample import Sample

Group = tuple[Sample, ...]


class ImageGroups(Sequence[Group]):
    """Rows of a table in groups that have the same pictures.

    Rows without pictures, or with videos, are groups of their own. A group with more rows than ``max_rows`` is divided
    into equal parts, in the order of its rows.

    Args:
        table: N rows.
        max_rows: Most rows of a group; None: no limit.

    Attributes:
        groups: (G,) rows of each group, by the first of them.
        per_source: Number of groups of each of the table's sources.
    """

    def __init__(self, table: RowTable, max_rows: int | None = None) -> None:
        self.table = table
        self.groups: list[Indices] = []
        sources = table.source_of_rows()
        keys = table.image_keys()
        order = np.lexsort((np.arange(len(table)), keys, sources))
        together = np.flatnonzero((np.diff(keys[order]) != 0) | (np.diff(sources[order]) != 0)) + 1
        for rows in np.split(order, together) if len(order) else []:
            is_shared = keys[rows[0]] != 0
            parts = -(-len(rows) // (max_rows or len(rows))) if is_shared else len(rows)
            self.groups += np.array_split(rows, parts)
        self.groups.sort(key=lambda rows: (sources[rows[0]], rows[0]))
        self.per_source = np.bincount([sources[rows[0]] for rows in self.groups], minlength=len(table.sources)).tolist()

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return tuple(self.table[int(row)] for row in self.groups[index])

    @property
    def fingerprint(self) -> int:
        """Digest of the rows, their order and their groups, which a checkpoint is resumed with."""
        digest = xxhash.xxh3_64(str(self.table.fingerprint).encode())
        for rows in self.groups:
            digest.update(rows.tobytes() + b";")
        return digest.intdigest() >> 1  # fits a signed integer

    @property
    def mean_size(self) -> float:
        """Rows of a group, on average."""
        return len(self.table) / max(1, len(self))

    def log(self) -> None:
        """Say how many rows share their pictures."""
        shared = sum(len(rows) for rows in self.groups if len(rows) > 1)
        log_decision(
            "data.share_images",
            f"{len(self)} groups of {self.mean_size:.1f} rows",
            f"{shared} of {len(self.table)} rows have the pictures of another; a batch is counted in groups",
        )


class SharedImageCollator:
    """Makes batches of groups of rows.

    Args:
        collate: Makes a batch of rows: the collator, or one that leaves out what is cached.
    """

    def __init__(self, collate: Callable[[list[Sample]], Batch]) -> None:
        self._collate = collate

    def __call__(self, groups: Sequence[Group]) -> Batch:
        return share_prefixes(self._collate(list(chain.from_iterable(groups))))


def share_prefixes(batch: Batch) -> Batch:
    """The batch with ``shared`` set, where rows side by side have their pictures and first tokens in common.

    Args:
        batch: Rows on the CPU; rows of a picture stand side by side.
    """
    owner: list[int] = []
    length: list[int] = []
    for row, sample in enumerate(batch.samples):
        first = owner[-1] if row and _same_pictures(sample, batch.samples[owner[-1]]) else row
        common = _common_tokens(batch, first, row) if first < row else 0
        owner.append(first if common else row)
        length.append(common)
    return replace(batch, shared=SharedPrefix(tuple(owner), tuple(length)) if any(length) else None)


def _same_pictures(one: Sample, other: Sample) -> bool:
    if one.videos or other.videos or not one.images or len(one.images) != len(other.images):
        return False
    return all(a == b or a.read_bytes() == b.read_bytes() for a, b in zip(one.images, other.images, strict=True))


def _common_tokens(batch: Batch, first: int, row: int) -> int:
    """First tokens that two rows with the same pictures have in common; 0 where these do not hold all pictures."""
    of_tokens = [value for value in batch.inputs.values() if value.shape[:2] == batch.regions.shape]
    is_equal_L = torch.stack([_equal_positions(value, first, row) for value in of_tokens]).all(0)
    is_equal_L &= (batch.regions[[first, row]] != TokenRegion.PAD).all(0)
    common = int(is_equal_L.long().cumprod(0).sum())
    behind = batch.regions[row, common:] == TokenRegion.IMAGE
    return 0 if bool(behind.any()) else common


def _equal_positions(value: Tensor, first: int, row: int) -> Tensor:
    """(L,) positions at which an input by token, (B, L, ...), is equal in two rows."""
    return (value[first] == value[row]).flatten(1).all(1) if value.ndim > 2 else value[first] == value[row]
