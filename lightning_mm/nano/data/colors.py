"""Colors by name: of backgrounds, of drawings, and of drawings that are tinted.

Data flow: cut-out -> ``dominant_color``; cut-out and name -> ``tinted``; name -> ``plain_ground`` -> ``images``.

Shapes: RGB in 0..255; hue in degrees; saturation and value in 0..1.
"""

import random

import numpy as np
from PIL import Image

BACKGROUNDS = {
    "red": (214, 62, 56), "orange": (242, 146, 44), "yellow": (250, 224, 92), "green": (104, 182, 92), "blue": (92,
    156, 224), "purple": (146, 104, 190), "pink": (246, 166, 198), "brown": (146, 102, 68), "grey": (160, 160, 160),
    "white": (250, 250, 250),
}  # fmt: skip
_HUES = (  # 38 to 48 degrees is ambiguous between yellow and orange: no name
    ("red", 0, 12), ("orange", 16, 38), ("yellow", 48, 64), ("green", 68, 165),
    ("blue", 190, 240), ("purple", 255, 300), ("pink", 305, 340), ("red", 352, 360),
)  # fmt: skip


def dominant_color(cutout: Image.Image, *, share: float = 0.75) -> str | None:
    """The color name that covers at least ``share`` of a cut-out, or None.

    Args:
        cutout: RGBA image; nearly black pixels (the outline) are not counted.
        share: Minimum fraction of the opaque pixels with this color, 0 to 1.
    """
    rgba = np.asarray(cutout)
    solid = rgba[..., 3] > 200
    hsv = np.asarray(cutout.convert("RGB").convert("HSV"), dtype=np.float64)[solid] / 255.0
    hsv = hsv[hsv[:, 2] > 0.2]
    if len(hsv) < 50:
        return None
    names = _color_names(hsv[:, 0] * 360.0, hsv[:, 1], hsv[:, 2])
    best, count = max(((name, int((names == name).sum())) for name in BACKGROUNDS), key=lambda pair: pair[1])
    return best if count >= share * len(hsv) else None


def _color_names(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Color name per pixel; an empty string where the name is ambiguous."""
    names = np.full(hue.shape, "", dtype="<U6")
    for name, low, high in _HUES:
        names[(hue >= low) & (hue < high)] = name
    names[(hue >= 12) & (hue < 48) & (value < 0.72)] = "brown"
    reddish = (hue >= 330) | (hue < 8)
    names[reddish & (saturation < 0.6) & (value > 0.85)] = "pink"
    names[saturation < 0.12] = ""  # ambiguous between grey and white
    names[(saturation < 0.12) & (value >= 0.35) & (value < 0.75)] = "grey"
    names[(saturation < 0.08) & (value > 0.94)] = "white"
    return names


def mean_color(cutout: Image.Image) -> tuple[float, float, float]:
    """Mean RGB of the opaque pixels of an RGBA image."""
    rgba = np.asarray(cutout, dtype=np.float64)
    red, green, blue = np.average(rgba[..., :3], axis=(0, 1), weights=rgba[..., 3])
    return float(red), float(green), float(blue)


TINTS = {
    "red": (225, 40, 40), "orange": (250, 140, 30), "yellow": (250, 222, 40), "green": (50, 170, 60), "blue": (50,
    110, 230), "purple": (140, 60, 190), "pink": (255, 150, 205), "brown": (130, 80, 40), "grey": (150, 150, 150),
    "white": (255, 255, 255),
}  # fmt: skip
_LIT = {"white": 0.95, "orange": 0.78, "pink": 0.82}
"""Color -> share of the full color that three quarters of the pixels must have: darker orange is brown."""
_DARKEST = 0.45


def tinted(cutout: Image.Image, color: str) -> Image.Image:
    """The cut-out in shades of one color: three quarters of its pixels or more have the color's name.

    Its darkest quarter runs up to the share ``_LIT`` of the full color, the rest from there to the full color.

    Args:
        cutout: RGBA image.
        color: Key of ``TINTS``.
    """
    rgba = np.asarray(cutout)
    grey = np.asarray(cutout.convert("L"), dtype=np.float64)
    low, quarter, high = np.percentile(grey[rgba[..., 3] > 40], (2, 25, 98))
    levels = (quarter - max(quarter - low, 1.0), quarter, quarter + max(high - quarter, 1.0))
    shade = np.interp(grey, levels, (_DARKEST, _LIT.get(color, 0.72), 1.0))
    rgb = np.round(shade[..., None] * np.array(TINTS[color], dtype=np.float64))
    return Image.fromarray(np.dstack([rgb.astype(np.uint8), rgba[..., 3]]), "RGBA")


def plain_ground(color: tuple[int, int, int], size: int, rng: random.Random) -> Image.Image:
    """A plain color that darkens slightly in one of four directions; the hue does not change."""
    base = np.array(color, dtype=np.float64) * rng.uniform(0.97, 1.02)
    light = np.linspace(1.0, rng.uniform(0.92, 1.0), size)[:, None].repeat(size, axis=1)
    light = np.rot90(light, rng.randrange(4))
    return Image.fromarray(np.minimum(np.round(base * light[..., None]), 255).astype(np.uint8), "RGB")
