"""How long each conversation will be in tokens, known before a picture is decoded.

Data flow: Samples -> the chat template's text -> the tokenizer; sizes in picture headers -> a blank picture of each
size through the processor, once -> ``TokenLengths`` -> ``budget``, which puts like with like.

The ranks share the work. A length is exact where a picture takes as many tokens beside others as it takes beside its
like, and an estimate elsewhere; of a conversation that will fall out as it is collated, what could be read counts.

Shapes: N samples.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightning_mm.core.decisions import decide
from lightning_mm.core.distributed import all_gather_object, rank_and_world_size
from lightning_mm.data.chat import Chat, ChatError
from lightning_mm.data.collator import ENCODE_ERRORS
from lightning_mm.data.images import BadImage, check_header
from lightning_mm.data.sample import IMAGE_MARK, Sample, Turn
from lightning_mm.models.processor import Processing

Size = tuple[int, int]
_MID_GREY = (127, 127, 127)
_CHUNK = 1024
_MAX_SIZES = 256
_CELL = math.log(1.05)


@dataclass(frozen=True)
class TokenLengths:
    """What each sample costs.

    Args:
        tokens: (N,) int64 length of the row, image tokens included. Pictures that the decoder reads by cross-attention
            take no place in it.
        vision: (N,) float64 work of the vision encoder, in tokens of the decoder that are as much work.
    """

    tokens: Tensor
    vision: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def costs(self) -> Tensor:
        """(N,) float64 work of each sample, in tokens of the decoder."""
        return self.tokens + self.vision

    @property
    def digest(self) -> int:
        """Of both: an order that was made with others is another order."""
        return zlib.crc32(self.tokens.numpy().tobytes() + self.vision.numpy().tobytes())


def measure_token_lengths(
    samples: Sequence[Sample],
    processing: Processing,
    *,
    max_length: int | None = None,
    max_megapixels: float = 40.0,
    sizes: Mapping[Path, Size] | None = None,
) -> TokenLengths:
    """Lengths of samples, the same on every rank; each measures its share.

    Args:
        samples: Of a training set.
        processing: The model's processor.
        max_length: Where longer rows are cut.
        max_megapixels: Largest picture that is decoded.
        sizes: Of pictures whose headers have been read, as they lie on the screen.
    """
    rank, world_size = rank_and_world_size()
    ruler = _LengthMeter(processing, max_megapixels, dict(sizes or {}))
    rows = ruler.measure(samples[rank::world_size])
    parts = all_gather_object(rows)
    whole = torch.zeros(len(samples), 2, dtype=torch.float64)
    for number, part in enumerate(parts):
        whole[number::world_size] = torch.tensor(part, dtype=torch.float64).reshape(-1, 2)
    tokens = whole[:, 0].long().clamp(1, max_length)
    told = f"{int(tokens.min())} to {int(tokens.max())} tokens, {tokens.double().mean():.0f} on average"
    decide("data.lengths", told, "by the tokenizer, and a blank picture of each size through the processor")
    return TokenLengths(tokens, whole[:, 1].contiguous())


class _LengthMeter:
    """Measures samples."""

    def __init__(self, processing: Processing, max_megapixels: float, sizes: dict[Path, Size]) -> None:
        self._processing, self._max_megapixels = processing, max_megapixels
        self._chat = Chat(processing)
        self._sizes: dict[Path, Size | None] = {**sizes}
        self._questions = [
            self._chat.render_unmarked((Turn("user", f"{IMAGE_MARK * n}\nLorem ipsum"),)) for n in (1, 2)
        ]
        self._bare = processing.num_tokens(self._questions)
        self._weight = vision_weight(processing.config)
        self._pictures: dict[tuple[Size, bool], tuple[int, float]] = {}

    def measure(self, samples: Sequence[Sample]) -> list[tuple[int, float]]:
        """Tokens and vision cost of each."""
        self._read_headers({path for sample in samples for path in sample.images})
        stand_ins = _representative_sizes({size for size in self._sizes.values() if size})
        rows = []
        for start in range(0, len(samples), _CHUNK):
            chunk = samples[start : start + _CHUNK]
            texts = self._processing.num_tokens([self._text(sample) for sample in chunk])
            for sample, tokens in zip(chunk, texts, strict=True):
                sizes = [size for path in sample.images if (size := self._sizes[path])]
                seen = [self._picture(stand_ins[size], len(sizes) > 1) for size in sizes]
                rows.append((tokens + sum(t for t, _ in seen), sum(v for _, v in seen)))
        return rows

    def _text(self, sample: Sample) -> str:
        try:
            return self._chat.render_unmarked(sample.turns)
        except ChatError:
            return "".join(turn.text for turn in sample.turns)

    def _read_headers(self, paths: set[Path]) -> None:
        missing = sorted(paths - self._sizes.keys())
        with ThreadPoolExecutor(8) as pool:
            self._sizes.update(zip(missing, pool.map(self._size, missing), strict=True))

    def _size(self, path: Path) -> Size | None:
        try:
            return check_header(path, self._max_megapixels)
        except BadImage:
            return None

    def _picture(self, size: Size, in_company: bool) -> tuple[int, float]:
        """Tokens that a picture adds to its placeholder, alone or beside its like, and its vision cost."""
        if (size, in_company) not in self._pictures:
            count = 2 if in_company else 1
            blanks = [Image.new("RGB", size, _MID_GREY)] * count
            try:
                inputs = self._processing.encode([self._questions[in_company]], [blanks], "right").inputs
                tokens = inputs["input_ids"].shape[1] - self._bare[in_company]
                patches = num_patches(inputs, self._processing.config)
                self._pictures[size, in_company] = (tokens // count, patches / count * self._weight)
            except ENCODE_ERRORS:
                self._pictures[size, in_company] = (0, 0.0)
        return self._pictures[size, in_company]


def _representative_sizes(sizes: set[Size]) -> dict[Size, Size]:
    """Which size each is measured as: itself, or, where there are very many, the largest within about 5 %."""
    if len(sizes) <= _MAX_SIZES:
        return {size: size for size in sizes}
    cells: dict[Size, Size] = {}
    for width, height in sizes:
        cell = (round(math.log(width) / _CELL), round(math.log(height) / _CELL))
        widest, highest = cells.get(cell, (0, 0))
        cells[cell] = (max(width, widest), max(height, highest))
    decide("data.lengths", f"{len(sizes)} picture sizes measured as {len(cells)}", "sizes within 5 % count as one")
    return {(w, h): cells[round(math.log(w) / _CELL), round(math.log(h) / _CELL)] for w, h in sizes}


def num_patches(inputs: Mapping[str, Tensor], config: Any) -> float:
    """Patches that the vision encoder is given."""
    if (grid := inputs.get("image_grid_thw")) is not None:
        return float(grid.prod(-1).sum())
    if (pixels := inputs.get("pixel_values")) is None:
        return 0.0
    side: Any = getattr(config.vision_config, "patch_size", 14)
    area = math.prod(side) if isinstance(side, (list, tuple)) else side**2
    return pixels.numel() / (3 * area)


def vision_weight(config: Any) -> float:
    """How much work one patch is in the vision encoder, in tokens of the decoder; 1 where the config does not say."""
    decoder, encoder = _work_of_token(config.get_text_config()), _work_of_token(getattr(config, "vision_config", None))
    return encoder / decoder if decoder and encoder else 1.0


def _work_of_token(config: Any) -> float:
    """Multiplications that one token needs in all blocks' matrices, attention scores left out."""

    def first(*names: str) -> float:
        return next((float(value) for name in names if isinstance(value := getattr(config, name, None), int)), 0.0)

    width = first("embed_dim", "hidden_size")  # Qwen2-VL's tower calls its output hidden_size
    return first("num_hidden_layers", "depth") * width * (4 * width + 3 * (first("intermediate_size") or 4 * width))
