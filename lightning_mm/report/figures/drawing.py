"""Drawings that are made twice from one layout: as SVG inside the report, and as a picture file of their own.

Data flow: ``trace_maps``, ``class_maps`` lay out shapes -> ``Drawing.svg`` (classes, coloured by the report's style
sheet, or by its own) and ``Drawing.image`` (Pillow). Texts come from tokenizers: all of them are escaped here.

Shapes: units are about pixels; angles are degrees, negative ones turn text upwards to the right.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Literal

from lightning_mm.report.figures import colors

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

_ZOOM, _SIZE, _PALE = 2, 11, 0.3
_PAPER = (255, 255, 255)
_LOOKS = {
    "": (93, 99, 107),
    "strong": (34, 38, 43),
    "ink": (34, 38, 43),
    "paper": _PAPER,
    "frame": (34, 38, 43),
    "bracket": (160, 164, 170),
    "hatch": (196, 192, 184),
    "none": (251, 250, 248),
    "trained-bar": (13, 111, 115),
    "trained-edge": (13, 111, 115),
    "trained-number": (13, 111, 115),
    **{f"d{i}": colour for i, colour in enumerate(colors.SIGNED_LIGHT)},
}
_OVERRIDES = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Box:
    """A filled rectangle; those without a tip are merged by look, which keeps pages small."""

    x: float
    y: float
    width: float
    height: float
    look: str
    tip: str = ""
    pale: bool = False


@dataclass(frozen=True)
class Words:
    """A line of text at its baseline."""

    x: float
    y: float
    text: str
    look: str = ""
    anchor: Literal["start", "middle", "end"] = "start"
    turn: float = 0.0
    tip: str = ""


@dataclass(frozen=True)
class Strokes:
    """Straight lines (x, y, x, y) of one look."""

    ends: Sequence[tuple[float, float, float, float]]
    look: str


@dataclass(frozen=True)
class Ring:
    """A circle about what counts."""

    x: float
    y: float
    radius: float


Shape = Box | Words | Strokes | Ring


@dataclass(frozen=True)
class Drawing:
    """A layout, and what it says in words.

    Args:
        width: Of the whole.
        height: Of the whole.
        words: What it shows, for those who cannot see it.
        shapes: From the back to the front; boxes without a tip are furthest back.
    """

    width: float
    height: float
    words: str
    shapes: tuple[Shape, ...] = field(repr=False)

    def svg(self, *, alone: bool = False) -> str:
        """As SVG; ``alone`` it is a file of its own, with its own colours on white."""
        merged: dict[str, list[str]] = {}
        for shape in self.shapes:
            if isinstance(shape, Box) and not shape.tip:
                merged.setdefault(_class(shape), []).append(_outline(shape))
        body = "".join(f'<path class="{look}" d="{"".join(paths)}"/>' for look, paths in merged.items())
        body += "".join(_svg(shape) for shape in self.shapes if not (isinstance(shape, Box) and not shape.tip))
        size, head = f"0 0 {self.width:.0f} {self.height:.0f}", ""
        if alone:
            head = f' xmlns="http://www.w3.org/2000/svg" width="{self.width:.0f}" height="{self.height:.0f}"'
            body = f"<style>{_sheet()}</style><rect width='100%' height='100%' fill='#fff'/>{body}"
        said = escape(printable(self.words))
        return f'<svg{head} viewBox="{size}" role="img" aria-label="{said}"><title>{said}</title>{body}</svg>'

    def image(self) -> "Image":
        """As a picture, twice as large; what the machine's fonts lack shows as empty boxes."""
        from PIL import Image, ImageDraw

        size = (round(self.width * _ZOOM), round(self.height * _ZOOM))
        picture = Image.new("RGB", size, _PAPER)
        draw = ImageDraw.Draw(picture)
        for shape in self.shapes:
            if isinstance(shape, Box):
                ends = [round(e * _ZOOM) for e in (shape.x, shape.y, shape.x + shape.width, shape.y + shape.height)]
                fill = _mixed(_LOOKS[shape.look]) if shape.pale else _LOOKS[shape.look]
                draw.rectangle([*ends[:2], max(ends[0], ends[2] - 1), max(ends[1], ends[3] - 1)], fill=fill)
            elif isinstance(shape, Words):
                _write(picture, shape)
            elif isinstance(shape, Strokes):
                for ends4 in shape.ends:
                    draw.line([round(e * _ZOOM) for e in ends4], fill=_LOOKS[shape.look], width=_ZOOM)
            else:
                for look, reach in (("paper", 1.3), ("strong", 0.0)):
                    x, y, r = shape.x * _ZOOM, shape.y * _ZOOM, (shape.radius + reach) * _ZOOM
                    draw.ellipse(
                        [x - r, y - r, x + r, y + r], outline=_LOOKS[look], width=round((2 + 2 * reach) * _ZOOM)
                    )
        return picture


def printable(text: str) -> str:
    """A text without what XML forbids, and without what turns the text around it."""
    if text.isprintable():
        return text
    return "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _OVERRIDES or ord(c) & 0xFFFE == 0xFFFE else c
        for c in text
    )


def wide(text: str) -> int:
    """How many ordinary letters a text is as wide as: signs of East Asia and emoji count twice."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _sheet() -> str:
    """The colours of a drawing that stands alone."""
    known = {look or "text": f"#{red:02x}{green:02x}{blue:02x}" for look, (red, green, blue) in _LOOKS.items()}
    rules = [f"text{{font:{_SIZE}px system-ui,sans-serif;fill:{known['text']}}}"]
    rules += [f".{look}{{fill:{colour}}}" for look, colour in known.items() if look != "text"]
    lines = ("frame", "bracket", "hatch", "trained-edge")
    rules += [f"path.{look}{{fill:none;stroke:{known[look]}}}" for look in lines]
    rules += [f".ring{{fill:none;stroke:{known['strong']}}}.halo{{fill:none;stroke:#fff}}"]
    return "".join(rules) + f"text.strong{{font-weight:600}}.pale{{fill-opacity:{_PALE}}}"


def _svg(shape: Shape) -> str:
    if isinstance(shape, Box):
        return f'<path class="{_class(shape)}" d="{_outline(shape)}">{_tip(shape.tip)}</path>'
    if isinstance(shape, Ring):
        place = f'cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{shape.radius:.1f}"'
        return f'<circle class="halo" {place} stroke-width="4.4"/><circle class="ring" {place} stroke-width="1.8"/>'
    if isinstance(shape, Strokes):
        ends = "".join(f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}" for a, b, c, d in shape.ends)
        return f'<path class="{shape.look}" d="{ends}"/>'
    turn = f' transform="rotate({shape.turn:g} {shape.x:.1f} {shape.y:.1f})"' if shape.turn else ""
    place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}"{turn}'
    return f'<text class="{shape.look}" {place}>{escape(printable(shape.text))}{_tip(shape.tip)}</text>'


def _class(box: Box) -> str:
    return f"{box.look} pale" if box.pale else box.look


def _outline(box: Box) -> str:
    return f"M{box.x:.1f} {box.y:.1f}h{box.width:.1f}v{box.height:.1f}h-{box.width:.1f}z"


def _tip(words: str) -> str:
    return f"<title>{escape(printable(words))}</title>" if words else ""


def _mixed(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (round(_PALE * c + (1 - _PALE) * p) for c, p in zip(colour, _PAPER, strict=True))
    return red, green, blue


def _write(picture: "Image", words: Words) -> None:
    """Text, turned about its anchor: it is written in the middle of a square, which is turned and laid on."""
    from PIL import Image, ImageDraw

    font, text = _font(), printable(words.text)
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[words.anchor]
    x, y = words.x * _ZOOM, words.y * _ZOOM
    if not words.turn:
        ImageDraw.Draw(picture).text((x, y), text, fill=_LOOKS[words.look], font=font, anchor=anchor)
        return
    half = round(font.getlength(text)) + 3 * _SIZE * _ZOOM
    mask = Image.new("L", (2 * half, 2 * half), 0)
    ImageDraw.Draw(mask).text((half, half), text, fill=255, font=font, anchor=anchor)
    turned = mask.rotate(-words.turn, Image.Resampling.BICUBIC)
    picture.paste(_LOOKS[words.look], (round(x) - half, round(y) - half), turned)


def _font() -> "FreeTypeFont | ImageFont":
    """A font of many scripts where the machine has it."""
    from PIL import ImageFont

    try:
        return ImageFont.truetype("DejaVuSans.ttf", (_SIZE - 1) * _ZOOM)
    except OSError:
        return ImageFont.load_default(_SIZE * _ZOOM)


def hatched(boxes: Iterable[Box]) -> Strokes:
    """One diagonal through each box."""
    return Strokes(tuple((b.x, b.y + b.height, b.x + b.width, b.y) for b in boxes), "hatch")
