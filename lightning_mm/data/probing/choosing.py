"""Which pictures a probe set is about, their files decoded once, so that none falls out later and leaves its partner.

Data flow: Scenes of a file -> ``choose`` -> Shown pictures -> ``drawing``.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_mm.data.images import BadImage, Picture
from lightning_mm.data.probing.boxes import in_picture, say_what_they_look_like
from lightning_mm.data.probing.scenes import Box, Scene
from lightning_mm.data.sample import Rejection
from lightning_mm.decisions import decide


@dataclass(frozen=True)
class Shown:
    """A chosen picture.

    Args:
        scene: What is known of it.
        size: Width and height in pixels; as stored, where its things have boxes.
    """

    scene: Scene
    size: tuple[int, int]


def choose(
    scenes: Iterable[Scene], max_pictures: int, load: Callable[[Path], Picture], seed: int
) -> tuple[list[Shown], list[Rejection]]:
    """Choose at most so many pictures: by lot, those that most is known of before the others, groups as a whole.

    Args:
        scenes: To choose from.
        max_pictures: At most so many. Of a group of more, some are drawn.
        load: Decodes a picture file; it raises BadImage where the file cannot be used.
        seed: Of the lot.

    Returns:
        The chosen pictures in the order of their ids, and what was met and cannot be used.
    """
    chosen: list[Shown] = []
    rejections: list[Rejection] = []
    boxes: list[tuple[Box, tuple[int, int]]] = []
    for unit in _sampled(_units(scenes, seed), max_pictures, seed):
        if len(chosen) == max_pictures:
            break
        if len(chosen) + len(unit) <= max_pictures:
            shown, faults = _shown(unit, load, boxes)
            chosen += shown
            rejections += faults
    say_what_they_look_like(boxes)
    return sorted(chosen, key=lambda shown: shown.scene.id), rejections


def _units(scenes: Iterable[Scene], seed: int) -> list[list[Scene]]:
    """Groups, and scenes of no group, shuffled; the richer ones first."""
    by_family: dict[tuple[bool, str], list[Scene]] = {}
    for scene in sorted(scenes, key=lambda scene: scene.id):
        by_family.setdefault((not scene.group, scene.family), []).append(scene)
    units = list(by_family.values())
    random.Random(f"{seed}:pictures").shuffle(units)
    return sorted(units, key=_poverty)


def _sampled(units: list[list[Scene]], max_pictures: int, seed: int) -> list[list[Scene]]:
    """The units, of those that would never fit an even share."""
    share = max(2, max_pictures // max(1, len(units)))
    too_large = [unit for unit in units if len(unit) > max_pictures]
    if too_large:
        decide(
            "data.probes.groups",
            f"{share} pictures of each group of more than {max_pictures}",
            f"{len(too_large)} groups, the largest of {max(map(len, too_large))} pictures",
        )
    lot = random.Random(f"{seed}:groups")
    return [lot.sample(unit, share) if len(unit) > max_pictures else unit for unit in units]


def _poverty(unit: Sequence[Scene]) -> float:
    return -sum(scene.richness for scene in unit) / len(unit)


def _shown(
    unit: Sequence[Scene], load: Callable[[Path], Picture], boxes: list[tuple[Box, tuple[int, int]]]
) -> tuple[list[Shown], list[Rejection]]:
    """Those whose files can be used; none of a group that gives wrong captions of its own and is not whole.

    All boxes that are met, and the sizes of their pictures, are added to ``boxes``.
    """
    shown: list[Shown] = []
    rejections: list[Rejection] = []
    for scene in unit:
        try:
            picture = load(scene.image)
        except BadImage as error:
            rejections.append(Rejection(scene.origin, str(error)))
            continue
        size = picture.image.size
        if not picture.is_turned:
            boxes += [(each.box, size) for each in scene.objects or () if each.box]
        scene, cut = _upright(scene) if picture.is_turned else in_picture(scene, size)
        shown.append(Shown(scene, size))
        rejections += cut
    if len(shown) < len(unit) and any(scene.false_captions for scene in unit):
        rejections += [not_whole(each.scene) for each in shown]
        shown = []
    return shown, rejections


def not_whole(scene: Scene) -> Rejection:
    """Why a sound row is not used: what is false in it is true in one that fell out, so its words would tell."""
    return Rejection(scene.origin, f"group not whole: another row of group {scene.group!r} cannot be used", "probe")


def _upright(scene: Scene) -> tuple[Scene, list[Rejection]]:
    """Without boxes, since they speak of the picture as stored, and it is turned before it is shown."""
    if not any(each.box for each in scene.objects or ()):
        return scene, []
    bare = replace(scene, objects=tuple(replace(each, box=None) for each in scene.objects or ()))
    return bare, [Rejection(scene.origin, "boxes not used: EXIF turns the picture", "cut")]
