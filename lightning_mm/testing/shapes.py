"""Writes folders of full-size models without weights: what ``plan`` counts on, where the model itself is not at hand.

The configuration is the released one. The tokenizer is that of the tiny models: token counts of a text are not the
model's, so give lengths in tokens (``plan --image_tokens``, ``--text_tokens``).

Data flow: name of a shape -> its entry in ``shapes.yaml`` -> configuration and processor -> a folder that ``planning``
and ``Backbone`` read.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
import yaml
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import is_absent_or_empty
from lightning_mm.models.processor import optional_video_processor, save_processor, video_processor_argument
from lightning_mm.testing import tiny_processors
from lightning_mm.testing.tiny import FAMILIES
from lightning_mm.testing.tiny_processors import tiny_tokenizer


@dataclass(frozen=True)
class Shape:
    """A released model of full size.

    Args:
        hub: Its name on the hub.
        parameters: Number of its parameters, as the hub shows it.
        config: Its configuration by option, with tokens in the place of their ids.
        processor: Classes and options of its processor.
        chat: Name and options of its chat template in ``tiny_processors``.
        special: Special tokens by attribute name of the tokenizer.
        marks: Further special tokens.
        add_bos: Whether the tokenizer puts the BOS token before every text.
    """

    hub: str
    parameters: float
    config: dict[str, Any]
    processor: dict[str, Any]
    chat: dict[str, str]
    special: dict[str, str]
    marks: tuple[str, ...]
    add_bos: bool


@cache
def _shapes() -> dict[str, Shape]:
    entries = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text(encoding="utf-8"))
    return {name: _shape(**entry) for name, entry in entries.items()}


def _shape(
    *, hub: str, published: float, family: str = "", marks: list[str] | None = None, add_bos: bool = False, **parts: Any
) -> Shape:
    if family:
        tiny = FAMILIES[family]
        return Shape(hub, published, special=tiny.special, marks=tiny.marks, add_bos=tiny.add_bos, **parts)
    return Shape(hub, published, marks=tuple(marks or ()), add_bos=add_bos, **parts)


SHAPES = tuple(_shapes())
"""Models whose shape can be written; the shipped recipes ``models/NAME.yaml`` have the same names."""


def shape(name: str) -> Shape:
    """What is known of a released model.

    Args:
        name: One of ``SHAPES``.

    Raises:
        UserError: There is no such shape.
    """
    if name not in SHAPES:
        raise UserError(f"There is no shape {name!r}.", f"There are {', '.join(SHAPES)}.", "Name one of those.")
    return _shapes()[name]


def build_shape(name: str, folder: Path | str) -> Path:
    """Write configuration and processor of a model of full size to a folder, without weights; returns the folder.

    Args:
        name: One of ``SHAPES``. llava-1.5-7b: CLIP ViT-L/14 at 336 pixels (576 image tokens) and Vicuna-7B.
        folder: Folder to create; it must not exist or be empty.

    Raises:
        UserError: There is no such shape, or the folder is not empty.
    """
    folder = Path(folder)
    wanted = shape(name)
    if not is_absent_or_empty(folder):
        raise UserError(f"{folder} is not empty.", "Nothing is overwritten.", "Name another folder.")
    tokenizer = tiny_tokenizer(wanted.special, wanted.marks, add_bos=wanted.add_bos)
    config = _config(wanted, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with optional_video_processor():
        processor = _processor(wanted, tokenizer)
    save_processor(processor, folder)
    return folder


def _config(wanted: Shape, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The released configuration, with ids of the tiny tokenizer."""
    options = {name: _token_id(tokenizer, name, value) for name, value in wanted.config.items()}
    own = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    options["text_config"] = {**options["text_config"], **own}
    config: PreTrainedConfig = AutoConfig.for_model(**options)
    model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    config.architectures = [model_class.__name__]
    return config


def _token_id(tokenizer: PreTrainedTokenizerFast, name: str, value: Any) -> Any:
    if not isinstance(value, str) or not name.endswith(("_token_id", "_token_index")):
        return value
    index = tokenizer.convert_tokens_to_ids(value)
    assert isinstance(index, int), f"{name}: the tokenizer has no {value}"
    return index


def _processor(wanted: Shape, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    options = dict(wanted.processor)
    kind = getattr(transformers, options.pop("class"))
    of_images = dict(options.pop("image_processor"))
    images = getattr(transformers, of_images.pop("class"))(**of_images)
    video = options.pop("video_processor", None)
    chat = dict(wanted.chat)
    template = getattr(tiny_processors, chat.pop("template"))(**chat)
    more = {} if video is None else video_processor_argument(video)
    made: ProcessorMixin = kind(images, tokenizer, **more, **options, chat_template=template)
    return made
