"""Bounds on the pixels of an image, by the options that an image processor has for them.

Image processors bound an image in different ways: by a number of pixels (Qwen-VL, GLM-V), by a number of tiles
(InternVL, Aya), by the longest side (Idefics3, SmolVLM), or not at all, since each image gets the same size (LLaVA,
Gemma3). Where there is an option, it is set, so that it is saved and exported with the processor. Where there is none
and the size of an image matters (LLaVA-NeXT, Pixtral, LFM2-VL), the image is resized before the processor sees it.

Data flow: bounds and an image processor -> ``set_pixel_bounds`` -> its options, and the ``PixelBounds`` that
``ModelProcessor.encode`` resizes images to.
"""

import math
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError

_GRAY = (127, 127, 127)
_TRIAL_PIXELS = 1_000_000


@dataclass(frozen=True)
class PixelBounds:
    """Bounds on width times height.

    Args:
        min_pixels: Least number of pixels; None sets none.
        max_pixels: Largest number of pixels; None sets none.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)):
            if value is not None and value < 1:
                raise UserError(
                    f"data.{name} is {value}.", "It counts the pixels of an image.", f"Give --data.{name} N."
                )
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise UserError(
                f"data.min_pixels is {self.min_pixels}, data.max_pixels is {self.max_pixels}.",
                "No image can have more than the one and less than the other.",
                "Give data.min_pixels below data.max_pixels.",
            )

    def resized(self, image: Image.Image) -> Image.Image:
        """The image, smaller or larger at its aspect ratio where it is outside the bounds."""
        width, height = image.size
        pixels = width * height
        bound = self.max_pixels if self.max_pixels and pixels > self.max_pixels else None
        round_to: Any = math.floor
        if bound is None and self.min_pixels and pixels < self.min_pixels:
            bound, round_to = self.min_pixels, math.ceil
        if bound is None:
            return image
        scale = math.sqrt(bound / pixels)
        size = (max(1, round_to(width * scale)), max(1, round_to(height * scale)))
        return image.resize(size, Image.Resampling.BICUBIC)


def set_pixel_bounds(image_processor: Any, bounds: PixelBounds) -> PixelBounds:
    """Set the image processor's own options; returns the bounds that images must be resized to beforehand.

    Args:
        image_processor: An image processor of transformers, which is changed.
        bounds: Bounds on an image.
    """
    if (bounds.min_pixels, bounds.max_pixels) == (None, None):
        return bounds
    rest = PixelBounds()
    if _counts_pixels(image_processor):
        said = _set_pixels(image_processor, bounds)
    elif hasattr(image_processor, "max_patches") and hasattr(image_processor, "min_patches"):
        said = _set_tiles(image_processor, bounds)
    elif getattr(image_processor, "do_image_splitting", False) and hasattr(image_processor, "max_image_size"):
        said = _set_longest_edge(image_processor, bounds)
    elif _has_one_size(image_processor, bounds):
        said = "no effect: every image gets the same size"
    else:
        said, rest = "images are resized before the processor, which the exported one does not do", bounds
    wanted = f"{bounds.min_pixels or 'any number'} to {bounds.max_pixels or 'any number'}"
    log_decision("data.pixels", said, f"{wanted} of pixels by options of {type(image_processor).__name__}")
    return rest


def largest_image(image_processor: Any) -> int | None:
    """Width times height of the largest image that is not reduced; None where the image processor does not say.

    Args:
        image_processor: An image processor of transformers.
    """
    if _counts_pixels(image_processor):
        return _size(image_processor)["longest_edge"] // _frames_of_a_patch(image_processor)
    if hasattr(image_processor, "max_patches") and hasattr(image_processor, "min_patches"):
        size = _size(image_processor)
        return int(image_processor.max_patches) * size["height"] * size["width"]
    return None


def _counts_pixels(image_processor: Any) -> bool:
    """Whether the two sides of ``size`` stand for numbers of pixels, as in processors that merge patches."""
    counts = hasattr(image_processor, "merge_size") and hasattr(image_processor, "get_number_of_image_patches")
    return counts and {"shortest_edge", "longest_edge"} <= set(_size(image_processor))


def _set_pixels(image_processor: Any, bounds: PixelBounds) -> str:
    before, frames = _size(image_processor), _frames_of_a_patch(image_processor)
    least = before["shortest_edge"] if bounds.min_pixels is None else bounds.min_pixels * frames
    largest = before["longest_edge"] if bounds.max_pixels is None else bounds.max_pixels * frames
    if bounds.max_pixels is None:
        largest = max(least, largest)
    image_processor.size = type(image_processor.size)(shortest_edge=min(least, largest), longest_edge=largest)
    return f"size {_size(image_processor)}"


def _frames_of_a_patch(image_processor: Any) -> int:
    """Frames whose pixels are counted for one image.

    Some count the pixels of all frames of a patch in time: what one image above the bound is reduced to shows it.
    """
    largest = _size(image_processor)["longest_edge"]
    side = 4 * math.isqrt(largest)
    read = image_processor.get_number_of_image_patches(side, side, {}) * int(image_processor.patch_size) ** 2
    return max(1, round(largest / read))


def _set_tiles(image_processor: Any, bounds: PixelBounds) -> str:
    size = _size(image_processor)
    tile = size["height"] * size["width"]
    if bounds.max_pixels is not None:
        image_processor.max_patches = min(image_processor.max_patches, max(1, bounds.max_pixels // tile))
    if bounds.min_pixels is not None:
        least = -(-bounds.min_pixels // tile)
        image_processor.min_patches = max(image_processor.min_patches, min(least, image_processor.max_patches))
    image_processor.min_patches = min(image_processor.min_patches, image_processor.max_patches)
    return f"{image_processor.min_patches} to {image_processor.max_patches} tiles of {size['height']} x {size['width']}"


def _set_longest_edge(image_processor: Any, bounds: PixelBounds) -> str:
    """The image is enlarged or reduced to this side and cut into tiles, so that it holds as many as fit the bound."""
    tile, longest = (dict(each)["longest_edge"] for each in (image_processor.max_image_size, image_processor.size))
    if bounds.max_pixels is not None:
        longest = min(longest, max(1, math.isqrt(bounds.max_pixels) // tile) * tile)
        image_processor.size = type(image_processor.size)(longest_edge=longest)
    return f"longest side {longest}, in tiles of {tile}; every image gets that side, a minimum has no effect"


def _has_one_size(image_processor: Any, bounds: PixelBounds) -> bool:
    """Whether an image gives as many pixels when it is resized to the bounds as without."""
    largest = bounds.max_pixels or _TRIAL_PIXELS
    side = max(8, math.isqrt(4 * max(largest, bounds.min_pixels or 0)))
    image = Image.new("RGB", (side, side * 3 // 4), _GRAY)
    tiny = Image.new("RGB", (8, 6), _GRAY)
    try:
        trials = [image, PixelBounds(max_pixels=largest).resized(image), tiny]
        counts = {image_processor(images=[each], return_tensors="pt")["pixel_values"].numel() for each in trials}
    except (ValueError, RuntimeError, LookupError, TypeError, ArithmeticError):
        return False
    return len(counts) == 1


def _size(image_processor: Any) -> dict[str, int]:
    return {name: value for name, value in dict(image_processor.size or {}).items() if isinstance(value, int)}
