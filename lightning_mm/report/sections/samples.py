"""The report's sample questions: what the model said before and after, with small pictures inside the page.

Data flow: rows of samples.json and pictures of the run directory -> ``local`` lays them out. All of it is untrusted:
pictures outside the folder, of too many pixels, or that are none, are not shown, and that is said.
"""

import base64
import io
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 160
"""The longer side of a sample picture, in pixels."""
_MOST_SAMPLES, _LONGEST_TEXT, _MOST_PIXELS = 48, 160, 40_000_000
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Those that are decoded in this process: EPS would start Ghostscript."""
_BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, NotImplementedError,
    struct.error, zlib.error,
)  # fmt: skip
"""What decoders raise on bytes that are not what they promise to be."""


@dataclass(frozen=True)
class Answer:
    """What the model said before or after training, and whether that was right (None: not scored)."""

    when: str
    text: str
    correct: bool | None


@dataclass(frozen=True)
class Shown:
    """One sample as it is shown."""

    pictures: tuple[str, ...]
    lost: str
    question: str
    truth: str
    kind: str
    answers: tuple[Answer, ...]


def samples(root: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The samples as they are shown, and how many turned right or wrong.

    Args:
        root: The run directory that the pictures' names begin at.
        rows: The content of samples.json.
    """
    pairs = [(row.get("correct_before"), row.get("correct_after")) for row in rows]
    turns = {
        "became right": pairs.count((False, True)),
        "stayed right": pairs.count((True, True)),
        "stayed wrong": pairs.count((False, False)),
        "became wrong": pairs.count((True, False)),
    }
    shown = [_shown(root, row) for row in rows[:_MOST_SAMPLES]]
    return {"shown": shown, "total": len(rows), "turns": {words: n for words, n in turns.items() if n}}


def _shown(root: Path, row: Mapping[str, Any]) -> Shown:
    thumbnails = [thumbnail(root, str(name)) for name in row.get("images") or []]
    lost = sum(not data for data in thumbnails)
    asked = [when for when in ("before", "after") if row.get(when) is not None]
    answers = tuple(Answer(when, _cut(row[when]), row.get(f"correct_{when}")) for when in asked)
    return Shown(
        tuple(data for data in thumbnails if data),
        f"{lost} picture{'s' if lost > 1 else ''} cannot be shown" if lost else "",
        _cut(row["question"]),
        _cut(row["truth"]),
        str(row.get("type", "")),
        answers,
    )


def thumbnail(root: Path, name: str) -> str:
    """A picture of the run directory as a data URL of at most 160 pixels a side; empty where there is none to show."""
    picture = small(root, name, THUMBNAIL)
    return packed(picture) if picture else ""


def small(root: Path, name: str, side: int) -> "Image | None":
    """A picture of the run directory on white, at most ``side`` pixels a side; None where there is none to show."""
    from PIL import Image, ImageOps

    Image.init()
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as picture:
                if picture.width * picture.height > _MOST_PIXELS:
                    return None
                shown = ImageOps.exif_transpose(picture).convert("RGBA")
    except (*_BROKEN, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    shown.thumbnail((side, side))
    paper = Image.new("RGB", shown.size, "white")
    paper.paste(shown, mask=shown.getchannel("A"))
    return paper


def packed(picture: "Image") -> str:
    """A picture as a data URL."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _cut(text: object) -> str:
    words = str(text)
    rest = len(words) - _LONGEST_TEXT
    return words if rest <= 0 else f"{words[:_LONGEST_TEXT]} … ({rest:,} more characters)"
