"""Cut-outs of things from a folder of Tux Paint stamps (Debian's tuxpaint-stamps-default), an optional second source.

Data flow: ``<folder>/<category>/.../<name>.png`` and its caption ``<name>.txt`` -> ``Thing``, or a ``Rejection`` with
its reason -> ``splits``.
"""

import hashlib
import re
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lightning_mm.core.errors import UserError
from lightning_mm.data.sample import Rejection
from lightning_mm.nano.data.catalog import Thing, crop_transparent, entries

DEFAULT_FOLDER = Path("/usr/share/tuxpaint/stamps")
_CATEGORIES = {
    "animals": "animal",
    "food": "food",
    "vehicles": "vehicle",
    "household": "household",
    "clothes": "clothing",
    "plants": "plant",
}
_MAX_PIXELS = 16_000_000


def load_stamps(folder: Path, size: int) -> tuple[list[Thing], list[Rejection]]:
    """Every stamp of a known category whose caption is "A ..." or "An ..." with at most three words.

    Args:
        folder: Folder of stamps.
        size: Longest side of a cut-out in pixels; larger ones are scaled down.

    Raises:
        UserError: The folder holds no stamp.
    """
    groups = {entry.name: entry.group for entry in entries()}
    things: list[Thing] = []
    rejected: list[Rejection] = []
    for path in _stamp_files(folder):
        found = _load(path, path.relative_to(folder), size, groups)
        if isinstance(found, Thing):
            things.append(found)
        else:
            rejected.append(Rejection(f"stamps:{path.relative_to(folder).as_posix()}", found))
    return things, rejected


def stamps_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of every image and caption: part of the recipe."""
    digest = hashlib.sha256()
    for path in _stamp_files(folder):
        caption = path.with_suffix(".txt")
        digest.update(path.relative_to(folder).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
        digest.update(hashlib.sha256(caption.read_bytes() if caption.is_file() else b"").digest())
    return digest.hexdigest()


def _stamp_files(folder: Path) -> list[Path]:
    paths = sorted(folder.rglob("*.png"))
    if not paths:
        raise UserError(
            f"No stamps in {folder}.",
            "It holds no .png file.",
            "Name the folder of stamps that Debian's tuxpaint-stamps-default holds.",
        )
    return paths


def _load(path: Path, place: Path, size: int, groups: dict[str, str]) -> Thing | str:
    """The ``Thing`` of one stamp, or why it is left out."""
    category = _CATEGORIES.get(place.parts[0])
    if category is None:
        return "a stamp of none of the six categories"
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        return "a stamp without a caption"
    line = caption.read_text("utf-8", errors="replace").split("\n", 1)[0].strip()
    match = re.fullmatch(r"An? ([a-z-]+(?: [a-z-]+){0,2})\.?", line)
    if match is None:
        return 'a stamp whose caption is not "A ..." with at most three words'
    cutout = _cutout(path, size)
    if isinstance(cutout, str):
        return cutout
    name = match[1]
    last = name.split()[-1]
    group = groups.get(name) or groups.get(last) or last
    return Thing(f"stamps:{place.with_suffix('').as_posix()}", name, category, group, "one", lambda: cutout)


def _cutout(path: Path, size: int) -> Image.Image | str:
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > _MAX_PIXELS:
                return "a stamp of more than 16 million pixels"
            cutout = crop_transparent(picture.convert("RGBA"))
    except (UnidentifiedImageError, OSError):
        return "a stamp that cannot be read"
    if cutout is None:
        return "a stamp that is wholly transparent"
    cutout.thumbnail((size, size), Image.Resampling.LANCZOS)
    return cutout
