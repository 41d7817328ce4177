"""Writes folders of full-size models without weights: what ``plan`` counts on, where the model itself is not at hand.

The configuration is the released one. The tokenizer is that of the tiny models: token counts of a text are not the
model's, so give lengths in tokens (``plan --image_tokens``, ``--text_tokens``).

Data flow: name of a shape -> configuration and processor -> a folder that ``planning`` and ``Backbone`` read.
"""

from pathlib import Path

from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import is_absent_or_empty
from lightning_mm.models.processor import save_processor
from lightning_mm.testing.tiny import FAMILIES
from lightning_mm.testing.tiny_processors import tiny_tokenizer, vicuna

SHAPES = ("llava-1.5-7b",)
"""Models whose shape can be written."""

_SIDE, _PATCH = 336, 14


def build_shape(name: str, folder: Path | str) -> Path:
    """Write configuration and processor of a model of full size to a folder, without weights; returns the folder.

    Args:
        name: One of ``SHAPES``. llava-1.5-7b: CLIP ViT-L/14 at 336 pixels (576 image tokens) and Vicuna-7B.
        folder: Folder to create; it must not exist or be empty.

    Raises:
        UserError: There is no such shape, or the folder is not empty.
    """
    folder = Path(folder)
    if name not in SHAPES:
        raise UserError(f"There is no shape {name!r}.", f"There are {', '.join(SHAPES)}.", "Name one of those.")
    if not is_absent_or_empty(folder):
        raise UserError(f"{folder} is not empty.", "Nothing is overwritten.", "Name another folder.")
    recipe = FAMILIES["llava"]
    tokenizer = tiny_tokenizer(recipe.special, recipe.marks, add_bos=recipe.add_bos)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image_id, int), "one token has one id"
    token_ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=_SIDE,
            patch_size=_PATCH,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            **{f"{name}_id": token_id for name, token_id in token_ids.items()},
        ),
        image_token_index=image_id,
        image_seq_length=(_SIDE // _PATCH) ** 2,
        vision_feature_layer=-2,
        architectures=["LlavaForConditionalGeneration"],
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE})
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=vicuna("<image>\n"),
    )
    save_processor(processor, folder)
    return folder
