"""Length of each conversation in tokens, computed without decoding an image, for batching by length.

The ranks share the work. Text is tokenized after the chat template; each image size is measured once with a blank
image through the processor. A length is exact where an image takes as many tokens beside other images as beside one of
its own size, and an estimate elsewhere. Of a conversation that the collator will reject, the readable parts count.

Data flow: Samples -> chat template -> tokenizer; image headers -> sizes -> blank images -> processor ->
``TokenLengths`` -> ``batch_samplers``.

Shapes: N samples.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import all_gather_object, rank_and_world_size
from lightning_mm.data import videos
from lightning_mm.data.chat import ChatError, ChatRenderer
from lightning_mm.data.image_source import ImageSource
from lightning_mm.data.images import BadImage, check_header
from lightning_mm.data.sample import IMAGE_MARK, Sample, Turn
from lightning_mm.data.sample_encoder import ENCODE_ERRORS, gray_image, with_frames
from lightning_mm.models.processor import ModelProcessor

Size = tuple[int, int]
_CHUNK = 1024
MAX_SIZES = 256
"""Sizes of pictures that are measured one by one."""
_CELL = math.log(1.05)


@dataclass(frozen=True)
class TokenLengths:
    """Length and cost of each sample.

    Args:
        tokens: (N,) int64 tokens of the row, image tokens included. Images that the decoder reads by cross-attention
            take none.
        vision: (N,) float64 cost of the vision encoder, in decoder tokens of equal cost.
    """

    tokens: Tensor
    vision: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def costs(self) -> Tensor:
        """(N,) float64 cost of each sample, in decoder tokens."""
        return self.tokens + self.vision

    @property
    def digest(self) -> int:
        """CRC-32 of both tensors; part of the identity of an order of batches."""
        return zlib.crc32(self.tokens.numpy().tobytes() + self.vision.numpy().tobytes())


def measure_token_lengths(
    samples: Sequence[Sample],
    processing: ModelProcessor,
    *,
    max_length: int | None = None,
    max_megapixels: float = 40.0,
    sizes: Mapping[ImageSource, Size] | None = None,
    video_frames: int = 8,
) -> TokenLengths:
    """Lengths of samples, equal on every rank; each rank measures its share.

    Args:
        samples: N training samples.
        processing: The model's processor.
        max_length: Length in tokens at which longer rows are truncated; None truncates none.
        max_megapixels: Limit on the size of an image, in megapixels.
        sizes: Width and height in pixels, as displayed, of images whose headers have been read; None reads all headers.
        video_frames: Frames per video.
    """
    rank, world_size = rank_and_world_size()
    meter = _LengthMeter(processing, max_megapixels, dict(sizes or {}), video_frames)
    rows = meter.measure(samples[rank::world_size])
    parts = all_gather_object(rows)
    whole = torch.zeros(len(samples), 2, dtype=torch.float64)
    for number, part in enumerate(parts):
        whole[number::world_size] = torch.tensor(part, dtype=torch.float64).reshape(-1, 2)
    tokens = whole[:, 0].long().clamp(1, max_length)
    lengths = f"{int(tokens.min())} to {int(tokens.max())} tokens, {tokens.double().mean():.0f} on average"
    log_decision("data.lengths", lengths, "by the tokenizer, and a blank picture of each size through the processor")
    return TokenLengths(tokens, whole[:, 1].contiguous())


def local_token_lengths(
    samples: Sequence[Sample], processing: ModelProcessor, max_megapixels: float = 40.0, video_frames: int = 8
) -> list[int]:
    """Tokens of each sample, measured by this rank alone.

    Args:
        samples: As for ``measure_token_lengths``.
        processing: As for ``measure_token_lengths``.
        max_megapixels: As for ``measure_token_lengths``.
        video_frames: As for ``measure_token_lengths``.
    """
    return [tokens for tokens, _ in _LengthMeter(processing, max_megapixels, {}, video_frames).measure(samples)]


class _LengthMeter:
    """Measures samples with one processor; keeps the sizes and token counts of images."""

    def __init__(
        self, processing: ModelProcessor, max_megapixels: float, sizes: dict[ImageSource, Size], video_frames: int
    ) -> None:
        self._processing, self._max_megapixels, self._video_frames = processing, max_megapixels, video_frames
        self._chat = ChatRenderer(processing)
        self._sizes: dict[ImageSource, Size | None] = {**sizes}
        self._questions = [
            self._chat.render_unmarked((Turn("user", f"{IMAGE_MARK * n}\nLorem ipsum"),)) for n in (1, 2)
        ]
        self._text_tokens = processing.num_tokens(self._questions)
        self._weight = vision_weight(processing.config)
        self._image_costs: dict[tuple[Size, bool], tuple[int, float]] = {}
        self._clips: dict[ImageSource, list[Size]] = {}

    def measure(self, samples: Sequence[Sample]) -> list[tuple[int, float]]:
        """Tokens and vision cost of each sample."""
        for sample in samples:
            self._sizes.update(zip(sample.images, sample.sizes, strict=False))
        self._read_headers({path for sample in samples for path in sample.images})
        self._clips = {video: self._clip(video) for sample in samples for video in sample.videos}
        frames = {size for sizes in self._clips.values() for size in sizes}
        representatives = representative_sizes({size for size in self._sizes.values() if size} | frames)
        rows = []
        for start in range(0, len(samples), _CHUNK):
            chunk = samples[start : start + _CHUNK]
            texts = self._processing.num_tokens([self._text(sample) for sample in chunk])
            for sample, tokens in zip(chunk, texts, strict=True):
                sizes = [size for path in sample.images if (size := self._sizes[path])]
                sizes += [size for video in sample.videos for size in self._clips[video]]
                seen = [self._image_cost(representatives[size], len(sizes) > 1) for size in sizes]
                rows.append((tokens + sum(t for t, _ in seen), sum(v for _, v in seen)))
        return rows

    def _text(self, sample: Sample) -> str:
        turns = with_frames(sample.turns, [len(self._clips[video]) for video in sample.videos])
        try:
            return self._chat.render_unmarked(turns, sample.tools)
        except ChatError:
            return "".join(turn.text for turn in sample.turns)

    def _read_headers(self, paths: set[ImageSource]) -> None:
        missing = sorted(paths - self._sizes.keys(), key=str)
        with ThreadPoolExecutor(8) as pool:
            self._sizes.update(zip(missing, pool.map(self._size, missing), strict=True))

    def _clip(self, video: ImageSource) -> list[Size]:
        """Width and height of each frame of a video; empty where it cannot be read."""
        try:
            return videos.check_header(video, self._video_frames, self._max_megapixels)
        except BadImage:
            return []

    def _size(self, path: ImageSource) -> Size | None:
        try:
            return check_header(path, self._max_megapixels)
        except BadImage:
            return None

    def _image_cost(self, size: Size, has_others: bool) -> tuple[int, float]:
        """Tokens that an image adds to its placeholder, alone or beside another image, and its vision cost."""
        if (size, has_others) not in self._image_costs:
            count = 2 if has_others else 1
            blanks = [gray_image(size)] * count
            try:
                inputs = self._processing.encode([self._questions[has_others]], [blanks], "right").inputs
                tokens = inputs["input_ids"].shape[1] - self._text_tokens[has_others]
                patches = num_patches(inputs, self._processing.config)
                self._image_costs[size, has_others] = (tokens // count, patches / count * self._weight)
            except ENCODE_ERRORS:
                self._image_costs[size, has_others] = (0, 0.0)
        return self._image_costs[size, has_others]


def representative_sizes(sizes: set[Size]) -> dict[Size, Size]:
    """Size -> size that it is measured as: itself, or, with very many sizes, the largest within about 5 %."""
    if len(sizes) <= MAX_SIZES:
        return {size: size for size in sizes}
    cells: dict[Size, Size] = {}
    for width, height in sizes:
        cell = (round(math.log(width) / _CELL), round(math.log(height) / _CELL))
        widest, highest = cells.get(cell, (0, 0))
        cells[cell] = (max(width, widest), max(height, highest))
    log_decision(
        "data.lengths", f"{len(sizes)} picture sizes measured as {len(cells)}", "sizes within 5 % count as one"
    )
    return {(w, h): cells[round(math.log(w) / _CELL), round(math.log(h) / _CELL)] for w, h in sizes}


def num_patches(inputs: Mapping[str, Tensor], config: Any) -> float:
    """Number of patches of the vision encoder's input."""
    if (grid := inputs.get("image_grid_thw")) is not None:
        return float(grid.prod(-1).sum())
    if (pixels := inputs.get("pixel_values")) is None:
        return 0.0
    side: Any = getattr(config.vision_config, "patch_size", 14)
    area = math.prod(side) if isinstance(side, (list, tuple)) else side**2
    return pixels.numel() / (3 * area)


def vision_weight(config: Any) -> float:
    """Cost of one patch in the vision encoder, in decoder tokens; 1 where the config does not say."""
    decoder, encoder = _work_of_token(config.get_text_config()), _work_of_token(getattr(config, "vision_config", None))
    return encoder / decoder if decoder and encoder else 1.0


def _work_of_token(config: Any) -> float:
    """Multiplications per token in the weight matrices of all blocks, attention scores left out."""

    def first(*names: str) -> float:
        return next((float(value) for name in names if isinstance(value := getattr(config, name, None), int)), 0.0)

    width = first("embed_dim", "hidden_size")  # in Qwen2-VL's tower, hidden_size is the output's
    return first("num_hidden_layers", "depth") * width * (4 * width + 3 * (first("intermediate_size") or 4 * width))
