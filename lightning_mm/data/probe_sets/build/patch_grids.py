"""Which image tokens cover a box, and checks of boxes against the size of their image.

Two kinds of models are supported. Where the processor declares a grid (``image_grid_thw``, as Qwen-VL's), the whole
image is resized to it, and tokens are in row order, each of ``merge_size`` x ``merge_size`` patches. Elsewhere the
processor must produce one square of pixels per image, whose tokens are its patches, or equal blocks of them, in row
order, with or without a class token in front. Which region of the image the square shows (resized, cropped, padded) is
measured, not read from the processor's options: an image whose colors are its coordinates is sent through it.

Data flow: image size, number of tokens and the processor's grid -> ``PatchGrids.weights`` of a box ->
``probe_sets.collator``; Scene and image size -> ``drop_outside_boxes``, ``check_box_format`` -> ``sampling``.

Shapes: T image tokens of one image; C channels, H and W of the square of pixels; a box is x0, y0, x1, y1 in pixels.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_mm.core.decisions import log_decision
from lightning_mm.data.probe_sets.build.scenes import Box, Scene
from lightning_mm.data.sample import Rejection

Encode = Callable[[Image.Image], Mapping[str, Tensor]]
"""The model's processor: an image -> arguments of the forward."""

NO_OBJECT_SITES = "no object sites"
_TILES = f"{NO_OBJECT_SITES}: the picture is cut into tiles"
NO_GRID = f"{NO_OBJECT_SITES}: the picture's tokens form no grid"
_QUERIES = f"{NO_OBJECT_SITES}: the picture's tokens are learned queries, not places"
_WARPED = f"{NO_OBJECT_SITES}: the processor does more to a picture than resize, crop and pad it"
_QUERY_KEYS = re.compile("perceiver|q_?former|resampler|num_quer|latents")


@dataclass(frozen=True)
class VisibleRegion:
    """Region of an image that the vision tower gets.

    Args:
        left: Left edge in pixels of the image; negative where padded, as for the others.
        top: Top edge.
        right: Right edge.
        bottom: Bottom edge.
        height: Height in pixels of the tower's input.
        width: Width in pixels of the tower's input.
    """

    left: float
    top: float
    right: float
    bottom: float
    height: int
    width: int

    def cut(self, height: int, width: int) -> "VisibleRegion":
        """The region of the upper left ``height`` x ``width`` pixels of the input."""
        right = self.left + (self.right - self.left) * width / self.width
        bottom = self.top + (self.bottom - self.top) * height / self.height
        return VisibleRegion(self.left, self.top, right, bottom, height, width)


class PatchGrids:
    """Token grids of one model.

    Args:
        encode: The model's processor: an image -> arguments of the forward.
        config: The model's config as a dictionary.
        merge_size: Patches per token and direction, for processors that declare their grid in patches.
    """

    def __init__(self, encode: Encode, config: Mapping[str, Any], merge_size: int = 1) -> None:
        self._encode, self._merge_size = encode, merge_size
        self._has_queries = any(_QUERY_KEYS.search(key) for key in config)
        self._patch = _patch_size(config)
        self._windows: dict[tuple[int, int], VisibleRegion | str] = {}
        self._black_white: tuple[Tensor, Tensor] | None = None

    def weights(self, box: Box, size: tuple[int, int], num_tokens: int, thw: Tensor | None) -> Tensor | str:
        """(T,) overlap of a box with each image token, or why it is not known.

        Args:
            box: In the picture's pixels.
            size: Width and height of the picture.
            num_tokens: T.
            thw: (3,) the grid in patches, if the processor tells it.

        Returns:
            (T,) overlaps of the tokens' areas with the box, not normalised; all zero where the box is cut off.
        """
        layout = self.layout(size, num_tokens, thw)
        if isinstance(layout, str):
            return layout
        window, rows, columns = layout
        across = _overlaps(box[0], box[2], window.left, window.right, columns)
        down = _overlaps(box[1], box[3], window.top, window.bottom, rows)
        coverage = torch.outer(down, across).flatten()
        return torch.cat([torch.zeros(num_tokens - len(coverage)), coverage])

    def layout(
        self, size: tuple[int, int], num_tokens: int, thw: Tensor | None
    ) -> tuple[VisibleRegion, int, int] | str:
        """Region, rows and columns of the grid, or why there is none. Tokens beyond rows x columns precede the grid.

        Args:
            size: Width and height of the image in pixels.
            num_tokens: T.
            thw: (3,) grid in patches, if the processor declares it.
        """
        return (
            self._declared_layout(size, num_tokens, thw) if thw is not None else self._inferred_layout(size, num_tokens)
        )

    def _declared_layout(
        self, size: tuple[int, int], num_tokens: int, thw: Tensor
    ) -> tuple[VisibleRegion, int, int] | str:
        frames, rows, columns = (int(n) for n in thw)
        rows, columns = rows // self._merge_size, columns // self._merge_size
        if frames != 1 or rows * columns != num_tokens:
            return NO_GRID
        return VisibleRegion(0, 0, size[0], size[1], rows, columns), rows, columns

    def _inferred_layout(self, size: tuple[int, int], num_tokens: int) -> tuple[VisibleRegion, int, int] | str:
        if self._has_queries:
            return _QUERIES
        if size not in self._windows:
            self._windows[size] = self._measure_region(size)
        window = self._windows[size]
        if isinstance(window, str) or self._patch is None:
            return window if isinstance(window, str) else NO_GRID
        down, across = window.height // self._patch, window.width // self._patch
        for number in (num_tokens, num_tokens - 1):
            block = math.isqrt(down * across // max(1, number))
            if number > 1 and block and (down % block, across % block) == (0, 0):
                rows, columns = down // block, across // block
                if rows * columns == number:
                    return window.cut(down * self._patch, across * self._patch), rows, columns
        return NO_GRID

    def _measure_region(self, size: tuple[int, int]) -> VisibleRegion | str:
        """The visible region, by an image with red = x, green = y and full blue."""
        if self._black_white is None:
            black, white = (self._pixels(Image.new("RGB", size, color)) for color in ("black", "white"))
            if isinstance(black, str) or isinstance(white, str):
                return black if isinstance(black, str) else str(white)
            inside = (white - black).abs().sum(0).flatten().argmax()
            self._black_white = black.flatten(1)[:, inside], white.flatten(1)[:, inside]
        ramp = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
        ramp[..., 0] = np.linspace(0, 255, size[0]).round()[None, :]
        ramp[..., 1] = np.linspace(0, 255, size[1]).round()[:, None]
        pixels_CHW = self._pixels(Image.fromarray(ramp, "RGB"))
        if isinstance(pixels_CHW, str):
            return pixels_CHW
        black, white = (value_C[:, None, None] for value_C in self._black_white)
        red_HW, green_HW, blue_HW = (pixels_CHW - black) / (white - black)
        across, down = _fit_edges(red_HW, blue_HW, size[0]), _fit_edges(green_HW.T, blue_HW.T, size[1])
        if across is None or down is None:
            return _WARPED
        return VisibleRegion(across[0], down[0], across[1], down[1], *red_HW.shape)

    def _pixels(self, image: Image.Image) -> Tensor | str:
        """(3, height, width) pixels of an image that the processor turns into one square."""
        pixels = self._encode(image).get("pixel_values")
        if pixels is None or pixels.dim() < 4 or pixels.shape[-3] != 3:
            return NO_GRID
        squares = pixels.reshape(-1, *pixels.shape[-3:])
        return squares[0].double() if len(squares) == 1 else _TILES


def _overlaps(start: float, end: float, left: float, right: float, number: int) -> Tensor:
    """(number,) lengths of [start, end] within each of ``number`` equal parts of [left, right]."""
    edges = torch.linspace(left, right, number + 1, dtype=torch.float64)
    return (edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)).clamp(min=0).float()


def _fit_edges(ramp_HW: Tensor, inside_HW: Tensor, length: int) -> tuple[float, float] | None:
    """Position of the first and the last column in an image of this length; None where they are not on a line.

    A straight line is fitted to one row of the ramp; its ends, which resizing distorts, are left out.
    """
    is_inside_HW = (inside_HW - 1).abs() < 0.1
    row = int(is_inside_HW.sum(1).argmax())
    shares = ramp_HW[row]
    use = ((shares > 0.1) & (shares < 0.9) & is_inside_HW[row]).nonzero().flatten()
    if len(use) < 2:
        return None
    at = use.double() + 0.5
    there = shares[use] * (length - 1) + 0.5
    slope = ((at - at.mean()) * (there - there.mean())).sum() / (at - at.mean()).square().sum()
    start = there.mean() - slope * at.mean()
    if slope <= 0 or (there - start - slope * at).abs().max() > max(1.5, 0.02 * length):
        return None
    return float(start), float(start + slope * ramp_HW.shape[1])


def _patch_size(config: Mapping[str, Any]) -> int | None:
    """Side of a patch in pixels; None if the vision tower's config does not say, or patches are not square."""
    size = (config.get("vision_config") or {}).get("patch_size")
    sides = set(size) if isinstance(size, list | tuple) else {size}
    side = sides.pop() if len(sides) == 1 else None
    return side if isinstance(side, int) and side > 0 else None


Size = tuple[int, int]
_BOX_TOLERANCE = 1.02
"""Annotated boxes may exceed the image slightly."""
_MIN_BOXES = 8
"""Minimum number of boxes for a statement about a file."""


def drop_outside_boxes(scene: Scene, size: Size) -> tuple[Scene, list[Rejection]]:
    """The scene without objects whose boxes are outside its image, and a rejection for each.

    Args:
        scene: Annotations of the image.
        size: Width and height of the image in pixels, as stored.
    """
    kept, outside = [], []
    for each in scene.objects or ():
        if each.box is None or clip_box(each.box, size):
            kept.append(each)
        else:
            reason = f"box outside the picture: {each.name!r} at {list(each.box)}, the picture is {size[0]} x {size[1]}"
            outside.append(Rejection(scene.origin, reason, "cut"))
    return (replace(scene, objects=tuple(kept)) if outside else scene), outside


def clip_box(box: Box, size: Size) -> Box | None:
    """The part of a box inside an image of this width and height; None where there is none."""
    left, top, right, bottom = max(0.0, box[0]), max(0.0, box[1]), min(box[2], size[0]), min(box[3], size[1])
    return (left, top, right, bottom) if left < right and top < bottom else None


def check_box_format(placed: Iterable[tuple[Box, Size]]) -> None:
    """Log it where boxes look like another format; they are read as x0, y0, x1, y1 in pixels.

    Width and height, taken for the far corner, never reach beyond the image; but then no box has its center right of
    the middle, or below it.

    Args:
        placed: Every box, and the size of its image.
    """
    found = list(placed)
    if len(found) < _MIN_BOXES:
        return
    over = sum(box[2] > _BOX_TOLERANCE * size[0] or box[3] > _BOX_TOLERANCE * size[1] for box, size in found)
    partial = [(box, size) for box, size in found if box[2] - box[0] < size[0] or box[3] - box[1] < size[1]]
    if over > 0.1 * len(found):
        reason = (
            f"{over} of {len(found)} reach beyond their picture: looks like pixels of another size of the pictures, "
            "or a scale to 1000; scale them to the files"
        )
    elif len(partial) >= _MIN_BOXES and all(box[0] + box[2] <= w and box[1] + box[3] <= h for box, (w, h) in partial):
        reason = (
            f"all of the {len(partial)} lie to the upper left: looks like x, y, w, h; if so, give [x, y, x + w, y + h]"
        )
    else:
        return
    log_decision("data.probes.boxes", "read as x0, y0, x1, y1 in pixels", reason)
