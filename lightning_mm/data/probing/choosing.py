"""Which pictures a probe set is about, their files checked.

Data flow: Scenes of a file -> ``choose`` -> Shown pictures -> ``drawing``.
"""

import random
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from lightning_mm.data.images import FORMATS, BadImage
from lightning_mm.data.probing.scenes import Scene
from lightning_mm.data.sample import Rejection

_ORIENTATION = 0x0112
"""EXIF's tag for how the camera was held; 1 is upright."""


@dataclass(frozen=True)
class Shown:
    """A chosen picture.

    Args:
        scene: What is known of it.
        size: Width and height in pixels, as stored.
    """

    scene: Scene
    size: tuple[int, int]


def choose(
    scenes: Iterable[Scene], max_pictures: int, size_of: Callable[[Path], tuple[int, int]], seed: int
) -> tuple[list[Shown], list[Rejection]]:
    """Choose at most so many pictures: by lot, those that most is known of before the others, groups as a whole.

    Args:
        scenes: To choose from.
        max_pictures: At most so many.
        size_of: Width and height of a picture file; it raises BadImage where the file cannot be used.
        seed: Of the lot.

    Returns:
        The chosen pictures in the order of their ids, and the files that were met and cannot be used.
    """
    chosen: list[Shown] = []
    rejections: list[Rejection] = []
    for unit in _units(scenes, seed):
        if len(chosen) == max_pictures:
            break
        if len(chosen) + len(unit) > max_pictures:
            continue
        for scene in unit:
            try:
                chosen.append(Shown(_upright(scene, rejections), size_of(scene.image)))
            except BadImage as error:
                rejections.append(Rejection(scene.origin, str(error)))
    return sorted(chosen, key=lambda shown: shown.scene.id), rejections


def _units(scenes: Iterable[Scene], seed: int) -> list[list[Scene]]:
    """Groups, and scenes of no group, shuffled; the richer ones first."""
    by_group: dict[tuple[str, str], list[Scene]] = {}
    for scene in sorted(scenes, key=lambda scene: scene.id):
        by_group.setdefault(("group", scene.group) if scene.group else ("alone", scene.id), []).append(scene)
    units = list(by_group.values())
    random.Random(f"{seed}:pictures").shuffle(units)
    return sorted(units, key=_poverty)


def _poverty(unit: Sequence[Scene]) -> float:
    return -sum(scene.richness for scene in unit) / len(unit)


def _upright(scene: Scene, rejections: list[Rejection]) -> Scene:
    """The scene; without boxes if its file asks to be turned before it is shown, since they speak of it as stored."""
    if not any(each.box for each in scene.objects or ()) or not _is_turned(scene.image):
        return scene
    rejections.append(Rejection(scene.origin, "boxes not used: EXIF turns the picture", "cut"))
    return replace(scene, objects=tuple(replace(each, box=None) for each in scene.objects or ()))


def _is_turned(path: Path) -> bool:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return bool(image.getexif().get(_ORIENTATION, 1) != 1)
    except (
        OSError,
        ValueError,
        SyntaxError,
        struct.error,
    ):
        return False  # no picture: its header is checked next
