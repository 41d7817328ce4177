"""Probe labels about the objects of an image: which are present, how many, and on which side the only one is.

A class must be present in at least ``MIN_PICTURES`` images, and ``MIN_SHARE`` of them, and absent in as many. Of the
levels of object names (name, group, category) the finest is used whose frequent classes cover half of all objects.

Data flow: Scenes with objects -> ``ObjectProbes.of`` (classes that are frequent enough) -> labels of ``picture`` rows.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mm.core.decisions import log_decision
from lightning_mm.data.probe_sets.build.patch_grids import clip_box
from lightning_mm.data.probe_sets.build.scenes import LEVELS, Box, Scene, SceneObject
from lightning_mm.data.probe_sets.files import Label, ObjectBox

MIN_PICTURES = 8
MIN_SHARE = 0.02
MAX_BOXES = 8
"""Largest number of objects per image with a site of their own."""
OFF_CENTER = 0.1
"""Minimum horizontal distance of a box center from the image center, as a share of the width."""
SIDES = ("left", "right")


@dataclass(frozen=True)
class ObjectProbes:
    """Classes of the object probes, determined for a whole set.

    Args:
        level: One of ``LEVELS``: the name that is an object's class.
        classes: Names of the object classes; empty if nothing is frequent enough.
        counts: Numbers of objects that are frequent enough.
        has_sides: Whether enough images show a single object off the center.
    """

    level: str
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    has_sides: bool

    @classmethod
    def of(cls, scenes: Sequence[Scene], sizes: Sequence[tuple[int, int]]) -> "ObjectProbes":
        """The classes for a set of scenes; they are logged.

        Args:
            scenes: Scenes of the set.
            sizes: Width and height in pixels of each image.
        """
        known = [scene for scene in scenes if scene.objects is not None]
        if not known:
            return cls("name", (), (), False)
        least = max(MIN_PICTURES, math.ceil(MIN_SHARE * len(known)))
        level, classes = _finest_level(known, least)
        how = f"those in {least} pictures or more, and missing in as many, of {len(known)}; by {level}"
        log_decision("data.probes.objects", f"{len(classes)} classes: {', '.join(classes) or 'none'}", how)
        counts = _frequent_values(least, [_count(scene) for scene in known])
        log_decision(
            "data.probes.count",
            ", ".join(map(str, counts)) or "not asked",
            f"numbers of things in {least} pictures or more",
        )
        sides = [_side(scene, size) for scene, size in zip(scenes, sizes, strict=True)]
        has_sides = set(_frequent_values(least, sides)) == set(range(len(SIDES)))
        per_side = Counter(SIDES[side] for side in sides if side is not None)
        log_decision(
            "data.probes.position",
            f"{per_side['left']} left, {per_side['right']} right" if has_sides else "not asked",
            f"pictures of one thing whose centre is {OFF_CENTER:.0%} of the width or more off the middle, "
            f"{least} or more of each side",
        )
        return cls(level, classes, counts, has_sides)

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Probe -> names of its classes."""
        named = {
            "objects": self.classes,
            "object_at_patches": self.classes,
            "position": SIDES if self.has_sides else (),
            "count": tuple(map(str, self.counts)),
        }
        return {probe: classes for probe, classes in named.items() if classes}

    def labels(self, scene: Scene, size: tuple[int, int]) -> tuple[dict[str, Label], tuple[ObjectBox, ...]]:
        """Labels of one image, and the objects whose patches are read."""
        if scene.objects is None:
            return {}, ()
        labels: dict[str, Label] = {}
        placed = self._placed(scene.objects, size)
        if self.classes:
            there = {each.kinds.get(self.level) for each in scene.objects}
            labels["objects"] = tuple(int(name in there) for name in self.classes)
        if placed:
            labels["object_at_patches"] = tuple(self.classes.index(each.kinds[self.level]) for each, _ in placed)
        if (count := _count(scene)) in self.counts:
            assert count is not None
            labels["count"] = self.counts.index(count)
        if self.has_sides and (side := _side(scene, size)) is not None:
            labels["position"] = side
        return labels, tuple(ObjectBox(each.name, box) for each, box in placed)

    def _placed(self, objects: Sequence[SceneObject], size: tuple[int, int]) -> list[tuple[SceneObject, Box]]:
        """The largest objects of a class, with their boxes clipped to the image."""
        inside = [(each, box) for each in objects if each.box and (box := clip_box(each.box, size))]
        classed = [(each, box) for each, box in inside if each.kinds.get(self.level) in self.classes]
        return sorted(classed, key=lambda placed: -_area(placed[1]))[:MAX_BOXES]


def _finest_level(scenes: Sequence[Scene], least: int) -> tuple[str, tuple[str, ...]]:
    """The finest level whose frequent classes cover half of all objects, else the one with most; and its classes."""
    held: dict[str, tuple[float, tuple[str, ...]]] = {}
    for level in LEVELS:
        pictures = Counter(kind for scene in scenes for kind in _kinds(scene, level))
        classes = tuple(sorted(kind for kind, n in pictures.items() if least <= n <= len(scenes) - least))
        things = [each.kinds.get(level) for scene in scenes for each in scene.objects or ()]
        held[level] = (sum(kind in classes for kind in things) / max(1, len(things)), classes)
        if len(classes) > 1 and held[level][0] >= 0.5:
            return level, classes
    best = max(LEVELS, key=lambda level: held[level][0])
    return best, held[best][1]


def _kinds(scene: Scene, level: str) -> set[str]:
    return {each.kinds[level] for each in scene.objects or () if level in each.kinds}


def _count(scene: Scene) -> int | None:
    """Number of objects; None where some are not listed one by one."""
    if scene.objects is None or any(each.box is None for each in scene.objects):
        return None
    return len(scene.objects)


def _side(scene: Scene, size: tuple[int, int]) -> int | None:
    """Index into ``SIDES`` for an image of a single object that is clearly off the center."""
    if _count(scene) != 1:
        return None
    assert scene.objects is not None
    box = scene.objects[0].box
    assert box is not None
    off = (box[0] + box[2]) / 2 / size[0] - 0.5
    return None if abs(off) < OFF_CENTER else int(off > 0)


def _frequent_values(least: int, values: Sequence[int | None]) -> tuple[int, ...]:
    """Values that occur at least ``least`` times; empty if only one does."""
    counts = Counter(value for value in values if value is not None)
    frequent = tuple(sorted(value for value, n in counts.items() if n >= least))
    return frequent if len(frequent) > 1 else ()


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
