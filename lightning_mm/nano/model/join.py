"""Joins the pretrained parts to one LLaVA: configuration, processor, chat template and connector.

Data flow: ``parts`` (tensors, tokenizer) -> ``VipLlavaForConditionalGeneration``, ``LlavaProcessor`` -> files in a
folder.

Shapes: T image tokens, D hidden size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    GenerationConfig,
    LlamaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from lightning_mm.nano.model.parts import read_dinov2, read_smollm2
from lightning_mm.testing.tiny_processors import chatml

Dtype = Literal["float32", "bfloat16"]
RECIPE_VERSION = 3
NEW = "new"
PATCH = 14
"""Side of a patch in pixels."""
MANIFEST = "nano.json"
"""File of a built model's folder that holds its recipe."""
CONNECTOR_PREFIX = "model.multi_modal_projector."
"""What the names of the connector's weights begin with."""


@dataclass(frozen=True)
class Recipe:
    """The options of a nano model.

    Args:
        image_size: Side in pixels that images are resized to, a multiple of 14; T = (image_size / 14) ** 2, without
            the class token.
        vision_feature_layer: Indices into the tower's 13 hidden states; the connector reads them side by side. An
            early state beside a deep one keeps colors, which the deep one has lost: with 2 and 10 the answers to
            questions about the nano pictures were right in 44 % after stage 1, with 10 alone in 41 % (1,856
            questions, one seed; the color of the ground 93 % against 64 %).
        seed: Random seed of the connector's initialization.
        dtype: Data type of the saved weights. float32 keeps the dequantized values exactly (4-bit codes times a 16-bit
            scale do not fit in bfloat16) and is what a CPU computes in; bfloat16 halves the folder.
        connector: "new" for a random one, else the SHA-256 of the trained weights that are shipped with the package.
        version: Version of this recipe; a folder built by another version is rebuilt.
    """

    image_size: int = 98
    vision_feature_layer: tuple[int, ...] = (2, 10)
    seed: int = 0
    dtype: Dtype = "float32"
    connector: str = NEW
    version: int = RECIPE_VERSION

    @property
    def num_image_tokens(self) -> int:
        """T, the number of tokens of one image."""
        return (self.image_size // PATCH) ** 2


def assemble(
    folder: Path, recipe: Recipe, gguf: Path, onnx: Path, connector: Mapping[str, Tensor] | None = None
) -> None:
    """Write the model and its processor to a folder.

    Args:
        folder: Folder to write to; created if missing.
        recipe: The model's options.
        gguf: Weights and tokenizer of the language model.
        onnx: Weights of the vision tower.
        connector: Weights of the connector; None initializes it at random.
    """
    text, tokenizer = read_smollm2(gguf)
    processor = _processor(tokenizer, recipe)
    # <image> is a new token; its embedding is always replaced by an image feature, so the mean of the others will do.
    table = text["embed_tokens.weight"]  # (V, D)
    text["embed_tokens.weight"] = torch.cat([table, table.mean(0, keepdim=True)])
    assert len(text["embed_tokens.weight"]) == len(processor.tokenizer)
    config, vision = _config(recipe, processor), read_dinov2(onnx)
    model = _join(config, text, vision, connector or _random_connector(recipe, text, vision))
    model.generation_config = GenerationConfig(**_special_ids(processor))
    model.to(getattr(torch, recipe.dtype)).save_pretrained(folder)
    processor.save_pretrained(folder)


def _processor(bpe: Tokenizer, recipe: Recipe) -> LlavaProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=8192,
    )
    side = {"height": recipe.image_size, "width": recipe.image_size}
    # PIL's variant needs no torchvision; torchvision's loads what it saves.
    images = BitImageProcessorPil(
        # The whole image is squeezed to a square: a center crop would hide what is at the border.
        size=side,
        do_center_crop=False,
        crop_size=side,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        # LLaVA's: without the class token, which the tower adds to its patches.
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        # SmolLM2's own template would add a default system prompt.
        chat_template=chatml("<image>\n"),
    )


def _special_ids(processor: LlavaProcessor) -> dict[str, Any]:
    return {f"{name}_token_id": getattr(processor.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def _config(recipe: Recipe, processor: LlavaProcessor) -> VipLlavaConfig:
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        **_special_ids(processor),
    )
    # image_size is that of the stored position table (37 x 37); the tower interpolates it to its input.
    vision = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=PATCH)
    return VipLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=recipe.num_image_tokens,
        vision_feature_layer=list(recipe.vision_feature_layer),
        tie_word_embeddings=True,
    )


def _random_connector(recipe: Recipe, text: Mapping[str, Tensor], vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(recipe.seed)
    into, across = len(vision["layernorm.weight"]) * len(recipe.vision_feature_layer), len(text["norm.weight"])
    return {
        "projector_layernorm.weight": torch.ones(into),
        "projector_layernorm.bias": torch.zeros(into),
        "linear_1.weight": torch.randn(across, into, generator=generator) / into**0.5,
        "linear_1.bias": torch.zeros(across),
        "linear_2.weight": torch.randn(across, across, generator=generator) / across**0.5,
        "linear_2.bias": torch.zeros(across),
    }


def _join(
    config: VipLlavaConfig, text: Mapping[str, Tensor], vision: Mapping[str, Tensor], connector: Mapping[str, Tensor]
) -> VipLlavaForConditionalGeneration:
    """One model of all parts; ``from_pretrained`` maps checkpoint names to those of this transformers."""
    model, info = cast(Any, VipLlavaForConditionalGeneration).from_pretrained(
        None,
        config=config,
        state_dict={
            **{f"model.vision_tower.{k}": v for k, v in vision.items()},
            **{f"model.language_model.{k}": v for k, v in text.items()},
            **{f"{CONNECTOR_PREFIX}{k}": v for k, v in connector.items()},
        },
        output_loading_info=True,
        dtype=torch.float32,
    )
    assert not any(info.values()), info
    return cast(VipLlavaForConditionalGeneration, model)
