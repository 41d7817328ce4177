"""What the model is trained on and what it is asked, as tensors.

Data flow: ``collator`` makes these in the loader's workers; ``module`` reads them on the device.

Shapes: B samples, L tokens after padding, S supervised positions of the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

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
    """

    inputs: dict[str, Tensor]
    regions: Tensor
    supervised: Tensor
    targets: Tensor
    samples: tuple[Sample, ...]
    rejected: tuple[Rejection, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_supervised(self) -> int:
        """S, known on the host without a device sync."""
        return self.targets.shape[0]

    @property
    def has_images(self) -> bool:
        return any(sample.images for sample in self.samples)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(lambda t: t.pin_memory())

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            inputs={k: fn(v) for k, v in self.inputs.items()},
            regions=fn(self.regions),
            supervised=fn(self.supervised),
            targets=fn(self.targets),
        )


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

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PromptBatch":
        return replace(self, inputs={k: v.to(device, non_blocking=non_blocking) for k, v in self.inputs.items()})

    def pin_memory(self) -> "PromptBatch":
        return replace(self, inputs={k: v.pin_memory() for k, v in self.inputs.items()})
