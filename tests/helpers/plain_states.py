"""Hidden states as transformers itself gives them, row by row and without padding, and where a row's tokens are.

An oracle of what is read inside a model: nothing of the package but the loader of tiny models. The position of the
image tokens is found by their id, that of a text by decoding token after token.

Data flow: text with ``<image>`` marks and pictures -> processor -> one forward pass with ``output_hidden_states`` ->
``PlainRow``: (T, L, D) states, and its tokens.

Shapes: T slices (embeddings and the output of each block), L tokens, D hidden size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lightning_mm.models.processor import optional_video_processor

MARK = "<image>"


def opened(picture: Any) -> Image.Image:
    """A picture in memory, of a file or an image."""
    if isinstance(picture, Image.Image):
        return picture
    with Image.open(str(picture)) as file:
        return file.convert("RGB")


@dataclass(frozen=True, eq=False)
class PlainRow:
    """One row: its inputs, its states, and the tokens of its parts.

    Args:
        inputs: Of the forward pass.
        hidden: (T, L, D) float64.
        image: (P,) positions of the image tokens.
        tokens: The text of each token.
    """

    inputs: dict[str, torch.Tensor]
    hidden: Any
    image: list[int]
    tokens: list[str]

    def span(self, text: str) -> list[int]:
        """Positions of the tokens that hold some of a text, where it stands last."""
        ends = np.cumsum([len(token) for token in self.tokens])
        whole = "".join(self.tokens)
        first = whole.rindex(text)
        starts = ends - [len(token) for token in self.tokens]
        return [int(i) for i in np.flatnonzero((ends > first) & (starts < first + len(text)))]

    @staticmethod
    def drawn(positions: Sequence[int], row_id: str) -> int:
        """The position that the id of a row draws: the first eight bytes of its SHA-256, modulo their number."""
        number = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "little")
        return positions[number % len(positions)]

    def mean(self, positions: Sequence[int], weights: Sequence[float] | None = None) -> Any:
        """(T, D) weighted mean over tokens."""
        return np.average(self.hidden[:, list(positions)], axis=1, weights=weights)


class PlainModel:
    """A model and its processor, loaded by transformers.

    Args:
        folder: Of the model.
        attention: Implementation of attention; eager gives weights.
    """

    def __init__(self, folder: Path, attention: str = "eager") -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        ).eval()
        with optional_video_processor():
            self.processor: Any = AutoProcessor.from_pretrained(folder)

    @cached_property
    def blocks(self) -> Any:
        """The decoder's blocks."""
        return self.model.get_decoder().layers

    def encode(self, text: str, pictures: Sequence[Any], answer: str = "") -> dict[str, torch.Tensor]:
        """Inputs of one user turn, up to where its answer begins; pictures are files or images."""
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(text.split(MARK)):
            parts += [{"type": "image"}] * (number > 0)
            parts += [{"type": "text", "text": piece.strip("\n")}] if piece.strip("\n") else []
        turn = [{"role": "user", "content": parts}]
        written = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) + answer
        images = [opened(each) for each in pictures]
        return dict(self.processor(text=[written], images=images or None, return_tensors="pt"))

    def image_positions(self, inputs: dict[str, torch.Tensor]) -> list[int]:
        """Positions of the image tokens."""
        return np.flatnonzero(inputs["input_ids"][0].numpy() == self.model.config.image_token_id).tolist()

    @torch.no_grad()
    def read(self, text: str, pictures: Sequence[Any]) -> PlainRow:
        """One row's states; those of the last block, which transformers norms, by a hook."""
        inputs = self.encode(text, pictures)
        last: list[torch.Tensor] = []

        def keep(_: Any, __: Any, output: Any) -> None:
            last.append(output[0] if isinstance(output, tuple) else output)

        handle = self.blocks[-1].register_forward_hook(keep)
        try:
            states = self.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        finally:
            handle.remove()
        assert len(states) == len(self.blocks) + 1
        hidden = torch.stack([*states[:-1], last[0]])[:, 0].double().numpy()
        tokens = [self.processor.tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist()]
        return PlainRow(inputs, hidden, self.image_positions(inputs), tokens)
