"""The look of all figures: palettes, colors by role, line styles, and how each color changes on a dark page.

Data flow: figure functions take colors from here -> Vega-Lite writes them into the SVG -> where the reader's page is
dark, ``dark_css`` replaces them by attribute selectors. Lightness changes evenly along each palette. Teal is in no
palette: everywhere in the report, teal means "this layer trains".
"""

import math
from dataclasses import dataclass

LEVELS = 24
ARM = 11
"""Levels on either side of zero in the signed palettes."""
_BLUE, _RUST = 255.0, 40.0  # hues that differ to any eye, whichever cone it lacks
FONT = "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif"
FONT_SIZE = 11
PALE = 0.3
"""Opacity of a value that its interval does not separate from no effect."""
RGB = tuple[int, int, int]


def hex_color(color: RGB) -> str:
    """A color as CSS and Vega-Lite write it, such as #22262b."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def _rgb(lightness: float, chroma: float, hue: float) -> RGB:
    """OKLCH to 8-bit sRGB (B. Ottosson, "A perceptual color space for image processing", 2020)."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    red, green, blue = (_gamma_encoded(min(max(value, 0.0), 1.0)) for value in linear)
    return red, green, blue


def _gamma_encoded(linear: float) -> int:
    value = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    return round(255 * value)


def _sequential(first: float, last: float) -> tuple[RGB, ...]:
    """Even steps of lightness from ``first`` to ``last``; from sand over rose to plum as it gets darker."""
    palette = []
    for level in range(LEVELS):
        share = level / (LEVELS - 1)
        lightness = first + share * (last - first)
        depth = (0.965 - lightness) / 0.665  # 0 at the lightest of the light palette, 1 at its darkest
        chroma = 0.028 + 0.125 * math.sin(math.pi * min(max(depth, 0.0), 1.0) ** 0.85) ** 0.9
        palette.append(_rgb(lightness, chroma, 80 - 115 * depth**0.9 if depth > 0 else 80))
    return tuple(palette)


def _diverging(zero: float, end: float) -> tuple[RGB, ...]:
    """From the strongest negative to the strongest positive: even steps of lightness away from a colorless zero."""
    palette = []
    for level in range(-ARM, ARM + 1):
        share = abs(level) / ARM
        chroma = 0.003 + 0.1 * math.sin(math.pi * 0.7 * share)
        palette.append(_rgb(zero + share * (end - zero), chroma, _RUST if level >= 0 else _BLUE))
    return tuple(palette)


LIGHT, DARK = _sequential(0.955, 0.30), _sequential(0.29, 0.945)
SIGNED_LIGHT, SIGNED_DARK = _diverging(0.965, 0.37), _diverging(0.28, 0.81)
SEQUENTIAL = [hex_color(color) for color in LIGHT]
SIGNED = [hex_color(color) for color in SIGNED_LIGHT]

INK, SOFT, CARD, PAPER = "#22262b", "#5d636b", "#ffffff", "#fbfaf8"
RULE, QUIET = "#e6e3dd", "#d5d2cb"
TEAL, WASH, WITHHELD = "#0d6f73", "#e3f0ef", "#a8442f"
BAR, BAR_PEAK = "#c79aa8", "#7d2f55"
RUNS = ("#1f5fa8", "#b85c00", "#7a3f98", "#b3245e", "#6b5b45", "#3d4a5c")
"""Runs that are compared; none is teal, which means that a layer trains."""
HEAT = "#c8300a"
"""Weights over an image, on light and dark pages alike."""
_FILL_DARK = {INK: "#e8e6e1", SOFT: "#a2a8af", CARD: "#1c2024", PAPER: "#15181b", RULE: "#2d3338", QUIET: "#434a51"}
_FILL_DARK |= {TEAL: "#1f7f7c", WASH: "#17383a", WITHHELD: "#ef9a86", BAR: "#8d5a70", BAR_PEAK: "#f2a98f"}
_FILL_DARK |= dict(zip(RUNS, ("#7fb2ee", "#f0a35c", "#c79be0", "#f28bb3", "#cdbb9f", "#b9c6d8"), strict=True))
_TEAL_LINE_DARK = "#5cc4bf"
"""Lines and text need more contrast with a dark page than bars do."""


def dark_css() -> str:
    """Rules that give each color of the figures its counterpart on a dark page."""
    pairs = dict(zip(SEQUENTIAL + SIGNED, map(hex_color, DARK + SIGNED_DARK), strict=True)) | _FILL_DARK
    rules = [f'svg [fill="{light}"]{{fill:{dark}}}' for light, dark in pairs.items()]
    rules += [f'svg [stroke="{light}"]{{stroke:{dark}}}' for light, dark in _FILL_DARK.items()]
    rules += [f'svg text[fill="{TEAL}"],svg .mark-symbol path[fill="{TEAL}"]{{fill:{_TEAL_LINE_DARK}}}']
    return "".join([*rules, f'svg [stroke="{TEAL}"]{{stroke:{_TEAL_LINE_DARK}}}'])


def signed_color(share: float) -> str:
    """The color of a signed value, given as -1 to 1 of the strongest; what lies beyond an end takes that end."""
    return SIGNED[ARM + round(min(max(share, -1.0), 1.0) * ARM)]


@dataclass(frozen=True)
class LineStyle:
    """How a line is drawn.

    Args:
        color: Hex.
        width: In pixels.
        opacity: 0 to 1.
        dash: Lengths of strokes and gaps in pixels; empty for a solid line.
    """

    color: str
    width: float = 1.8
    opacity: float = 1.0
    dash: tuple[int, ...] = ()

    @property
    def row(self) -> dict[str, object]:
        """As fields of a data row, for encodings without a scale."""
        return {"color": self.color, "width": self.width, "opacity": self.opacity, "dash": list(self.dash)}


DASHES = ((), (7, 3), (2, 3), (8, 3, 2, 3), (1, 5))
"""A solid line, then dashes that tell lines of one color apart."""
DOTTED = (2, 3)
