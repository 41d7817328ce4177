"""Tokenizer, chat templates and processors of the tiny models: each family's own processor class at small sizes.

The byte-level BPE tokenizer is trained on the text below: no file, no network, the same result every time. Chat
templates have the formats of published families; message contents may be a string, or a list of ``{"type": "image"}``
and ``{"type": "text", ...}`` parts. PIL's image processors are used because torchvision may be absent; where it is
installed, the saved folder loads as torchvision's.

Data flow: text -> 384 tokens (256 bytes and 128 merges) + the family's special tokens -> tokenizer; ``TinySizes`` ->
processor with its chat template -> ``tiny.build_tiny``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AyaVisionProcessor,
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
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)

from lightning_mm.models.processor import video_processor_argument
from lightning_mm.testing.tiny_configs import GRIDS, PATCH, SIDE, TinySizes

NUM_LEARNED = 384
TEXT = """\
What is in the picture? There is a red circle on the left and a blue square on the right. How many circles are there?
There are two circles in the picture. Is the cat under the table? No, the cat is on the table, and the dog is under it.
What colour is the bird? The bird is green. Is this an animal, food, a vehicle, a household object, clothing or a plant?
An animal. What is the capital of the country with this flag? The capital is Paris. Answer with one word. Yes. No.
Describe the image. The image shows a small yellow boat on the water, with three white clouds above it.
"""


def tiny_tokenizer(
    named: Mapping[str, str], marks: Sequence[str] = (), *, add_bos: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer of one family.

    Args:
        named: Special tokens by attribute name: ``bos_token``, ``eos_token``, ``pad_token``, and those of processors.
        marks: Further special tokens, such as those around a turn.
        add_bos: Whether the BOS token is put before every text, as Llama's and Gemma's tokenizers do.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_LEARNED, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(TEXT.splitlines(), trainer)
    bpe.add_special_tokens(list(dict.fromkeys([*named.values(), *marks])))
    if add_bos:
        bos = named["bos_token"]
        bpe.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bpe.token_to_id(bos))]
                ),
            ]
        )
    common = {name: token for name, token in named.items() if name in ("bos_token", "eos_token", "pad_token")}
    others = {name: token for name, token in named.items() if name not in common}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=others, model_max_length=4096, **common)


def chatml(image: str, system: str = "") -> str:
    """Qwen, InternVL, SmolLM2: ``<|im_start|>user\\n...<|im_end|>\\n``.

    Args:
        image: Placeholder of an image in the text.
        system: Default system prompt of conversations without one, as Qwen2-VL's; empty adds none.
    """
    first = (
        f"{{%- if loop.first and message['role'] != 'system' -%}}{{{{- {_turn('system', system)!r} -}}}}{{%- endif -%}}"
    )
    return _conversation(
        (first if system else "")
        + "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        + _content(image)
        + _emit("<|im_end|>\n"),
        prompt="<|im_start|>assistant\n",
    )


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def vicuna(image: str) -> str:
    """LLaVA 1.5: ``USER: ... ASSISTANT: ...</s>``; the answer's leading space is not part of the prompt."""
    return _conversation(
        "{%- if message['role'] == 'system' -%}"
        + _content(image)
        + "{{- ' ' -}}{%- else -%}{{- message['role'] | upper + ': ' -}}"
        + _content(image)
        + "{{- '</s>' if message['role'] == 'assistant' else ' ' -}}{%- endif -%}",
        prompt="ASSISTANT:",
    )


def mistral(image: str) -> str:
    """LLaVA-NeXT on Mistral, Pixtral: ``<s>[INST] ... [/INST] ...</s>``; nothing marks the assistant's turn."""
    return "{{- '<s>' -}}" + _conversation(
        "{%- if message['role'] == 'assistant' -%}{{- ' ' -}}"
        + _content(image)
        + "{{- '</s>' -}}{%- else -%}{{- '[INST] ' -}}"
        + _content(image)
        + "{{- ' [/INST]' -}}{%- endif -%}",
        prompt="",
    )


def gemma(image: str) -> str:
    """Gemma: ``<bos><start_of_turn>user\\n...<end_of_turn>\\n``; the assistant's role is ``model``."""
    return "{{- '<bos>' -}}" + _conversation(
        "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}"
        + _content(image, " | trim")
        + _emit("<end_of_turn>\n"),
        prompt="<start_of_turn>model\n",
    )


def llama3(image: str) -> str:
    """Llama 3: ``<|start_header_id|>user<|end_header_id|>\\n\\n...<|eot_id|>``."""
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return "{{- '<|begin_of_text|>' -}}" + _conversation(
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
        + _content(image, " | trim")
        + _emit("<|eot_id|>"),
        prompt=header.format("assistant"),
    )


def idefics(image: str) -> str:
    """Idefics3, SmolVLM: ``<|im_start|>User:...<end_of_utterance>\\nAssistant: ...``."""
    return "{{- '<|im_start|>' -}}" + _conversation(
        "{{- message['role'] | capitalize -}}"
        "{{- ':' if message['content'] is not string and message['content'][0]['type'] == 'image' else ': ' -}}"
        + _content(image)
        + _emit("<end_of_utterance>\n"),
        prompt="Assistant:",
    )


def cohere(image: str) -> str:
    """Cohere: ``<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>...<|END_OF_TURN_TOKEN|>``."""
    roles = "{'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}"
    return "{{- '<BOS_TOKEN>' -}}" + _conversation(
        f"{{{{- '<|START_OF_TURN_TOKEN|><|' + {roles}[message['role']] + '_TOKEN|>' -}}}}"
        + _content(image)
        + _emit("<|END_OF_TURN_TOKEN|>"),
        prompt="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    )


def _conversation(message: str, prompt: str) -> str:
    ending = f"{{%- if add_generation_prompt -%}}{_emit(prompt)}{{%- endif -%}}" if prompt else ""
    return f"{{%- for message in messages -%}}{message}{{%- endfor -%}}{ending}"


def _emit(text: str) -> str:
    return f"{{{{- {text!r} -}}}}"


def _content(image: str, filters: str = "") -> str:
    return (
        f"{{%- if message['content'] is string -%}}{{{{- message['content']{filters} -}}}}{{%- else -%}}"
        "{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'image' -%}}{_emit(image)}"
        f"{{%- elif part['type'] == 'text' -%}}{{{{- part['text']{filters} -}}}}{{%- endif -%}}"
        "{%- endfor -%}{%- endif -%}"
    )


VIDEO_PROCESSORS = {
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "internvl": "InternVLVideoProcessor",
}
"""Class names of the video processors, by model type."""

SQUARE = {"height": SIDE, "width": SIDE}
CLIP: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
CLASS_TOKEN: dict[str, Any] = {
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def llava(sizes: TinySizes) -> ProcessorMixin:
    """One square per image."""
    images = CLIPImageProcessorPil(**CLIP)
    return LlavaProcessor(images, sizes.tokenizer, chat_template=vicuna("<image>\n"), **CLASS_TOKEN)


def aya_vision(sizes: TinySizes) -> ProcessorMixin:
    """One square per image; tokens between those that begin and end an image."""
    return AyaVisionProcessor(
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=1),
        sizes.tokenizer,
        patch_size=PATCH,
        img_size=SIDE,
        downsample_factor=2,
        chat_template=cohere("<image>"),
    )


def llava_next(sizes: TinySizes) -> ProcessorMixin:
    """The whole image, and the tiles of the grid that fits best."""
    images = LlavaNextImageProcessorPil(**CLIP, image_grid_pinpoints=GRIDS)
    return LlavaNextProcessor(images, sizes.tokenizer, chat_template=mistral("<image>\n"), **CLASS_TOKEN)


def llava_onevision(sizes: TinySizes) -> ProcessorMixin:
    """Tiles as in LLaVA-NeXT."""
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRIDS),
        sizes.tokenizer,
        **video_processor_argument(VIDEO_PROCESSORS["llava_onevision"]),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>\n"),
    )


def _qwen(kind: type[ProcessorMixin], video: str, sizes: TinySizes, system: str = "") -> ProcessorMixin:
    # Pixels, not sides: between 1 and 16 tokens of 2 x 2 patches.
    size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 16 * (2 * PATCH) ** 2}
    return kind(
        Qwen2VLImageProcessorPil(size=size, patch_size=PATCH, temporal_patch_size=2, merge_size=2),
        sizes.tokenizer,
        **video_processor_argument(video),
        chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>", system),
    )


def qwen2_vl(sizes: TinySizes) -> ProcessorMixin:
    """Any size, aspect ratio kept; the template adds a default system prompt."""
    return _qwen(Qwen2VLProcessor, VIDEO_PROCESSORS["qwen2_vl"], sizes, "You are a helpful assistant.")


def qwen2_5_vl(sizes: TinySizes) -> ProcessorMixin:
    """Same as Qwen2-VL."""
    return _qwen(Qwen2_5_VLProcessor, VIDEO_PROCESSORS["qwen2_5_vl"], sizes, "You are a helpful assistant.")


def qwen3_vl(sizes: TinySizes) -> ProcessorMixin:
    """As Qwen2-VL, without a default system prompt."""
    return _qwen(Qwen3VLProcessor, VIDEO_PROCESSORS["qwen3_vl"], sizes)


def idefics3(sizes: TinySizes) -> ProcessorMixin:
    """One square per image, or with splitting also its tiles, each preceded by its row and column.

    Also used for SmolVLM, whose own processor requires the package num2words for video.
    """
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE if sizes.split_images else SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=sizes.split_images,
    )
    return Idefics3Processor(images, sizes.tokenizer, image_seq_len=4, chat_template=idefics("<image>"))


def internvl(sizes: TinySizes) -> ProcessorMixin:
    """One square per image, or with splitting up to 4 tiles and a thumbnail."""
    return InternVLProcessor(
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4 if sizes.split_images else 1),
        sizes.tokenizer,
        **video_processor_argument(VIDEO_PROCESSORS["internvl"]),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )


def gemma3(sizes: TinySizes) -> ProcessorMixin:
    """One square per image; image tokens between begin and end tokens and empty lines."""
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE),
        sizes.tokenizer,
        image_seq_length=4,
        chat_template=gemma("<start_of_image>"),
    )


def mllama(sizes: TinySizes) -> ProcessorMixin:
    """Up to 4 tiles per image, one token in the text."""
    images = MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4)
    return MllamaProcessor(images, sizes.tokenizer, chat_template=llama3("<|image|>"))
