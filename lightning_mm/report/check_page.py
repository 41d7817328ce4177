"""The page of a check: what was found of the data of a run, and samples with their pictures, in one file.

Data flow: plain data of ``verbs.check_result`` and pictures -> ``templates/check.html.jinja`` -> a page that asks for
nothing outside of it.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mm.report.figures.figure import printable
from lightning_mm.report.html import write_page
from lightning_mm.report.sections.samples import packed

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 320
"""Longer side of a picture on the page, in pixels."""
_MOST_PICTURES = 8
_LEVELS = ("min", "median", "p95", "max")
_KINDS = ("text", "image", "supervised", "total")


def write_check_page(
    path: Path,
    found: Mapping[str, Any],
    texts: Sequence[Sequence[tuple[str, str]]],
    pictures: Sequence[Sequence["Image"]],
) -> Path:
    """Write the page of a check; returns its path.

    Args:
        path: The file.
        found: What ``lightning-mm check --json`` writes.
        texts: Parts of the text of each sample: (context, learned or cut; text).
        pictures: Pictures of each sample.

    Raises:
        UserError: It cannot be written.
    """
    content = {
        "name": "Data check",
        "rows": found["rows"],
        "outcome": _outcome(found),
        "error": found["error"],
        "max_length": found["max_length"],
        "is_exact": found["lengths_are_exact"],
        "sources": found["sources"],
        "lengths": [
            (split, [(kind, [round(each["lengths"][kind][level]) for level in _LEVELS]) for kind in _KINDS], over)
            for split, each in found["splits"].items()
            if each["lengths"] and (over := each["lengths"]["over_max_length"])
        ],
        "levels": _LEVELS,
        "duplicates": found["duplicates"],
        "samples": [
            {**sample, "parts": _parts(parts), "pictures": _thumbnails(images), "more": len(images) - _MOST_PICTURES}
            for sample, parts, images in zip(found["samples"], texts, pictures, strict=True)
        ],
        "written": datetime.now().strftime("%Y-%m-%d %H:%M"),
    }
    return write_page(path, "check.html.jinja", content)


def _outcome(found: Mapping[str, Any]) -> str:
    rows = found["rows"]
    dropped = f"{rows['dropped']:,} are dropped" if rows["dropped"] else "none is dropped"
    return f"{rows['used']:,} of {rows['read']:,} rows are used, {dropped}."


def _parts(parts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(kind, "\n".join(map(printable, text.split("\n")))) for kind, text in parts]


def _thumbnails(images: Sequence["Image"]) -> list[str]:
    made = []
    for image in images[:_MOST_PICTURES]:
        small = image.copy()
        small.thumbnail((_SIDE, _SIDE))
        made.append(packed(small))
    return made
