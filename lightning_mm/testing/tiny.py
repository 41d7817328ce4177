"""Builds tiny random models of many families as complete Hugging Face folders, in a second and offline.

They are the real classes of transformers with small sizes, so that tests of training and analysis code run on a CPU.

Data flow: family name and sizes -> ``tiny_tokenizer`` -> ``tiny_configs`` and ``tiny_processors`` -> a folder that
``AutoModelForImageTextToText`` and ``AutoProcessor`` load.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import is_absent_or_empty
from lightning_mm.models.processor import optional_video_processor, save_processor
from lightning_mm.testing import tiny_configs, tiny_processors
from lightning_mm.testing.tiny_configs import TinySizes
from lightning_mm.testing.tiny_processors import tiny_tokenizer


@dataclass(frozen=True)
class TinyFamily:
    """How the tiny model of one family is made.

    Args:
        config: Returns the model's configuration.
        processor: Returns its processor.
        special: Special tokens by the attribute name of the tokenizer, such as ``eos_token``.
        marks: Further special tokens, such as those around a turn.
        add_bos: Whether the tokenizer puts the BOS token before every text.
    """

    config: Callable[[TinySizes], PreTrainedConfig]
    processor: Callable[[TinySizes], ProcessorMixin]
    special: dict[str, str]
    marks: tuple[str, ...] = field(default=())
    add_bos: bool = False


def _special(bos: str, eos: str, pad: str, **others: str) -> dict[str, str]:
    return {"bos_token": bos, "eos_token": eos, "pad_token": pad, **others}


_CHATML = _special("<|endoftext|>", "<|im_end|>", "<|endoftext|>")
_QWEN = {**_CHATML, "image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_QWEN_MARKS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>")
_IDEFICS = _special("<|im_start|>", "<end_of_utterance>", "<|im_end|>", image_token="<image>")
_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_IDEFICS_MARKS = ("<fake_token_around_image>", "<global-img>", *_TILES)
_COHERE_MARKS = (
    *("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"),
    *("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
)
_GEMMA = _special("<bos>", "<end_of_turn>", "<pad>")

FAMILIES: dict[str, TinyFamily] = {
    "llava": TinyFamily(
        tiny_configs.llava,
        tiny_processors.llava,
        _special("<s>", "</s>", "<pad>", image_token="<image>"),
        add_bos=True,
    ),
    "vipllava": TinyFamily(
        tiny_configs.vipllava,
        tiny_processors.llava,
        _special("<s>", "</s>", "<pad>", image_token="<image>"),
        add_bos=True,
    ),
    "aya_vision": TinyFamily(
        tiny_configs.aya_vision,
        tiny_processors.aya_vision,
        _special("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>"),
        _COHERE_MARKS,
        add_bos=True,
    ),
    "llava_next": TinyFamily(
        tiny_configs.llava_next,
        tiny_processors.llava_next,
        _special("<s>", "</s>", "<pad>", image_token="<image>"),
        ("[INST]", "[/INST]"),
        add_bos=True,
    ),
    "llava_onevision": TinyFamily(
        tiny_configs.llava_onevision,
        tiny_processors.llava_onevision,
        {**_CHATML, "image_token": "<image>", "video_token": "<video>"},
        ("<|im_start|>",),
    ),
    "qwen2_vl": TinyFamily(tiny_configs.qwen2_vl, tiny_processors.qwen2_vl, _QWEN, _QWEN_MARKS),
    "qwen2_5_vl": TinyFamily(tiny_configs.qwen2_5_vl, tiny_processors.qwen2_5_vl, _QWEN, _QWEN_MARKS),
    "qwen3_vl": TinyFamily(tiny_configs.qwen3_vl, tiny_processors.qwen3_vl, _QWEN, _QWEN_MARKS),
    "idefics3": TinyFamily(tiny_configs.idefics3, tiny_processors.idefics3, _IDEFICS, _IDEFICS_MARKS),
    "smolvlm": TinyFamily(tiny_configs.smolvlm, tiny_processors.idefics3, _IDEFICS, _IDEFICS_MARKS),
    "internvl": TinyFamily(
        tiny_configs.internvl,
        tiny_processors.internvl,
        {
            **_CHATML,
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        ("<|im_start|>",),
    ),
    "gemma3": TinyFamily(
        tiny_configs.gemma3,
        tiny_processors.gemma3,
        {
            **_GEMMA,
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        ("<start_of_turn>",),
        add_bos=True,
    ),
    "mllama": TinyFamily(
        tiny_configs.mllama,
        tiny_processors.mllama,
        _special("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", image_token="<|image|>"),
        ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"),
        add_bos=True,
    ),
}
"""The families of ``build_tiny``, named as transformers' model types are."""


def build_tiny(
    family: str,
    folder: Path | str,
    *,
    seed: int = 0,
    layers: int = 4,
    hidden: int = 32,
    dropout: float = 0.0,
    tower: str = "clip",
    split_images: bool = False,
) -> Path:
    """Write a tiny model with random weights and its processor to a folder; returns the folder.

    The processors of Qwen-VL, InternVL and LLaVA-OneVision have a video processor, which the folder names and which
    only loads where torchvision is installed; elsewhere such a folder loads by ``models.processor.load_processor``, or
    by ``AutoProcessor`` in an ``optional_video_processor`` block.

    Args:
        family: One of ``FAMILIES``, named as transformers' model types are.
        folder: Folder to create; it must not exist or be empty.
        seed: Random seed of the weights; the same seed and sizes give the same bytes.
        layers: Number of decoder blocks, at least 2.
        hidden: Hidden size of decoder and vision tower, a multiple of 32.
        dropout: Dropout probability of attention in decoder and vision tower.
        tower: Vision tower of the family llava, ``clip`` or ``dinov2``; other families have one kind.
        split_images: Whether idefics3, smolvlm and internvl cut large images into tiles (others always or never do).

    Raises:
        UserError: The family is unknown, a size is not possible, or the folder is not empty.

    Example:
        >>> import tempfile
        >>> from lightning_mm.models.loading import Backbone, load_model
        >>> with tempfile.TemporaryDirectory() as scratch:
        ...     folder = build_tiny("llava", Path(scratch) / "model", layers=2)
        ...     model = load_model(Backbone(path=str(folder)))
        >>> model.config.model_type, model.config.text_config.num_hidden_layers
        ('llava', 2)
    """
    folder = Path(folder)
    _check(family, folder, layers, hidden)
    recipe = FAMILIES[family]
    tokenizer = tiny_tokenizer(recipe.special, recipe.marks, add_bos=recipe.add_bos)
    sizes = TinySizes(tokenizer, layers, hidden, dropout, tower, split_images)
    with optional_video_processor():
        processor, config = recipe.processor(sizes), recipe.config(sizes)
    _random_model(config, tokenizer, seed).save_pretrained(folder)
    save_processor(processor, folder)
    _name_video_processor(folder, config)
    return folder


def _name_video_processor(folder: Path, config: PreTrainedConfig) -> None:
    """Name the family's video processor in the folder, as real folders do, also where none could be made."""
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if (name := tiny_processors.VIDEO_PROCESSORS.get(config.model_type)) and "video_processor" not in settings:
        settings["video_processor"] = {"video_processor_type": name}
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _random_model(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    # Initialization draws from the global generator; its state is restored afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        _fill_zero_parameters(model)
    assert isinstance(model, PreTrainedModel)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def _fill_zero_parameters(model: nn.Module) -> None:
    """Give values to Gemma 3's projection and Mllama's gates: initialized to zero, they would hide the image."""
    for name, parameter in model.named_parameters():
        if parameter.any():
            continue
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        elif name.endswith("gate"):
            parameter.fill_(1.0)


def _check(family: str, folder: Path, layers: int, hidden: int) -> None:
    if family not in FAMILIES:
        raise UserError(
            f"There is no tiny model of family {family!r}.", "It is not one of ours.", f"Use {', '.join(FAMILIES)}."
        )
    if layers < 2 or hidden % 32:
        raise UserError(
            f"A tiny model of layers={layers}, hidden={hidden} cannot be made.",
            "It takes 2 layers or more (some families treat the second in another way), and a width of whole heads.",
            "Use layers=4 and hidden=32 or 64.",
        )
    if not is_absent_or_empty(folder):
        raise UserError(f"{folder} is taken.", "It is not empty.", "Name another folder, or remove it.")
