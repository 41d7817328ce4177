"""Joins the pretrained parts to one LLaVA: configuration, processor, chat template and connector.

Data flow: ``parts`` (tensors, tokenizer) -> ``LlavaForConditionalGeneration``, ``LlavaProcessor`` -> files in a
folder.

Shapes: T image tokens, D hidden size, V vocabulary.
"""

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
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lightning_mm.nano.model.parts import read_dinov2, read_smollm2
from lightning_mm.testing.tiny_processors import chatml

Dtype = Literal["float32", "bfloat16"]
RECIPE_VERSION = 1
PATCH = 14
"""Side of a patch in pixels."""


@dataclass(frozen=True)
class Recipe:
    """The options of a nano model.

    Args:
        image_size: Side in pixels that images are resized to, a multiple of 14; T = (image_size / 14) ** 2 + 1.
        vision_feature_layer: Index into the tower's 13 hidden states. The packager tuned the tower for saliency, which
            spoiled some of the meaning in its top two blocks. Linear probe for the category of unseen objects of the
            nano data (n = 132, standard error 0.04), from class token and patch mean: 0.70 at hidden state 8, 0.69 at
            9, 0.69 at 10 (-3), 0.70 at 12; from the patch mean alone 0.63, 0.65, 0.67 and 0.67.
        seed: Random seed of the connector's initialization.
        dtype: Data type of the saved weights. float32 keeps the dequantized values exactly (4-bit codes times a 16-bit
            scale do not fit in bfloat16) and is what a CPU computes in; bfloat16 halves the folder.
        version: Version of this recipe; a folder built by another version is rebuilt.
    """

    image_size: int = 112
    vision_feature_layer: int = -3
    seed: int = 0
    dtype: Dtype = "float32"
    version: int = RECIPE_VERSION

    @property
    def num_image_tokens(self) -> int:
        """T, the number of tokens of one image."""
        return (self.image_size // PATCH) ** 2 + 1


def assemble(folder: Path, recipe: Recipe, gguf: Path, onnx: Path) -> None:
    """Write the model and its processor to a folder.

    Args:
        folder: Folder to write to; created if missing.
        recipe: The model's options.
        gguf: Weights and tokenizer of the language model.
        onnx: Weights of the vision tower.
    """
    text, tokenizer = read_smollm2(gguf)
    processor = _processor(tokenizer, recipe)
    # <image> is a new token; its embedding is always replaced by an image feature, so the mean of the others will do.
    table = text["embed_tokens.weight"]  # (V, D)
    text["embed_tokens.weight"] = torch.cat([table, table.mean(0, keepdim=True)])
    assert len(text["embed_tokens.weight"]) == len(processor.tokenizer)
    config = _config(recipe, processor)
    model = _join(config, text, read_dinov2(onnx), recipe.seed)
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
        # The class token is kept: it summarizes the whole image.
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        # SmolLM2's own template would add a default system prompt.
        chat_template=chatml("<image>\n"),
    )


def _special_ids(processor: LlavaProcessor) -> dict[str, Any]:
    return {f"{name}_token_id": getattr(processor.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def _config(recipe: Recipe, processor: LlavaProcessor) -> LlavaConfig:
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
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=recipe.num_image_tokens,
        vision_feature_layer=recipe.vision_feature_layer,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def _join(
    config: LlavaConfig, text: dict[str, Tensor], vision: dict[str, Tensor], seed: int
) -> LlavaForConditionalGeneration:
    """One model of both parts; ``from_pretrained`` maps checkpoint names to those of this transformers."""
    generator = torch.Generator().manual_seed(seed)
    into, across = len(vision["layernorm.weight"]), len(text["norm.weight"])
    connector = {
        "linear_1.weight": torch.randn(across, into, generator=generator) / into**0.5,
        "linear_1.bias": torch.zeros(across),
        "linear_2.weight": torch.randn(across, across, generator=generator) / across**0.5,
        "linear_2.bias": torch.zeros(across),
    }
    model, info = cast(Any, LlavaForConditionalGeneration).from_pretrained(
        None,
        config=config,
        state_dict={
            **{f"model.vision_tower.{k}": v for k, v in vision.items()},
            **{f"model.language_model.{k}": v for k, v in text.items()},
            **{f"model.multi_modal_projector.{k}": v for k, v in connector.items()},
        },
        output_loading_info=True,
        dtype=torch.float32,
    )
    assert not any(info.values()), info
    _scale_connector(model)
    return cast(LlavaForConditionalGeneration, model)


@torch.no_grad()
def _scale_connector(model: LlavaForConditionalGeneration) -> None:
    """Scale image tokens to the mean norm of word embeddings, so that they have an effect from the first step.

    Measured on a smooth synthetic image and rounded, so that the bytes do not depend on the order of additions.
    """
    inner: Any = model.model
    connector = inner.multi_modal_projector
    ramp = torch.linspace(-2, 2, 8 * PATCH)
    picture = torch.stack(
        [ramp.expand(len(ramp), -1), ramp[:, None].expand(-1, len(ramp)), torch.outer(ramp, ramp) / 2]
    )
    layer = model.config.vision_feature_layer
    seen = inner.vision_tower(picture[None], output_hidden_states=True).hidden_states[layer][0]  # (T, D)
    connector.linear_1.weight /= _round(seen.square().mean().sqrt())
    words = inner.get_input_embeddings().weight.norm(dim=1).mean()
    connector.linear_2.weight *= _round(words / connector(seen).norm(dim=1).mean())


def _round(value: Tensor) -> float:
    return float(f"{value.item():.1e}")
