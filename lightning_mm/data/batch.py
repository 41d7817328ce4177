"""What the model is trained on and what it is asked, as tensors.

Data flow: ``collator`` makes these in the loader's workers; ``module`` reads them on the device.

Shapes: B samples, L tokens after padding, S supervised positions of the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from lightning_mm.data.sample import Rejection, Sample


class TokenRegion(IntEnum):
    """What a token is."""

    PAD = 0
    PROMPT = 1
    IMAGE = 2
    ANSWER = 3


@dataclass(frozen=True)
class Batch:
    """Teacher-forced conversations.

    Args:
        inputs: What the model's forward takes besides labels; ``input_ids`` (B, L), right-padded.
        regions: (B, L) uint8 of ``TokenRegion``.
        supervised: (S,) flat indices into B * L: the positions whose *next* token is to be predicted.
        targets: (S,) the token ids to be predicted there.
        samples: One per row.
        rejected: Rows that fell out of this batch, or were cut.
        kept: What is known of rows whose pictures need not be seen again: hidden states, and the inputs hold no
            pixels then; or features, and their pictures are grey.
    """

    inputs: dict[str, Tensor]
    regions: Tensor
    supervised: Tensor
    targets: Tensor
    samples: tuple[Sample, ...]
    rejected: tuple[Rejection, ...] = ()
    cached: "CachedStates | CachedFeatures | None" = None

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def real(self) -> Tensor:
        """(T,) flat indices into B * L of all that is no padding."""
        return (self.regions != TokenRegion.PAD).flatten().nonzero().squeeze(1)

    @property
    def num_supervised(self) -> int:
        """S, known on the host without a device sync."""
        return self.targets.shape[0]

    @property
    def has_images(self) -> bool:
        return any(sample.images for sample in self.samples)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "Batch":
        """Copied to a device; to CUDA the host does not wait for it (see ``_copies_asynchronously``)."""
        waits_not = _copies_asynchronously(device) if non_blocking is None else non_blocking
        return self.map_tensors(lambda t: t.to(device, non_blocking=waits_not))

    def pin_memory(self) -> "Batch":
        return self.map_tensors(lambda t: t.pin_memory())

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with every tensor put through ``fn``."""
        made = replace(
            self,
            inputs={k: fn(v) for k, v in self.inputs.items()},
            regions=fn(self.regions),
            supervised=fn(self.supervised),
            targets=fn(self.targets),
            cached=self.cached and self.cached.map_tensors(fn),
        )
        # Counted on the host, where it costs no wait for the device.
        made.__dict__["real"] = fn(self.real)
        return made


@dataclass(frozen=True)
class CachedStates:
    """What enters the lowest trainable block, as far as it is known, and the rows of which it is not.

    Args:
        states: (B, L, D); zeros for rows that are not known.
        missing: (M,) rows that are not known.
        fresh: Those rows with their pictures, a batch of their own; None if there are none.
        keys: Of those rows, to keep their states under.
        records: Of those rows, what is kept beside the states.
    """

    states: Tensor
    uncached_rows: Tensor
    uncached: "Batch | None" = None
    keys: tuple[str, ...] = ()
    records: tuple[dict[str, Tensor], ...] = ()

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> "CachedStates":
        """The same with every tensor that the model needs put through ``fn``."""
        return replace(
            self,
            states=fn(self.states),
            uncached_rows=fn(self.uncached_rows),
            uncached=self.uncached and self.uncached.map_tensors(fn),
        )


@dataclass(frozen=True)
class CachedFeatures:
    """What the vision tower makes of pictures, as far as it is known, and the rows of which it is not.

    Args:
        states: Of each row, as the tower's last block puts them out; None: not known, or no picture.
        missing: Rows that are not known.
        fresh: Those rows with their pictures, each a batch of its own.
        keys: Of those rows, to keep their features under.
        records: Of those rows, what is kept beside the features.
    """

    states: tuple[Tensor | None, ...]
    uncached_rows: tuple[int, ...] = ()
    uncached: "tuple[Batch, ...]" = ()
    keys: tuple[str, ...] = ()
    records: tuple[dict[str, Tensor], ...] = ()

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> "CachedFeatures":
        """The same with every tensor that the model needs put through ``fn``."""
        states = tuple(None if each is None else fn(each) for each in self.states)
        return replace(self, states=states, uncached=tuple(each.map_tensors(fn) for each in self.uncached))


@dataclass(frozen=True)
class PromptBatch:
    """Questions to be answered by generation.

    Args:
        inputs: What ``generate`` takes; ``input_ids`` (B, L), left-padded, ending with the generation prompt.
        samples: The conversation each question is from.
        turns: Index of the assistant turn that is asked for; the turns before it are the given history.
        rejected: Rows that fell out.
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
        """As a ``Batch``."""
        waits_not = _copies_asynchronously(device) if non_blocking is None else non_blocking
        return replace(self, inputs={k: v.to(device, non_blocking=waits_not) for k, v in self.inputs.items()})

    def pin_memory(self) -> "PromptBatch":
        return replace(self, inputs={k: v.pin_memory() for k, v in self.inputs.items()})


def _copies_asynchronously(device: torch.device | str) -> bool:
    """Whether a copy to this device needs no waiting: work on a CUDA device queues up behind it.

    Lightning asks for such copies of plain tensors only, and would wait for each tensor of a batch.
    """
    return torch.device(device).type == "cuda"
