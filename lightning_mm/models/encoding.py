"""What one call of a processor gives: inputs of the model, and what its tokenizer was given.

Data flow: texts -> ``RecordingTokenizer``, in place of its own -> ``ModelProcessor.encode`` -> ``Encoding``.

Shapes: B texts, L tokens after padding.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoding:
    """A batch of texts and images as inputs of the model.

    Args:
        inputs: Tensors by argument names of the model's forward; ``input_ids`` (B, L).
        texts: The tokenized texts, with image placeholders expanded.
        offsets: (B, L, 2) index of the first character of each token in its text, and of the last one plus 1; (0, 0)
            for padding.
    """

    inputs: dict[str, Tensor]
    texts: tuple[str, ...]
    offsets: Tensor


class RecordingTokenizer:
    """A tokenizer that records the texts and offsets of its last call."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.texts: tuple[str, ...] = ()
        self.offsets = torch.zeros(0, 0, 2, dtype=torch.long)

    def __call__(self, text: Any = None, **options: Any) -> Any:
        """The tokenizer's own result."""
        encoding = self._tokenizer(text, **options)
        self.texts = (text,) if isinstance(text, str) else tuple(text)
        # Through numpy: torch converts the tuples one by one, which would take half of the tokenizer's time.
        offsets = np.array([row.offsets for row in encoding.encodings], dtype=np.int64)
        self.offsets = torch.from_numpy(offsets)
        return encoding

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_tokenizer":  # not set yet during unpickling
            raise AttributeError(name)
        return getattr(self._tokenizer, name)
