"""The shapes of the tiny models: one function a family, each giving the config of an ordinary model.

Data flow: a ``Plan`` (sizes, tokenizer) -> configuration -> ``tiny.build_tiny``.

Shapes: pictures of 28 x 28 px in patches of 7 x 7 px unless said otherwise, so 16 patches; vision towers of 3 blocks.

What the tiny models of all families have in common: their sizes.

Data flow: ``tiny.build_tiny`` makes a ``Plan`` -> ``tiny_configs`` and ``tiny_processors`` read it.
"""

from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPVisionConfig,
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
)

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


def llava(plan: Plan) -> PreTrainedConfig:
    """CLIP or DINOv2, MLP, Llama; the tower is read one block below its top."""
    tower: PreTrainedConfig = CLIPVisionConfig(**plan.vision)
    if plan.tower == "dinov2":
        sizes = {k: v for k, v in plan.vision.items() if k not in ("intermediate_size", "attention_dropout")}
        tower = Dinov2Config(**sizes, mlp_ratio=2, attention_probs_dropout_prob=plan.dropout)
    return LlavaConfig(
        vision_config=tower,
        text_config=LlamaConfig(**plan.text),
        image_token_index=plan.id("<image>"),
        image_seq_length=16,
    )


def llava_next(plan: Plan) -> PreTrainedConfig:
    """As LLaVA, with the picture seen whole and in tiles."""
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**plan.vision),
        text_config=MistralConfig(**plan.text, sliding_window=None),
        image_token_index=plan.id("<image>"),
        image_grid_pinpoints=GRIDS,
        image_seq_length=16,
    )


def llava_onevision(plan: Plan) -> PreTrainedConfig:
    """SigLIP, MLP, Qwen2; tiles as LLaVA-NeXT."""
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**plan.vision, vision_use_head=False),
        text_config=Qwen2Config(**plan.text),
        image_token_index=plan.id("<image>"),
        video_token_index=plan.id("<video>"),
        image_grid_pinpoints=GRIDS,
    )


def _qwen(plan: Plan, **rope: Any) -> dict[str, Any]:
    return {
        # Sections of the rotary half-width for time, height and width: their sum is head width / 2.
        "text_config": {
            **plan.text,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": _sections(plan), **rope},
        },
        "image_token_id": plan.id("<|image_pad|>"),
        "video_token_id": plan.id("<|video_pad|>"),
        "vision_start_token_id": plan.id("<|vision_start|>"),
        "vision_end_token_id": plan.id("<|vision_end|>"),
    }


def _sections(plan: Plan) -> list[int]:
    half = plan.hidden // 4 // 2
    return [half - 2 * (half // 4), half // 4, half // 4]


def qwen2_vl(plan: Plan) -> PreTrainedConfig:
    """Pictures of any size, patches merged 2 x 2 inside the tower, positions in three dimensions."""
    tower = {"depth": VISION_LAYERS, "embed_dim": plan.hidden, "hidden_size": plan.hidden, "num_heads": 4}
    return Qwen2VLConfig(**_qwen(plan), vision_config={**tower, "mlp_ratio": 2, "patch_size": PATCH})


def qwen2_5_vl(plan: Plan) -> PreTrainedConfig:
    """As Qwen2-VL, with attention in windows in all but the tower's last block."""
    tower = {
        "depth": VISION_LAYERS,
        "hidden_size": plan.hidden,
        "out_hidden_size": plan.hidden,
        "intermediate_size": 2 * plan.hidden,
        "num_heads": 4,
        "patch_size": PATCH,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [VISION_LAYERS - 1],
    }
    return Qwen2_5_VLConfig(**_qwen(plan), vision_config=tower)


def qwen3_vl(plan: Plan) -> PreTrainedConfig:
    """As Qwen2-VL, and the tower's first two blocks are also added to the decoder's first two."""
    tower = {
        "depth": VISION_LAYERS,
        "hidden_size": plan.hidden,
        "out_hidden_size": plan.hidden,
        "intermediate_size": 2 * plan.hidden,
        "num_heads": 4,
        "patch_size": PATCH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = _qwen(plan, mrope_interleaved=True)
    config["text_config"]["head_dim"] = plan.hidden // 4
    return Qwen3VLConfig(**config, vision_config=tower)


def idefics3(plan: Plan) -> PreTrainedConfig:
    """SigLIP-like tower, 4 patches folded into one token, Llama; a picture may be split into tiles."""
    return Idefics3Config(**_folded(plan))


def smolvlm(plan: Plan) -> PreTrainedConfig:
    """As Idefics3."""
    return SmolVLMConfig(**_folded(plan))


def _folded(plan: Plan) -> dict[str, Any]:
    return {
        "vision_config": plan.vision,
        "text_config": LlamaConfig(**plan.text),
        "image_token_id": plan.id("<image>"),
        "pad_token_id": plan.tokenizer.pad_token_id,
        "scale_factor": 2,
    }


def internvl(plan: Plan) -> PreTrainedConfig:
    """ViT, 4 patches folded into one token, MLP, Qwen2."""
    pair = {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    return InternVLConfig(
        vision_config={**plan.vision, **pair},
        text_config=Qwen2Config(**plan.text),
        image_token_id=plan.id("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def gemma3(plan: Plan) -> PreTrainedConfig:
    """SigLIP pooled to 4 tokens, Gemma 3: image tokens see each other, so training must give ``token_type_ids``."""
    text = Gemma3TextConfig(
        **plan.text, head_dim=plan.hidden // 4, query_pre_attn_scalar=plan.hidden // 4, sliding_window=16
    )
    return Gemma3Config(
        vision_config=SiglipVisionConfig(**plan.vision, vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=plan.id("<start_of_image>"),
        eoi_token_index=plan.id("<end_of_image>"),
        image_token_index=plan.id("<image_soft_token>"),
    )


def mllama(plan: Plan) -> PreTrainedConfig:
    """Llama 3.2 Vision: the picture enters through cross-attention in the decoder's second block, never as tokens."""
    text = {k: v for k, v in plan.text.items() if k != "attention_dropout"}
    tower = {
        "hidden_size": plan.hidden,
        "intermediate_size": 2 * plan.hidden,
        "num_hidden_layers": VISION_LAYERS,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0, 1],
        # The top of the tower and the two blocks named above, side by side.
        "vision_output_dim": 3 * plan.hidden,
        # All shapes that 4 tiles allow: the processor numbers them so.
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }
    return MllamaConfig(
        vision_config=tower,
        text_config={**text, "cross_attention_layers": [1], "dropout": plan.dropout},
        image_token_index=plan.id("<|image|>"),
    )
