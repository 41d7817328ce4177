"""Tiny random models of many families, as complete Hugging Face folders: the real classes, made in a second, offline.

Data flow: family name and sizes -> ``tiny_tokenizer`` -> ``tiny_configs`` and ``tiny_processors`` -> a folder that
``AutoModelForImageTextToText`` and ``AutoProcessor`` load.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import is_absent_or_empty
from lightning_mm.models.processor import optional_video_processor, save_processor
from lightning_mm.testing import tiny_configs, tiny_processors
from lightning_mm.testing.tiny_configs import Plan
from lightning_mm.testing.tiny_processors import tiny_tokenizer


@dataclass(frozen=True)
class Family:
    """What makes one family.

    Args:
        config: Gives the model's shape.
        processor: Gives its processor.
        special: Special tokens by name.
        marks: Special tokens that processors do not ask for by name.
        add_bos: Whether the tokenizer puts the first token before every text.
    """

    config: Callable[[Plan], PreTrainedConfig]
    processor: Callable[[Plan], ProcessorMixin]
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
_GEMMA = _special("<bos>", "<end_of_turn>", "<pad>")

FAMILIES: dict[str, Family] = {
    "llava": Family(
        tiny_configs.llava,
        tiny_processors.llava,
        _special("<s>", "</s>", "<pad>", image_token="<image>"),
        add_bos=True,
    ),
    "llava_next": Family(
        tiny_configs.llava_next,
        tiny_processors.llava_next,
        _special("<s>", "</s>", "<pad>", image_token="<image>"),
        ("[INST]", "[/INST]"),
        add_bos=True,
    ),
    "llava_onevision": Family(
        tiny_configs.llava_onevision,
        tiny_processors.llava_onevision,
        {**_CHATML, "image_token": "<image>", "video_token": "<video>"},
        ("<|im_start|>",),
    ),
    "qwen2_vl": Family(tiny_configs.qwen2_vl, tiny_processors.qwen2_vl, _QWEN, _QWEN_MARKS),
    "qwen2_5_vl": Family(tiny_configs.qwen2_5_vl, tiny_processors.qwen2_5_vl, _QWEN, _QWEN_MARKS),
    "qwen3_vl": Family(tiny_configs.qwen3_vl, tiny_processors.qwen3_vl, _QWEN, _QWEN_MARKS),
    "idefics3": Family(tiny_configs.idefics3, tiny_processors.idefics3, _IDEFICS, _IDEFICS_MARKS),
    "smolvlm": Family(tiny_configs.smolvlm, tiny_processors.idefics3, _IDEFICS, _IDEFICS_MARKS),
    "internvl": Family(
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
    "gemma3": Family(
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
    "mllama": Family(
        tiny_configs.mllama,
        tiny_processors.mllama,
        _special("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", image_token="<|image|>"),
        ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"),
        add_bos=True,
    ),
}


def build_tiny(
    family: str,
    out: Path | str,
    *,
    seed: int = 0,
    layers: int = 4,
    hidden: int = 32,
    dropout: float = 0.0,
    tower: str = "clip",
    split_images: bool = False,
) -> Path:
    """Write a tiny model with random weights.

    Args:
        family: One of ``FAMILIES``, named as transformers' model types are.
        out: The folder to make; it must not exist or be empty.
        seed: Of the weights; the same seed and sizes give the same bytes.
        layers: Blocks of the decoder, at least 2.
        hidden: Width of decoder and tower, a multiple of 32.
        dropout: Of attention, in decoder and tower.
        tower: ``clip`` or ``dinov2``; read by the family llava only.
        split_images: Cut large pictures into tiles; read by idefics3, smolvlm and internvl (others always or never do).

    Returns:
        ``out``.

    Raises:
        UserError: If the family is unknown, or the folder is taken.
    """
    out = Path(out)
    _check(family, out, layers, hidden)
    made = FAMILIES[family]
    tokenizer = tiny_tokenizer(made.special, made.marks, add_bos=made.add_bos)
    plan = Plan(tokenizer, layers, hidden, dropout, tower, split_images)
    with optional_video_processor():
        processor, config = made.processor(plan), made.config(plan)
    _draw(config, plan, seed).save_pretrained(out)
    save_processor(processor, out)
    return out


def _draw(config: PreTrainedConfig, plan: Plan, seed: int) -> PreTrainedModel:
    # Initialisation draws from the global generator: its state is put back, so that nothing else moves.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        _open_eyes(model)
    assert isinstance(model, PreTrainedModel)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = plan.tokenizer.eos_token_id
    model.generation_config.pad_token_id = plan.tokenizer.pad_token_id
    return model


@torch.no_grad()
def _open_eyes(model: nn.Module) -> None:
    """Gemma 3's projection and Mllama's gates start at zero and wait for a checkpoint: such a model would be blind."""
    for name, parameter in model.named_parameters():
        if parameter.any():
            continue
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        elif name.endswith("gate"):
            parameter.fill_(1.0)


def _check(family: str, out: Path, layers: int, hidden: int) -> None:
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
    if not is_absent_or_empty(out):
        raise UserError(f"{out} is taken.", "It is not empty.", "Name another folder, or remove it.")
