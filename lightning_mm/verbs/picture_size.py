"""Finds the size of a picture that has a given number of image tokens, by blank pictures through the processor.

Data flow: ``ModelProcessor`` and a number of tokens -> sides doubled or halved until the number lies between two of
them, or grows no further -> bisected -> the size that comes nearest. No picture is larger than the processor keeps one.
"""

import math
from collections.abc import Callable

import torch

from lightning_mm.data.chat import ChatRenderer
from lightning_mm.data.sample import IMAGE_MARK, Turn
from lightning_mm.data.sample_encoder import gray_image
from lightning_mm.data.token_lengths import Size
from lightning_mm.models.processor import ModelProcessor

USUAL_SIDE = 336
"""Pixels; a picture whose size does not matter, or is not given."""
_SMALLEST_SIDE, _LARGEST_SIDE = 28, 2048
_SHAPES = (1.0, 4 / 3, 3 / 2, 2.0)
"""Width by height."""
_STEP = 8
"""Pixels; a patch is larger, so that sizes closer than this have equally many tokens."""


class PictureSizes:
    """Image tokens by the size of a picture.

    Args:
        processing: The model's processor, with the bounds that it will have.

    Attributes:
        tried: Image tokens of every size, width and height, that went through the processor.
    """

    def __init__(self, processing: ModelProcessor) -> None:
        self._processing = processing
        self._question = ChatRenderer(processing).render_unmarked((Turn("user", f"{IMAGE_MARK}\n?"),))
        self._ids = torch.tensor(processing.image_token_ids)
        self._is_bounded = processing.largest_image is not None
        self._largest = processing.largest_image or _LARGEST_SIDE**2
        self.tried: dict[Size, int] = {}

    def num_tokens(self, size: Size) -> int:
        """Image tokens of a picture of this width and height."""
        if size not in self.tried:
            encoding = self._processing.encode([self._question], [[gray_image(size)]], "right")
            self.tried[size] = int(torch.isin(encoding.inputs["input_ids"], self._ids).sum())
        return self.tried[size]

    def largest(self) -> Size:
        """The size with the most tokens that a picture of an ordinary shape can have, a square if that has them."""
        sizes = [(math.isqrt(int(self._largest * wide)), math.isqrt(int(self._largest / wide))) for wide in _SHAPES]
        return max(sizes, key=self.num_tokens)

    def nearest(self, wanted: int) -> Size:
        """The size whose number of tokens comes nearest to ``wanted``: of squares, or else of wider pictures."""
        low, high = self._squares(wanted)
        low, _ = _bisected(low, high, wanted, lambda side: self.num_tokens((side, side)))
        if low < high and wanted not in self.tried.values():
            widest = max(low, min(2 * low, self._largest // low))
            _bisected(low, widest, wanted, lambda width: self.num_tokens((width, low)))
        elif self._is_bounded and max(self.tried.values()) < wanted:
            self.largest()
        return min(self.tried, key=lambda size: abs(self.tried[size] - wanted))

    def _squares(self, wanted: int) -> tuple[int, int]:
        """Sides of two squares with fewer and with more tokens than wanted; one side twice where there are no such."""
        limit = math.isqrt(self._largest)
        side = min(USUAL_SIDE, limit)
        smaller = self.num_tokens((side, side)) > wanted
        while True:
            following = max(_SMALLEST_SIDE, side // 2) if smaller else min(2 * side, limit)
            here, there = self.num_tokens((side, side)), self.num_tokens((following, following))
            if here == wanted or there == here:
                return side, side
            if there <= wanted if smaller else there >= wanted:
                return min(side, following), max(side, following)
            side = following


def _bisected(low: int, high: int, wanted: int, num_tokens: Callable[[int], int]) -> tuple[int, int]:
    """Lengths ``_STEP`` apart at most that have at most and at least as many tokens as wanted.

    It ends where a length has exactly that many.
    """
    while high - low > _STEP and wanted not in (num_tokens(low), num_tokens(high)):
        middle = (low + high) // 2
        low, high = (middle, high) if num_tokens(middle) <= wanted else (low, middle)
    return low, high
