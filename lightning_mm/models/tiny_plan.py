"""What the tiny models of all families have in common: their sizes.

Data flow: ``tiny.build_tiny`` makes a ``Plan`` -> ``tiny_configs`` and ``tiny_processors`` read it.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

SIDE, PATCH, VISION_LAYERS = 28, 7, 3
GRIDS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
"""Heights and widths in pixels that LLaVA-NeXT and -OneVision may lay a picture out in."""


@dataclass(frozen=True)
class Plan:
    """The sizes of one tiny model.

    Args:
        tokenizer: Gives the vocabulary and the ids of special tokens.
        layers: Blocks of the decoder.
        hidden: Width of decoder and vision tower, a multiple of 16.
        dropout: Of attention, in decoder and tower.
        tower: ``clip`` or ``dinov2``, where the family allows both.
        split_images: Cut large pictures into tiles, where the family allows it.
    """

    tokenizer: PreTrainedTokenizerFast
    layers: int = 4
    hidden: int = 32
    dropout: float = 0.0
    tower: str = "clip"
    split_images: bool = False

    def id(self, token: str) -> int:
        """The id of a special token."""
        index = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(index, int), token
        return index

    @property
    def text(self) -> dict[str, Any]:
        """What all decoders are told."""
        return {
            "vocab_size": len(self.tokenizer),
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "attention_dropout": self.dropout,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    @property
    def vision(self) -> dict[str, Any]:
        """What most vision towers are told."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "attention_dropout": self.dropout,
        }
