"""Names for colours: of a background, which we choose, and of a thing, where one colour clearly dominates it.

Data flow: ``openmoji``/``stamps`` ask for the dominant colour of a cut-out; ``studio`` draws backgrounds from
``BACKGROUNDS``.
Legend: RGB in 0..255; hue in degrees; saturation and value in 0..1.
"""

import numpy as np
from PIL import Image

BACKGROUNDS = {
    "red": (214, 62, 56), "orange": (242, 146, 44), "yellow": (250, 224, 92), "green": (104, 182, 92), "blue": (92,
    156, 224), "purple": (146, 104, 190), "pink": (246, 166, 198), "brown": (146, 102, 68), "grey": (160, 160, 160),
    "white": (250, 250, 250),
}  # fmt: skip
_HUES = (  # between 38 and 48 degrees people say yellow and orange alike: such pixels get no name
    ("red", 0, 12), ("orange", 16, 38), ("yellow", 48, 64), ("green", 68, 165),
    ("blue", 190, 240), ("purple", 255, 300), ("pink", 305, 340), ("red", 352, 360),
)  # fmt: skip


def dominant_colour(cutout: Image.Image, *, share: float = 0.75) -> str | None:
    """The colour name that covers at least ``share`` of a cut-out, its black outline left out; None where there is
    none.

    Args:
        cutout: RGBA.
        share: Fraction of the opaque, not nearly black pixels that must bear the name.
    """
    rgba = np.asarray(cutout)
    solid = rgba[..., 3] > 200
    hsv = np.asarray(cutout.convert("RGB").convert("HSV"), dtype=np.float64)[solid] / 255.0
    hsv = hsv[hsv[:, 2] > 0.2]
    if len(hsv) < 50:
        return None
    names = _named(hsv[:, 0] * 360.0, hsv[:, 1], hsv[:, 2])
    best, count = max(((name, int((names == name).sum())) for name in BACKGROUNDS), key=lambda pair: pair[1])
    return best if count >= share * len(hsv) else None


def _named(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Colour name per pixel; an empty string where people would not agree."""
    names = np.full(hue.shape, "", dtype="<U6")
    for name, low, high in _HUES:
        names[(hue >= low) & (hue < high)] = name
    names[(hue >= 12) & (hue < 48) & (value < 0.72)] = "brown"
    reddish = (hue >= 330) | (hue < 8)
    names[reddish & (saturation < 0.6) & (value > 0.85)] = "pink"
    names[saturation < 0.12] = ""  # between grey and white people differ
    names[(saturation < 0.12) & (value >= 0.35) & (value < 0.75)] = "grey"
    names[(saturation < 0.08) & (value > 0.94)] = "white"
    return names
