"""The colours of heat maps: how much (paper to deep plum), and which way (blue, paper at zero, rust).

Data flow: the report's style sheet takes one class per level, for light and for dark; pictures take the RGBs. Lightness
changes evenly along each scale. Teal is kept out of them: everywhere in the report, teal means "this trains".
"""

import math

LEVELS = 24
ARM = 11
"""Levels on either side of zero, where a value has a sign."""
_BLUE, _RUST = 255.0, 40.0  # hues that differ to any eye, whichever cone it lacks
_Colour = tuple[int, int, int]


def _rgb(lightness: float, chroma: float, hue: float) -> _Colour:
    """OKLCH to 8-bit sRGB (B. Ottosson, "A perceptual color space for image processing", 2020)."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    brief = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * brief,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * brief,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * brief,
    )
    red, green, blue = (_encoded(min(max(value, 0.0), 1.0)) for value in linear)
    return red, green, blue


def _encoded(linear: float) -> int:
    value = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    return round(255 * value)


def _scale(first: float, last: float) -> tuple[_Colour, ...]:
    """Even steps of lightness from ``first`` to ``last``; from sand over rose to plum as it gets darker."""
    colours = []
    for level in range(LEVELS):
        share = level / (LEVELS - 1)
        lightness = first + share * (last - first)
        depth = (0.965 - lightness) / 0.665  # 0 at the lightest of the light scale, 1 at its darkest
        chroma = 0.028 + 0.125 * math.sin(math.pi * min(max(depth, 0.0), 1.0) ** 0.85) ** 0.9
        colours.append(_rgb(lightness, chroma, 80 - 115 * depth**0.9 if depth > 0 else 80))
    return tuple(colours)


LIGHT = _scale(0.955, 0.30)
DARK = _scale(0.29, 0.945)


def _signed(zero: float, end: float) -> tuple[_Colour, ...]:
    """From the strongest negative to the strongest positive: even steps of lightness away from a colourless zero."""
    colours = []
    for level in range(-ARM, ARM + 1):
        share = abs(level) / ARM
        chroma = 0.003 + 0.1 * math.sin(math.pi * 0.7 * share)
        colours.append(_rgb(zero + share * (end - zero), chroma, _RUST if level >= 0 else _BLUE))
    return tuple(colours)


SIGNED_LIGHT = _signed(0.965, 0.37)
SIGNED_DARK = _signed(0.28, 0.81)


def level(share: float) -> int:
    """The level for how far along the scale a value is; what lies beyond an end takes that end."""
    return min(max(math.floor(share * LEVELS), 0), LEVELS - 1)


def signed_level(share: float) -> int:
    """The level of a signed value, -1 to 1 of the strongest; zero alone has the colourless one."""
    return ARM + round(min(max(share, -1.0), 1.0) * ARM)


def css(scale: tuple[_Colour, ...], letter: str = "q") -> str:
    """One rule per level, such as ``.q0{fill:#f8f0e6}``."""
    return "".join(f".{letter}{i}{{fill:#{r:02x}{g:02x}{b:02x}}}" for i, (r, g, b) in enumerate(scale))
