"""Configurations of the tiny models, one function per family.

Data flow: ``TinySizes`` -> configuration -> ``tiny.build_tiny``.

Shapes: images of 28 x 28 pixels in patches of 7 x 7 pixels unless said otherwise, so 16 patches; vision towers of 3
blocks.
"""

from dataclasses import dataclass
from typing import Any

from transformers import (
    AyaVisionConfig,
    CLIPVisionConfig,
    Cohere2Config,
    Dinov2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    MllamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    VipLlavaConfig,
)

SIDE, PATCH, VISION_LAYERS = 28, 7, 3
GRIDS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
"""Heights and widths in pixels that LLaVA-NeXT and -OneVision may arrange the tiles of an image in."""


@dataclass(frozen=True)
class TinySizes:
    """The sizes of one tiny model.

    Args:
        tokenizer: Tokenizer with the vocabulary and the special tokens.
        layers: Number of decoder blocks.
        hidden: Hidden size of decoder and vision tower, a multiple of 16.
        dropout: Dropout probability of attention in decoder and vision tower.
        tower: ``clip`` or ``dinov2``, where the family allows both.
        split_images: Whether large images are cut into tiles, where the family allows it.
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
        """Options of every decoder's configuration."""
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
        """Options of most vision towers' configurations."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "attention_dropout": self.dropout,
        }


def llava(sizes: TinySizes) -> PreTrainedConfig:
    """CLIP or DINOv2, MLP, Llama; the tower is read one block below its top."""
    tower: PreTrainedConfig = CLIPVisionConfig(**sizes.vision)
    if sizes.tower == "dinov2":
        shared = {k: v for k, v in sizes.vision.items() if k not in ("intermediate_size", "attention_dropout")}
        tower = Dinov2Config(**shared, mlp_ratio=2, attention_probs_dropout_prob=sizes.dropout)
    return LlavaConfig(
        vision_config=tower,
        text_config=LlamaConfig(**sizes.text),
        image_token_index=sizes.id("<image>"),
        image_seq_length=16,
    )


def vipllava(sizes: TinySizes) -> PreTrainedConfig:
    """As LLaVA, with several blocks of the tower side by side."""
    return VipLlavaConfig(
        vision_config=CLIPVisionConfig(**sizes.vision),
        text_config=LlamaConfig(**sizes.text),
        image_token_index=sizes.id("<image>"),
        image_seq_length=16,
        vision_feature_layer=[-2, -1],
    )


def aya_vision(sizes: TinySizes) -> PreTrainedConfig:
    """SigLIP, patches merged 2 x 2 in the connector, Cohere 2 with its windows of attention."""
    return AyaVisionConfig(
        vision_config=SiglipVisionConfig(**sizes.vision, vision_use_head=False),
        text_config=Cohere2Config(**sizes.text),
        image_token_index=sizes.id("<|IMG_PATCH|>"),
    )


def llava_next(sizes: TinySizes) -> PreTrainedConfig:
    """As LLaVA, with the image both whole and in tiles."""
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**sizes.vision),
        text_config=MistralConfig(**sizes.text, sliding_window=None),
        image_token_index=sizes.id("<image>"),
        image_grid_pinpoints=GRIDS,
        image_seq_length=16,
    )


def llava_onevision(sizes: TinySizes) -> PreTrainedConfig:
    """SigLIP, MLP, Qwen2; tiles as in LLaVA-NeXT."""
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**sizes.vision, vision_use_head=False),
        text_config=Qwen2Config(**sizes.text),
        image_token_index=sizes.id("<image>"),
        video_token_index=sizes.id("<video>"),
        image_grid_pinpoints=GRIDS,
    )


def _qwen(sizes: TinySizes, **rope: Any) -> dict[str, Any]:
    return {
        # Sections of the rotary half-width for time, height and width: their sum is head width / 2.
        "text_config": {
            **sizes.text,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": _sections(sizes), **rope},
        },
        "image_token_id": sizes.id("<|image_pad|>"),
        "video_token_id": sizes.id("<|video_pad|>"),
        "vision_start_token_id": sizes.id("<|vision_start|>"),
        "vision_end_token_id": sizes.id("<|vision_end|>"),
    }


def _sections(sizes: TinySizes) -> list[int]:
    half = sizes.hidden // 4 // 2
    return [half - 2 * (half // 4), half // 4, half // 4]


def qwen2_vl(sizes: TinySizes) -> PreTrainedConfig:
    """Images of any size, patches merged 2 x 2 inside the tower, positions in three dimensions."""
    tower = {"depth": VISION_LAYERS, "embed_dim": sizes.hidden, "hidden_size": sizes.hidden, "num_heads": 4}
    return Qwen2VLConfig(**_qwen(sizes), vision_config={**tower, "mlp_ratio": 2, "patch_size": PATCH})


def qwen2_5_vl(sizes: TinySizes) -> PreTrainedConfig:
    """As Qwen2-VL, with attention in windows in all but the tower's last block."""
    tower = {
        "depth": VISION_LAYERS,
        "hidden_size": sizes.hidden,
        "out_hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_heads": 4,
        "patch_size": PATCH,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [VISION_LAYERS - 1],
    }
    return Qwen2_5_VLConfig(**_qwen(sizes), vision_config=tower)


def qwen3_vl(sizes: TinySizes) -> PreTrainedConfig:
    """As Qwen2-VL, and the tower's first two blocks are also added to the decoder's first two."""
    tower = {
        "depth": VISION_LAYERS,
        "hidden_size": sizes.hidden,
        "out_hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_heads": 4,
        "patch_size": PATCH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = _qwen(sizes, mrope_interleaved=True)
    config["text_config"]["head_dim"] = sizes.hidden // 4
    return Qwen3VLConfig(**config, vision_config=tower)


def idefics3(sizes: TinySizes) -> PreTrainedConfig:
    """SigLIP-like tower, 4 patches folded into one token, Llama; an image may be split into tiles."""
    return Idefics3Config(**_folded(sizes))


def smolvlm(sizes: TinySizes) -> PreTrainedConfig:
    """Same configuration as Idefics3."""
    return SmolVLMConfig(**_folded(sizes))


def _folded(sizes: TinySizes) -> dict[str, Any]:
    return {
        "vision_config": sizes.vision,
        "text_config": LlamaConfig(**sizes.text),
        "image_token_id": sizes.id("<image>"),
        "pad_token_id": sizes.tokenizer.pad_token_id,
        "scale_factor": 2,
    }


def internvl(sizes: TinySizes) -> PreTrainedConfig:
    """ViT, 4 patches folded into one token, MLP, Qwen2."""
    pair = {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    return InternVLConfig(
        vision_config={**sizes.vision, **pair},
        text_config=Qwen2Config(**sizes.text),
        image_token_id=sizes.id("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def gemma3(sizes: TinySizes) -> PreTrainedConfig:
    """SigLIP pooled to 4 tokens, Gemma 3: image tokens attend to each other: training passes ``token_type_ids``."""
    text = Gemma3TextConfig(
        **sizes.text, head_dim=sizes.hidden // 4, query_pre_attn_scalar=sizes.hidden // 4, sliding_window=16
    )
    return Gemma3Config(
        vision_config=SiglipVisionConfig(**sizes.vision, vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=sizes.id("<start_of_image>"),
        eoi_token_index=sizes.id("<end_of_image>"),
        image_token_index=sizes.id("<image_soft_token>"),
    )


def mllama(sizes: TinySizes) -> PreTrainedConfig:
    """Llama 3.2 Vision: the image enters through cross-attention in the decoder's second block, never as tokens."""
    text = {k: v for k, v in sizes.text.items() if k != "attention_dropout"}
    tower = {
        "hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": VISION_LAYERS,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0, 1],
        # Outputs of the last block and of the two blocks above, concatenated.
        "vision_output_dim": 3 * sizes.hidden,
        # All arrangements of up to 4 tiles, in the order of the processor.
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }
    return MllamaConfig(
        vision_config=tower,
        text_config={**text, "cross_attention_layers": [1], "dropout": sizes.dropout},
        image_token_index=sizes.id("<|image|>"),
    )
