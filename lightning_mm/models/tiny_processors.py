"""How each tiny family turns pictures and talks into tensors: the family's own processor, at tiny sizes.

Data flow: a ``Plan`` -> processor with its chat template -> ``tiny.build_tiny``.

PIL's image processors are named, for torchvision may be absent; where it is not, what is saved loads as torchvision's.
"""

from typing import Any

from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    MllamaImageProcessorPil,
    MllamaProcessor,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)

from lightning_mm.models import chat_templates
from lightning_mm.models.stills import video_part
from lightning_mm.models.tiny_plan import GRIDS, PATCH, SIDE, Plan

SQUARE = {"height": SIDE, "width": SIDE}
CLIP: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
CLASS_TOKEN: dict[str, Any] = {
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def llava(plan: Plan) -> ProcessorMixin:
    """One square per picture."""
    images = CLIPImageProcessorPil(**CLIP)
    return LlavaProcessor(images, plan.tokenizer, chat_template=chat_templates.vicuna("<image>\n"), **CLASS_TOKEN)


def llava_next(plan: Plan) -> ProcessorMixin:
    """The picture whole, and in the tiles of the grid that fits best."""
    images = LlavaNextImageProcessorPil(**CLIP, image_grid_pinpoints=GRIDS)
    return LlavaNextProcessor(images, plan.tokenizer, chat_template=chat_templates.mistral("<image>\n"), **CLASS_TOKEN)


def llava_onevision(plan: Plan) -> ProcessorMixin:
    """As LLaVA-NeXT."""
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRIDS),
        plan.tokenizer,
        **video_part("LlavaOnevisionVideoProcessor"),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chat_templates.chatml("<image>\n"),
    )


def _qwen(kind: type[ProcessorMixin], video: str, plan: Plan, system: str = "") -> ProcessorMixin:
    # Pixels, not sides: between 1 and 16 tokens of 2 x 2 patches.
    size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 16 * (2 * PATCH) ** 2}
    return kind(
        Qwen2VLImageProcessorPil(size=size, patch_size=PATCH, temporal_patch_size=2, merge_size=2),
        plan.tokenizer,
        **video_part(video),
        chat_template=chat_templates.chatml("<|vision_start|><|image_pad|><|vision_end|>", system),
    )


def qwen2_vl(plan: Plan) -> ProcessorMixin:
    """Any size, kept in proportion; the template makes up a system prompt."""
    return _qwen(Qwen2VLProcessor, "Qwen2VLVideoProcessor", plan, "You are a helpful assistant.")


def qwen2_5_vl(plan: Plan) -> ProcessorMixin:
    """As Qwen2-VL."""
    return _qwen(Qwen2_5_VLProcessor, "Qwen2VLVideoProcessor", plan, "You are a helpful assistant.")


def qwen3_vl(plan: Plan) -> ProcessorMixin:
    """As Qwen2-VL, without a made-up system prompt."""
    return _qwen(Qwen3VLProcessor, "Qwen3VLVideoProcessor", plan)


def idefics3(plan: Plan) -> ProcessorMixin:
    """One square per picture, or with splitting also its tiles, each announced by its row and column.

    SmolVLM's models take it too: their own processor asks for the package num2words, to speak of video.
    """
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE if plan.split_images else SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=plan.split_images,
    )
    return Idefics3Processor(images, plan.tokenizer, image_seq_len=4, chat_template=chat_templates.idefics("<image>"))


def internvl(plan: Plan) -> ProcessorMixin:
    """One square per picture, or with splitting up to 4 tiles and a thumbnail."""
    return InternVLProcessor(
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4 if plan.split_images else 1),
        plan.tokenizer,
        **video_part("InternVLVideoProcessor"),
        image_seq_length=4,
        chat_template=chat_templates.chatml("<IMG_CONTEXT>\n"),
    )


def gemma3(plan: Plan) -> ProcessorMixin:
    """One square per picture; image tokens stand between marks and empty lines."""
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE),
        plan.tokenizer,
        image_seq_length=4,
        chat_template=chat_templates.gemma("<start_of_image>"),
    )


def mllama(plan: Plan) -> ProcessorMixin:
    """Up to 4 tiles per picture, one token in the text."""
    images = MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4)
    return MllamaProcessor(images, plan.tokenizer, chat_template=chat_templates.llama3("<|image|>"))
