"""The model's processor, loaded without remote code, with a record of its tokenizer's last input.

Data flow: ``load_processor(path)`` -> ``ModelProcessor``; ``data.chat`` renders messages with it, ``data.collator``
encodes texts and images.

A processor expands each image placeholder into many tokens before it tokenizes. Answers are located in the text before
that, so the text that reaches the tokenizer is recorded, with the character offsets of each token.

Shapes: B texts, L tokens after padding.
"""

import copy
import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PretrainedConfig, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.models.encoding import Encoding, RecordingTokenizer
from lightning_mm.models.loading import Backbone, read_config
from lightning_mm.models.pixel_bounds import PixelBounds, largest_image, set_pixel_bounds
from lightning_mm.models.template_limits import MOST_CHARACTERS, TemplateLimitError, limited, refuse_unlimited


@contextmanager
def optional_video_processor() -> Iterator[None]:
    """While active, processors can be made, loaded and saved without their optional video processor.

    The processors of Qwen-VL, InternVL and LLaVA-OneVision have a video processor even if no video is used. Video
    processors of transformers need torchvision, without which such a processor can neither be made nor loaded. If
    torchvision is installed, nothing changes.
    """
    if is_torchvision_available():
        yield
        return
    base: Any = ProcessorMixin
    own = base.__dict__["get_attributes"]

    def without_video(cls: type[ProcessorMixin]) -> list[str]:
        video = inspect.signature(cls.__init__).parameters.get("video_processor")
        left_out = "video_processor" if video is not None and video.default is None else None
        return [part for part in own.__func__(cls) if part != left_out]

    base.get_attributes = classmethod(without_video)
    try:
        yield
    finally:
        base.get_attributes = own


def save_processor(processor: ProcessorMixin, folder: str | Path) -> None:
    """Write a processor of transformers to a folder, with or without its optional video processor."""
    with optional_video_processor():
        processor.save_pretrained(folder)


def video_processor_argument(name: str) -> dict[str, Any]:
    """A ``video_processor`` argument for a processor's constructor; empty if torchvision is not installed.

    Args:
        name: Name of a video processor class of transformers.
    """
    return {"video_processor": getattr(transformers, name)()} if is_torchvision_available() else {}


Message = dict[str, Any]
_NUM_TRIALS = 100
"""Renderings of a template in which its memory is limited: the first are trials, before other threads do anything."""
_PLAIN = (str, int, float, tuple, list, type(None))


class ModelProcessor:
    """A model's processor, with its chat template, image tokens and special tokens.

    Args:
        processor: A multimodal processor of transformers with a fast tokenizer.
        config: The model's config.
    """

    def __init__(self, processor: Any, config: PretrainedConfig) -> None:
        self.processor, self.config = processor, config
        self._num_rendered = 0
        self.template = _chat_template(processor)
        self.image_token_ids = _image_token_ids(processor, config)
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
            log_decision(
                "data.pad_token", processor.tokenizer.eos_token, "the tokenizer has none; padding is masked out"
            )
        self._recording = copy.copy(processor)
        self._recording.tokenizer = RecordingTokenizer(processor.tokenizer)
        self.bounds, self._resized_to = PixelBounds(), PixelBounds()
        self._image_options = processor.image_processor.to_dict()

    def bound_pixels(self, bounds: PixelBounds) -> None:
        """Keep images within bounds from now on, by options of the image processor where it has them.

        They are saved with the processor, so that an exported model reads images as it was trained on.

        Args:
            bounds: Bounds on an image; without any, nothing changes.
        """
        if bounds not in (self.bounds, PixelBounds()):
            self.bounds, self._resized_to = bounds, set_pixel_bounds(self.processor.image_processor, bounds)

    @property
    def largest_image(self) -> int | None:
        """Width times height of the largest image that is not reduced; None where there is no such number."""
        bounds = (self._resized_to.max_pixels, largest_image(self.processor.image_processor))
        return min((bound for bound in bounds if bound is not None), default=None)

    @property
    def context_length(self) -> int | None:
        """Longest text of the model, in tokens; None if its config does not say."""
        length = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None

    @property
    def loaded_as(self) -> dict[str, str]:
        """What the processor does, by name, as it was loaded: its bounds on pixels are options of a run."""
        tokenizer = json.loads(self.processor.tokenizer.backend_tokenizer.to_str())
        rules = {name: value for name, value in tokenizer.items() if name not in ("padding", "truncation")}
        images = {name: json.dumps(value, default=str) for name, value in self._image_options.items()}
        return {
            "class": type(self.processor).__name__,
            "tokenizer": hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest(),
            "chat template": hashlib.sha256(self.template.encode()).hexdigest(),
            **{f"image_processor.{name}": value for name, value in sorted(images.items())},
        }

    @property
    def identity(self) -> str:
        """SHA-256 of all that decides how many tokens a row has, and what its pictures cost."""
        parts = (
            transformers.__version__,
            type(self.processor).__name__,
            self.template,
            self.processor.tokenizer.backend_tokenizer.to_str(),
            self.processor.image_processor.to_json_string(),
            repr(
                {k: v for k, v in sorted(vars(self.processor).items()) if isinstance(v, (str, int, float, tuple, list))}
            ),
            self.config.to_json_string(),
            repr(self.bounds),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def eos_token(self) -> str | None:
        """The token that ends an answer if the chat template writes none; None if the tokenizer has none."""
        token: str | None = self.processor.tokenizer.eos_token
        return token

    @cached_property
    def added_tokens(self) -> frozenset[str]:
        """Texts of the tokenizer's added and special tokens, except blank ones."""
        tokens = {str(token.content) for token in self.processor.tokenizer.added_tokens_decoder.values()}
        return frozenset(token for token in tokens if token.strip()) | self.special_tokens

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Texts of special tokens, which a conversation must not contain."""
        tokenizer = self.processor.tokenizer
        special = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
        own = {v for k, v in vars(self.processor).items() if k.endswith("_token") and isinstance(v, str)}
        return frozenset(token for token in special | own | set(tokenizer.all_special_tokens) if token.strip())

    @cached_property
    def named_tokens(self) -> frozenset[str]:
        """Special tokens with a purpose of their own: of the tokenizer, of the processor and in the model's config."""
        tokenizer = self.processor.tokenizer
        named = {getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        named |= {getattr(tokenizer, name, None) for name in ("sep_token", "cls_token", "mask_token")}
        named |= {value for name, value in vars(self.processor).items() if name.endswith("_token")}
        for config in (self.config, self.config.get_text_config()):
            ids = (value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index")))
            listed = [each for value in ids for each in (value if isinstance(value, (list, tuple)) else [value])]
            named |= {tokenizer.convert_ids_to_tokens(each) for each in listed if isinstance(each, int) and each >= 0}
        return frozenset(token for token in named if isinstance(token, str))

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The conversation rendered by the chat template within limits; its exceptions are not caught.

        Args:
            messages: Messages of the conversation, as the chat template takes them.
            add_generation_prompt: Whether to append the start of an answer; False by default.
            tools: Tools that the assistant may call, in OpenAI's form; None (default): none.
        """
        self._num_rendered += 1
        with limited(memory=self._num_rendered <= _NUM_TRIALS):
            text: str = self.processor.apply_chat_template(
                messages,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                tools=tools,
            )
        if len(text) > MOST_CHARACTERS:
            raise TemplateLimitError(f"it writes {len(text):,} characters")
        return text

    def encode(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], padding_side: Literal["left", "right"]
    ) -> Encoding:
        """Texts and images encoded by one call of the processor, whose exceptions are not caught.

        Args:
            texts: Rendered conversations.
            images: The images of each conversation; may be empty.
            padding_side: 'right' to train, 'left' to generate.
        """
        options = {
            "padding": True,
            "padding_side": padding_side,
            "truncation": False,
            "add_special_tokens": self._adds_special(texts[0]),
        }
        features = self._recording(
            text=list(texts),
            images=[[self._resized_to.resized(image) for image in row] for row in images] if any(images) else None,
            text_kwargs=options,
            return_tensors="pt",
        )
        recorder = self._recording.tokenizer
        inputs = {k: v for k, v in features.items() if isinstance(v, Tensor) and k in self.forward_names}
        assert recorder.offsets.shape[:2] == inputs["input_ids"].shape, "the last text tokenized is not the batch"
        return Encoding(inputs, recorder.texts, recorder.offsets)

    def image_token_counts(self, sizes: Sequence[tuple[int, int]]) -> list[int] | None:
        """Image tokens that the processor says it makes of images; None if it does not say.

        Args:
            sizes: Width and height of each image.
        """
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is None or self._resized_to != PixelBounds():
            return None
        try:  # not public, so that whatever it does it is not relied on
            counts = list(count(image_sizes=[(height, width) for width, height in sizes]).num_image_tokens)
        except Exception:
            return None
        return counts if len(counts) == len(sizes) else None

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each rendered conversation, with image placeholders not expanded."""
        if not texts:
            return []
        encoding = self.processor.tokenizer(list(texts), add_special_tokens=self._adds_special(texts[0]))
        return [len(ids) for ids in encoding["input_ids"]]

    def _adds_special(self, text: str) -> bool:
        bos = self.processor.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    @cached_property
    def forward_names(self) -> frozenset[str]:
        """Names of the arguments of the model's forward."""
        model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(self.config)]
        return frozenset(inspect.signature(model_class.forward).parameters)


def load_processor(path: str, revision: str | None = None) -> ModelProcessor:
    """A model's processor, loaded from a folder or the hub.

    Args:
        path: Folder or hub name of the model.
        revision: Commit, tag or branch of a hub model; None (default): the hub's default.

    Raises:
        UserError: There is no model or no processor, it needs remote code, or it does not take images and text.
    """
    config = read_config(Backbone(path, revision=revision))
    try:
        loader: Any = AutoProcessor
        with optional_video_processor():
            processor = loader.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # of any kind: the files are not ours
        raise UserError(
            f"The processor of {path} cannot be loaded.",
            str(error).strip().split("\n")[0],
            f"Name a folder that save_pretrained of model and processor wrote, or fetch it first: hf download {path}",
        ) from error
    return wrap_processor(processor, config, path)


def wrap_processor(processor: Any, config: PretrainedConfig, name: str = "This processor") -> ModelProcessor:
    """A processor that is loaded already, as the data module needs it.

    Args:
        processor: A processor of transformers, or a ``ModelProcessor``, which is returned as it is.
        config: The config of the model that it belongs to.
        name: What it is called in an error.

    Raises:
        UserError: It is no processor of images and text, or its tokenizer is a slow one.
    """
    if isinstance(processor, ModelProcessor):
        return processor
    _require_image_text_processor(name, processor, config)
    return ModelProcessor(processor, config)


def _require_image_text_processor(path: str, processor: Any, config: PretrainedConfig) -> None:
    fix = "Choose a model with a fast tokenizer."
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        fix = "Choose a model that takes pictures and text."
        why = f"{type(config).__name__} belongs to no image-text-to-text model of transformers."
    elif not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        fix = "Give what AutoProcessor.from_pretrained returns for a model that takes both."
        why = f"{type(processor).__name__} does not take both pictures and text."
    elif not processor.tokenizer.is_fast:
        why = f"{type(processor.tokenizer).__name__} cannot say which characters a token stands for."
    else:
        return
    raise UserError(f"{path} cannot be trained on pictures and text.", why, fix)


def _chat_template(processor: Any) -> str:
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise UserError(
            "The model has no chat template.",
            "Neither its processor nor its tokenizer says how a conversation is written.",
            "Put a chat_template.jinja beside its processor_config.json; base models often lack one that their "
            "instruction-tuned sibling has.",
        )
    try:
        refuse_unlimited(template)
    except TemplateLimitError as error:
        raise UserError(
            "The model's chat template is not used.", str(error), "Take the template of a model that you trust."
        ) from error
    return template


def _image_token_ids(processor: Any, config: PretrainedConfig) -> tuple[int, ...]:
    """Ids of image tokens in ``input_ids``, from the model's config if it has one, else from the processor."""
    for owner in (config, getattr(config, "vision_config", None), processor):
        for name in ("image_token_id", "image_token_index"):
            if isinstance(token_id := getattr(owner, name, None), int):
                return (token_id,)
    raise UserError(
        f"{type(config).__name__} does not say which token stands for a picture.",
        "It has neither image_token_id nor image_token_index.",
        "Add image_token_id to the model's config.json.",
    )
