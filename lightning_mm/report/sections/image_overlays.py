"""Pictures with what the model does with them: how much each part counts, or the word that each part is read as.

Data flow: pictures.json and pictures/ of the run directory -> one strip per picture: it alone, then layer by layer with
cells over it. All of it is untrusted: what cannot be shown costs its own picture, and is said.

Shapes: a grid is R rows x K columns over the whole picture.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mm.report.figures import theme
from lightning_mm.report.figures.figure import printable, text_width
from lightning_mm.report.sections.samples import packed, small
from lightning_mm.report.tables.numbers import percent, short
from lightning_mm.report.tables.traces import finite

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, READ = 240.0, 340.0
"""The longer side of a picture, in drawing units; and of one that words stand on."""
_PIXELS, _MOST_STRIPS, _MOST_LAYERS, _FINEST, _MOST_TIPS, _LEGIBLE = 320, 12, 8, 128, 600, 22.0


@dataclass(frozen=True)
class Overlay:
    """What one layer does with a picture."""

    id: str
    text: str
    image: str
    what: str
    layer: int | None
    weights: tuple[tuple[float | None, ...], ...]
    words: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, raw: Any) -> "Overlay":
        """From an item of pictures.json.

        Raises:
            LookupError, TypeError, ValueError, AttributeError, ArithmeticError: If it is none.
        """
        rows, columns = (int(n) for n in raw["grid"])
        if not (0 < rows <= _FINEST and 0 < columns <= _FINEST):
            raise ValueError(f"a grid of {rows} by {columns} cannot be drawn")
        weights = tuple(tuple(finite(v) for v in row) for row in raw.get("weights") or ())
        words = tuple(tuple(str(word)[:40] for word in row) for row in raw.get("words") or ())
        for grid in filter(None, (weights, words)):
            if len(grid) != rows or any(len(row) != columns for row in grid):
                raise ValueError(f"weights or words do not fit a grid of {rows} by {columns}")
        if not weights and not words:
            raise ValueError("neither weights nor words")
        layer = raw.get("layer")
        name, text, image, what = (str(raw.get(key) or "")[:400] for key in ("id", "text", "image", "what"))
        weights = weights or tuple((None,) * columns for _ in range(rows))
        return cls(name, text, image, what, None if layer is None else int(layer), weights, words)

    @property
    def strip(self) -> tuple[str, ...]:
        """What layers of one picture have in common."""
        return self.id, self.image, re.sub(r",? *layer -?\d+", "", self.what), "words" if self.words else ""


@dataclass(frozen=True)
class Strip:
    """One picture: alone, and with what several layers do with it."""

    text: str
    what: str
    shown: tuple[tuple[str, str], ...]
    read: bool
    frequent: str
    problem: str


def strips(root: Path, raw: Any) -> tuple[list[Strip], list[str]]:
    """What is shown of pictures.json, and what is not.

    Args:
        root: The run directory; pictures lie in its folder pictures/.
        raw: The content of pictures.json.

    Raises:
        ValueError: If it is no list at all.
    """
    if not isinstance(raw, list):
        raise ValueError("it holds no list of pictures")
    found: dict[tuple[str, ...], list[Overlay]] = {}
    faults: Counter[str] = Counter()
    for item in raw:
        try:
            overlay = Overlay.of(item)
            found.setdefault(overlay.strip, []).append(overlay)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            faults[f"{type(error).__name__}: {str(error)[:120]}"] += 1
    told = [f"{n} of {len(raw)} pictures cannot be read ({why})." for why, n in faults.most_common(6)]
    if len(found) > _MOST_STRIPS:
        told.append(f"{len(found) - _MOST_STRIPS} further pictures stand in pictures.json.")
    kept = list(found.items())[:_MOST_STRIPS]
    return [_strip(root, number, key[2], group) for number, (key, group) in enumerate(kept)], told


def named(root: Path, name: str, side: int) -> "Image | None":
    """A picture of the run directory's folder pictures/, whether its name says so or not; None where it has none."""
    return small(root / "pictures", name.removeprefix("pictures/"), side) if name else None


def _strip(root: Path, number: int, what: str, group: Sequence[Overlay]) -> Strip:
    group = sorted(group, key=lambda overlay: -1 if overlay.layer is None else overlay.layer)
    picture = named(root, group[0].image, _PIXELS)
    width, height = picture.size if picture else (len(group[0].weights[0]), len(group[0].weights))
    scale = (READ if group[0].words else SIDE) / max(width, height)
    size = (width * scale, height * scale)
    name = f"picture-{number}"
    alone = []
    if picture:
        image = f'<image id="{name}" width="{size[0]:.0f}" height="{size[1]:.0f}" href="{packed(picture)}"/>'
        alone = [("as it is", _framed(size, "the picture", image))]
    reach = max((abs(v) for o in group for row in o.weights for v in row if v is not None), default=0.0) or 1.0
    reach = 1.0 if group[0].words and reach <= 1 else reach
    kept = _spread(group, _MOST_LAYERS)
    under = name if picture else ""
    drawn = [("" if o.layer is None else f"layer {o.layer}", _overlaid(o, size, reach, under)) for o in kept]
    problem = "" if picture else f"The picture {group[0].image or '(none named)'} cannot be shown."
    if len(kept) < len(group):
        problem = f"{problem} {len(group) - len(kept)} layers in between are left out.".strip()
    return Strip(group[0].text, what, (*alone, *drawn), bool(group[0].words), _frequent(group[-1]), problem)


def _spread(group: Sequence[Overlay], most: int) -> list[Overlay]:
    """At most so many, evenly taken, the first and the last among them."""
    if len(group) <= most:
        return list(group)
    return [group[round(i * (len(group) - 1) / (most - 1))] for i in range(most)]


def _overlaid(overlay: Overlay, size: tuple[float, float], reach: float, name: str) -> str:
    """Cells over the picture, which is faded so that they stand out."""
    rows, columns = len(overlay.weights), len(overlay.weights[0])
    width, height = size[0] / columns, size[1] / rows
    tips = rows * columns <= _MOST_TIPS
    under = f'<use class="ghost" href="#{name}"/>' if name else ""
    cells = _tipped(overlay, width, height, reach) if tips else _merged(overlay, width, height, reach)
    body = under + "".join(cells) + "".join(_texts(overlay, width, height))
    return _framed(size, f"{overlay.what or 'weights'}: strongest {_strongest(overlay)}", body)


def _levels(overlay: Overlay, reach: float) -> Iterator[tuple[int, int, str, float]]:
    """(row, column, color, how much it covers) of each defined cell; where values have signs, so do the colors."""
    signed = any(v is not None and v < 0 for row in overlay.weights for v in row)
    for i, row in enumerate(overlay.weights):
        for j, value in enumerate(row):
            if value is not None:
                share = min(abs(value) / reach, 1.0)
                color = theme.signed_color(value / reach) if signed else theme.HEAT
                yield i, j, color, round(0.82 * share**0.8, 2)


def _tipped(overlay: Overlay, width: float, height: float, reach: float) -> Iterator[str]:
    for i, j, color, cover in _levels(overlay, reach):
        place = f'x="{j * width:.1f}" y="{i * height:.1f}" width="{width:.1f}" height="{height:.1f}"'
        value = overlay.weights[i][j] or 0.0
        said = f"row {i + 1}, column {j + 1}: {short(value)}"
        if overlay.words:
            said = f"“{overlay.words[i][j]}”: {percent(value)}"
        tip = f"<title>{escape(printable(said))}</title>"
        yield f'<rect fill="{color}" fill-opacity="{cover:g}" {place}>{tip}</rect>'


def _merged(overlay: Overlay, width: float, height: float, reach: float) -> Iterator[str]:
    """Cells of one look as one shape: fine grids have thousands."""
    shapes: dict[tuple[str, float], list[str]] = {}
    for i, j, color, cover in _levels(overlay, reach):
        box = f"M{j * width:.1f} {i * height:.1f}h{width:.1f}v{height:.1f}h-{width:.1f}z"
        shapes.setdefault((color, round(cover, 1)), []).append(box)
    for (color, cover), boxes in shapes.items():
        if cover:
            yield f'<path fill="{color}" fill-opacity="{cover:g}" d="{"".join(boxes)}"/>'


def _texts(overlay: Overlay, width: float, height: float) -> Iterator[str]:
    """The words, where a cell has room to read one."""
    if not overlay.words or width < _LEGIBLE:
        return
    size = min(10.0, height / 1.5, width / 2.6)
    for i, row in enumerate(overlay.words):
        for j, word in enumerate(row):
            text, room = printable(word.strip()), int(width / (0.64 * size))
            while text and text_width(text) > room:
                text = text[:-1]
            place = f'x="{(j + 0.5) * width:.1f}" y="{(i + 0.5) * height + size / 3:.1f}" text-anchor="middle"'
            yield f'<text class="over" font-size="{size:.1f}" {place}>{escape(text)}</text>'


def _framed(size: tuple[float, float], words: str, body: str) -> str:
    said = escape(printable(words))
    box = f"0 0 {size[0]:.0f} {size[1]:.0f}"
    return f'<svg viewBox="{box}" role="img" aria-label="{said}"><title>{said}</title>{body}</svg>'


def _strongest(overlay: Overlay) -> str:
    known = [(v, -i, -j) for i, row in enumerate(overlay.weights) for j, v in enumerate(row) if v is not None]
    if not known:
        return "undefined everywhere"
    value, i, j = max(known)
    return f"{short(value)} in row {1 - i}, column {1 - j}"


def _frequent(overlay: Overlay) -> str:
    """The words that most parts are read as, in the last layer shown."""
    found = Counter(word.strip() for row in overlay.words for word in row if word.strip())
    where = "" if overlay.layer is None else f" in layer {overlay.layer}"
    named = ", ".join(f"“{printable(word)}” {n} times" for word, n in found.most_common(6))
    return f"Most frequent{where}: {named}." if named else ""
