"""What is asked about things: classes frequent enough, labels that say what is there, boxes that are the picture's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_mm.core.decisions import decision_log
from lightning_mm.data.probe_sets.build.objects import MAX_BOXES, ObjectProbes
from lightning_mm.data.probe_sets.build.scenes import Scene, SceneObject
from lightning_mm.data.probe_sets.probe_set import ObjectBox

SIZE = (100, 80)
Box = tuple[float, float, float, float]
LEFT, MIDDLE, RIGHT = (0.0, 0.0, 60.0, 80.0), (10.0, 0.0, 90.0, 80.0), (60.0, 0.0, 100.0, 80.0)


def scene(number: int, *things: tuple[str, str, Box | None]) -> Scene:
    objects = tuple(SceneObject({"name": name, "category": category}, box) for name, category, box in things)
    return Scene(str(number), Path(f"/{number}.png"), str(number), (), (), objects)


def asked(scenes: Sequence[Scene]) -> ObjectProbes:
    return ObjectProbes.of(scenes, [SIZE] * len(scenes))


def pets(count: int) -> list[Scene]:
    """Cats and dogs in turn, left, middle and right in turn, every third with a toy that nothing else is."""
    made = []
    for i in range(count):
        things: list[tuple[str, str, Box | None]] = [(("cat", "dog")[i % 2], "animal", (LEFT, MIDDLE, RIGHT)[i % 3])]
        made.append(scene(i, *things, *([(f"toy {i}", "toy", MIDDLE)] if i % 3 == 1 else [])))
    return made


def test_labels_of_a_picture() -> None:
    questions = asked(pets(60))
    assert (questions.level, questions.classes, questions.counts) == ("name", ("cat", "dog"), (1, 2))
    labels, boxes = questions.labels(pets(60)[0], SIZE)
    assert labels == {"objects": (1, 0), "object_at_patches": (0,), "count": 0, "position": 0}
    assert boxes == (ObjectBox("cat", LEFT),)
    labels, boxes = questions.labels(pets(60)[1], SIZE)
    assert labels == {"objects": (0, 1), "object_at_patches": (1,), "count": 1}
    assert [each.name for each in boxes] == ["dog"], "toys are of no class"
    labels, _ = questions.labels(pets(60)[5], SIZE)
    assert labels["position"] == 1
    assert questions.names == {
        "objects": ("cat", "dog"),
        "object_at_patches": ("cat", "dog"),
        "position": ("left", "right"),
        "count": ("1", "2"),
    }


def test_a_coarser_level_where_names_are_too_rare() -> None:
    scenes = [scene(i, (f"thing {i}", ("animal", "food", "toy")[i % 3], MIDDLE)) for i in range(48)]
    questions = asked(scenes)
    assert (questions.level, questions.classes) == ("category", ("animal", "food", "toy"))
    assert questions.labels(scenes[1], SIZE)[0]["objects"] == (0, 1, 0)


def test_what_is_everywhere_or_nowhere_is_no_class() -> None:
    scenes = [scene(i, ("wall", "x", None), *([("cat", "y", MIDDLE)] if i % 2 else [])) for i in range(40)]
    assert asked(scenes).classes == ("cat",)
    assert asked(scenes[:10]).classes == ()


def test_no_count_and_no_side_where_things_are_not_told_one_by_one() -> None:
    questions = asked([*pets(60), *[scene(100 + i, ("cat", "animal", None)) for i in range(20)]])
    labels, boxes = questions.labels(scene(100, ("cat", "animal", None)), SIZE)
    assert labels == {"objects": (1, 0)}
    assert boxes == ()


def test_pictures_of_which_nothing_is_known_say_nothing() -> None:
    bare = Scene("1", Path("/1.png"), "1", ("a cat",))
    assert asked([bare]).names == {}
    assert asked([*pets(60), bare]).labels(bare, SIZE) == ({}, ())


@pytest.mark.parametrize(
    ("box", "clipped"),
    [((-5, -5, 50, 50), (0, 0, 50, 50)), ((90, 70, 120, 90), (90, 70, 100, 80)), ((100, 0, 120, 9), None)],
)
def test_boxes_end_where_the_picture_does(box: Any, clipped: Any) -> None:
    _, boxes = asked(pets(60)).labels(scene(0, ("cat", "animal", box)), SIZE)
    assert [each.box for each in boxes] == ([clipped] if clipped else [])


def test_the_largest_boxes_are_kept() -> None:
    things: list[tuple[str, str, Box | None]] = [("cat", "animal", (0, 0, 5 + i, 9)) for i in range(20)]
    labels, boxes = asked(pets(60)).labels(scene(0, *things), SIZE)
    assert [each.box[2] for each in boxes] == list(range(24, 24 - MAX_BOXES, -1))
    assert labels["object_at_patches"] == (0,) * MAX_BOXES


def test_decisions_are_said() -> None:
    decision_log().clear()
    asked(pets(60))
    said = {decision.name: decision.value for decision in decision_log()}
    assert said["data.probes.objects"] == "2 classes: cat, dog"
    assert said["data.probes.count"] == "1, 2"
    assert said["data.probes.position"] == "20 left, 20 right"
    asked(pets(6))
    assert [d.value for d in decision_log() if d.name == "data.probes.objects"][-1] == "0 classes: none"
