"""Boxes against the size of their picture, which no row tells.

Data flow: ``choosing`` (a Scene and the size of its picture) -> ``in_picture`` -> the Scene without what is not in it;
``say_what_they_look_like`` -> a decision where all boxes together look like those of another format.

Shapes: a box is x0, y0, x1, y1 in pixels.
"""

from collections.abc import Iterable
from dataclasses import replace

from lightning_mm.data.probing.scenes import Box, Scene
from lightning_mm.data.sample import Rejection
from lightning_mm.decisions import decide

Size = tuple[int, int]
_SLACK = 1.02
"""Annotators draw boxes a little beyond the edge."""
_FEWEST = 8
"""Boxes that say something about all of a file."""


def in_picture(scene: Scene, size: Size) -> tuple[Scene, list[Rejection]]:
    """The scene without the things whose boxes lie outside its picture, each with an entry.

    Args:
        scene: What its row tells.
        size: Width and height of its picture, as stored.
    """
    kept, outside = [], []
    for each in scene.objects or ():
        if each.box is None or clipped(each.box, size):
            kept.append(each)
        else:
            told = f"box outside the picture: {each.name!r} at {list(each.box)}, the picture is {size[0]} x {size[1]}"
            outside.append(Rejection(scene.origin, told, "cut"))
    return (replace(scene, objects=tuple(kept)) if outside else scene), outside


def clipped(box: Box, size: Size) -> Box | None:
    """What of a box is inside a picture of this width and height; None where nothing is."""
    left, top, right, bottom = max(0.0, box[0]), max(0.0, box[1]), min(box[2], size[0]), min(box[3], size[1])
    return (left, top, right, bottom) if left < right and top < bottom else None


def say_what_they_look_like(placed: Iterable[tuple[Box, Size]]) -> None:
    """Say so where boxes look as if they were of another format; they are read as x0, y0, x1, y1 in pixels.

    Width and height, taken for the far corner, never reach beyond the picture; but then no box at all has its centre
    right of the middle, or below it.

    Args:
        placed: Every box, and the size of its picture.
    """
    found = list(placed)
    if len(found) < _FEWEST:
        return
    over = sum(box[2] > _SLACK * size[0] or box[3] > _SLACK * size[1] for box, size in found)
    partial = [(box, size) for box, size in found if box[2] - box[0] < size[0] or box[3] - box[1] < size[1]]
    if over > 0.1 * len(found):
        reason = (
            f"{over} of {len(found)} reach beyond their picture: looks like pixels of another size of the pictures, "
            "or a scale to 1000; scale them to the files"
        )
    elif len(partial) >= _FEWEST and all(box[0] + box[2] <= w and box[1] + box[3] <= h for box, (w, h) in partial):
        reason = (
            f"all of the {len(partial)} lie to the upper left: looks like x, y, w, h; if so, give [x, y, x + w, y + h]"
        )
    else:
        return
    decide("data.probes.boxes", "read as x0, y0, x1, y1 in pixels", reason)
