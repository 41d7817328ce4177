"""Tensors of a batch: conversations to train on, and prompts to generate from.

Data flow: ``collator`` in the loader's workers -> ``Batch``, ``PromptBatch`` -> ``training.module`` on the device;
``execution.cache`` adds ``CachedStates`` or ``CachedFeatures``.

Shapes: B rows, L tokens after padding, S supervised positions of the whole batch, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mm.data.sample import Rejection, Sample


class TokenRegion(IntEnum):
    """Region of a token."""

    PAD = 0
    PROMPT = 1
    IMAGE = 2
    ANSWER = 3


@dataclass(frozen=True)
class TargetSources:
    """Which source of a mixture each supervised token of a batch is from.

    Args:
        names: The sources of the batch's rows.
        counts: Number of supervised tokens of each.
        index: (S,) index into ``names`` of each supervised token; None where there is one source.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    index: Tensor | None = None


class SharedPrefix(NamedTuple):
    """Which first tokens of a row an earlier row of the batch has too, so that they are computed once.

    Args:
        owner: Row that computes them, for each of the B rows; a row that shares nothing owns itself.
        length: Number of those tokens, for each of the B rows; 0 for a row that owns itself.
    """

    owner: tuple[int, ...]
    length: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Conversations for teacher forcing.

    Args:
        inputs: Arguments of the model's forward besides labels; ``input_ids`` (B, L), right-padded.
        regions: (B, L) uint8 of ``TokenRegion``.
        supervised: (S,) flat indices into B * L: positions whose *next* token is to be predicted.
        targets: (S,) token ids to be predicted there.
        samples: The B samples.
        rejected: Samples that were dropped from this batch, or truncated.
        cached: Activations from the cache: hidden states (``inputs`` then hold no pixels) or vision features (images
            are then gray); None without a cache.
        shared: Tokens that several rows have in common, with the same pictures; None: every row is computed whole.
    """

    inputs: dict[str, Tensor]
    regions: Tensor
    supervised: Tensor
    targets: Tensor
    samples: tuple[Sample, ...]
    rejected: tuple[Rejection, ...] = ()
    cached: "CachedStates | CachedFeatures | None" = None
    shared: SharedPrefix | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def real(self) -> Tensor:
        """(T,) flat indices into B * L of all tokens that are computed: no padding, and none shared before."""
        is_real = self.regions != TokenRegion.PAD
        if self.shared is not None:
            lengths_B = torch.tensor(self.shared.length, device=is_real.device)
            is_real = is_real & (torch.arange(is_real.shape[1], device=is_real.device) >= lengths_B[:, None])
        return is_real.flatten().nonzero().squeeze(1)

    @cached_property
    def target_sources(self) -> TargetSources:
        """Which source each supervised token is from, and how many of each are known without a synchronization."""
        names = tuple(dict.fromkeys(sample.source for sample in self.samples))
        if len(names) == 1:
            return TargetSources(names, (self.num_supervised,))
        of_rows = torch.tensor([names.index(sample.source) for sample in self.samples], device=self.supervised.device)
        index = of_rows[self.supervised // self.regions.shape[1]]
        return TargetSources(names, tuple(torch.bincount(index, minlength=len(names)).tolist()), index)

    @property
    def num_supervised(self) -> int:
        """S, known without synchronizing with the device."""
        return self.targets.shape[0]

    @property
    def picture_share(self) -> float:
        """Share of the rows' pictures that are computed: below 1 where rows share pictures."""
        counts = [len(sample.images) + len(sample.videos) for sample in self.samples]
        if self.shared is None or not sum(counts):
            return 1.0
        own = [count for count, shared in zip(counts, self.shared.length, strict=True) if not shared]
        return sum(own) / sum(counts)

    @property
    def has_images(self) -> bool:
        """Whether any sample has an image or a video."""
        return any(sample.has_images for sample in self.samples)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "Batch":
        """A copy on a device; asynchronous for CUDA (see ``_copies_asynchronously``)."""
        is_async = _copies_asynchronously(device) if non_blocking is None else non_blocking
        return self.map_tensors(lambda t: t.to(device, non_blocking=is_async))

    def pin_memory(self) -> "Batch":
        return self.map_tensors(lambda t: t.pin_memory())

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        """A copy with ``fn`` applied to every tensor."""
        made = replace(
            self,
            inputs={k: fn(v) for k, v in self.inputs.items()},
            regions=fn(self.regions),
            supervised=fn(self.supervised),
            targets=fn(self.targets),
            cached=self.cached and self.cached.map_tensors(fn),
        )
        # Computed on the host, where it needs no synchronization.
        made.__dict__["real"] = fn(self.real)
        sources = self.target_sources
        index = None if sources.index is None else fn(sources.index)
        made.__dict__["target_sources"] = replace(sources, index=index)
        return made


@dataclass(frozen=True)
class CachedStates:
    """Inputs of the lowest trainable block from the cache, and the rows that are not cached.

    Args:
        states: (B, L, D) hidden states; zeros at padding and for rows that are not cached.
        uncached_rows: Indices of the rows that are not cached.
        uncached: One batch per such row, with its images.
        keys: Cache key of each of those rows.
        records: What is stored beside the states of each of those rows.
    """

    states: Tensor
    uncached_rows: tuple[int, ...] = ()
    uncached: "tuple[Batch, ...]" = ()
    keys: tuple[str, ...] = ()
    records: tuple[dict[str, Tensor], ...] = ()

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> "CachedStates":
        """A copy with ``fn`` applied to every tensor that the model needs."""
        return replace(self, states=fn(self.states), uncached=tuple(each.map_tensors(fn) for each in self.uncached))


@dataclass(frozen=True)
class CachedFeatures:
    """Outputs of the vision tower from the cache, and the rows that are not cached.

    Args:
        states: Output of the tower's last block for each of the B rows; None: not cached, or no image.
        uncached_rows: Indices of the rows that are not cached.
        uncached: One batch per such row, with its images.
        keys: Cache key of each of those rows.
        records: What is stored beside the features of each of those rows.
    """

    states: tuple[Tensor | None, ...]
    uncached_rows: tuple[int, ...] = ()
    uncached: "tuple[Batch, ...]" = ()
    keys: tuple[str, ...] = ()
    records: tuple[dict[str, Tensor], ...] = ()

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> "CachedFeatures":
        """A copy with ``fn`` applied to every tensor that the model needs."""
        states = tuple(None if each is None else fn(each) for each in self.states)
        return replace(self, states=states, uncached=tuple(each.map_tensors(fn) for each in self.uncached))


@dataclass(frozen=True)
class PromptBatch:
    """Questions to be answered by generation.

    Args:
        inputs: Arguments of ``generate``; ``input_ids`` (B, L), left-padded, ending with the generation prompt.
        samples: The conversation of each question.
        turns: Index of the assistant turn to be generated; the turns before it are given.
        rejected: Samples that were dropped.
    """

    inputs: dict[str, Tensor]
    samples: tuple[Sample, ...]
    turns: tuple[int, ...]
    rejected: tuple[Rejection, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(s.turns[i].text for s, i in zip(self.samples, self.turns, strict=True))

    @property
    def question_types(self) -> tuple[str, ...]:
        return tuple(s.turns[i].question_type for s, i in zip(self.samples, self.turns, strict=True))

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "PromptBatch":
        """A copy on a device; asynchronous for CUDA."""
        is_async = _copies_asynchronously(device) if non_blocking is None else non_blocking
        return replace(self, inputs={k: v.to(device, non_blocking=is_async) for k, v in self.inputs.items()})

    def pin_memory(self) -> "PromptBatch":
        return replace(self, inputs={k: v.pin_memory() for k, v in self.inputs.items()})


def _copies_asynchronously(device: torch.device | str) -> bool:
    """Whether a copy to this device needs no waiting: work on a CUDA device is queued after it.

    Lightning requests such copies for plain tensors only, and would wait for each tensor of a batch.
    """
    return torch.device(device).type == "cuda"
