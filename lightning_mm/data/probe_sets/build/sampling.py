"""A probe set, drawn once: which pictures, and every row that is asked about them.

Data flow: ``choosing`` (pictures) -> ``entailment`` (wrong captions), ``objects`` (classes) -> rows -> ``ProbeSet``.

Three roles of rows. ``entailment``: does the caption belong to the picture (2402.17304's global question)? With the
true caption, a random wrong one and a hard one. ``picture``: the picture and a question, for what things it shows
(2402.17304's local question). ``text``: the caption in the picture's place and the same question; with ``picture`` it
is a pair of equal meaning (2606.03871).

Which pictures a probe set is about, their files decoded once, so that none falls out later and leaves its partner.

Data flow: Scenes of a file -> ``select_images`` -> Shown pictures -> ``drawing``.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_mm.core.decisions import decide
from lightning_mm.core.errors import UserError
from lightning_mm.data.images import BadImage, DecodedImage
from lightning_mm.data.probe_sets.build.entailment import FalseCaptions, Kind, make_false_captions
from lightning_mm.data.probe_sets.build.objects import ObjectProbes
from lightning_mm.data.probe_sets.build.patch_grids import check_box_format, drop_outside_boxes
from lightning_mm.data.probe_sets.build.scenes import Box, Scene
from lightning_mm.data.probe_sets.files import Label, ObjectBox, ProbeRow, Role
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.data.sample import IMAGE_MARK, Rejection, Sample, Turn


@dataclass(frozen=True)
class SelectedImage:
    """A chosen picture.

    Args:
        scene: What is known of it.
        size: Width and height in pixels; as stored, where its things have boxes.
    """

    scene: Scene
    size: tuple[int, int]


def select_images(
    scenes: Iterable[Scene], max_pictures: int, load: Callable[[Path], DecodedImage], seed: int
) -> tuple[list[SelectedImage], list[Rejection]]:
    """Choose at most so many pictures: by lot, those that most is known of before the others, groups as a whole.

    Args:
        scenes: To choose from.
        max_pictures: At most so many. Of a group of more, some are drawn.
        load: Decodes a picture file; it raises BadImage where the file cannot be used.
        seed: Of the lot.

    Returns:
        The chosen pictures in the order of their ids, and what was met and cannot be used.
    """
    chosen: list[SelectedImage] = []
    rejections: list[Rejection] = []
    boxes: list[tuple[Box, tuple[int, int]]] = []
    for unit in _subsample_large_groups(_sampling_units(scenes, seed), max_pictures, seed):
        if len(chosen) == max_pictures:
            break
        if len(chosen) + len(unit) <= max_pictures:
            shown, faults = _load_unit(unit, load, boxes)
            chosen += shown
            rejections += faults
    check_box_format(boxes)
    return sorted(chosen, key=lambda shown: shown.scene.id), rejections


def _sampling_units(scenes: Iterable[Scene], seed: int) -> list[list[Scene]]:
    """Groups, and scenes of no group, shuffled; the richer ones first."""
    by_family: dict[tuple[bool, str], list[Scene]] = {}
    for scene in sorted(scenes, key=lambda scene: scene.id):
        by_family.setdefault((not scene.group, scene.family), []).append(scene)
    units = list(by_family.values())
    random.Random(f"{seed}:pictures").shuffle(units)
    return sorted(units, key=_negative_richness)


def _subsample_large_groups(units: list[list[Scene]], max_pictures: int, seed: int) -> list[list[Scene]]:
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


def _negative_richness(unit: Sequence[Scene]) -> float:
    return -sum(scene.richness for scene in unit) / len(unit)


def _load_unit(
    unit: Sequence[Scene], load: Callable[[Path], DecodedImage], boxes: list[tuple[Box, tuple[int, int]]]
) -> tuple[list[SelectedImage], list[Rejection]]:
    """Those whose files can be used; none of a group that gives wrong captions of its own and is not whole.

    All boxes that are met, and the sizes of their pictures, are added to ``boxes``.
    """
    shown: list[SelectedImage] = []
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
        scene, cut = _without_boxes(scene) if picture.is_turned else drop_outside_boxes(scene, size)
        shown.append(SelectedImage(scene, size))
        rejections += cut
    if len(shown) < len(unit) and any(scene.false_captions for scene in unit):
        rejections += [incomplete_group(each.scene) for each in shown]
        shown = []
    return shown, rejections


def incomplete_group(scene: Scene) -> Rejection:
    """Why a sound row is not used: what is false in it is true in one that fell out, so its words would tell."""
    return Rejection(scene.origin, f"group not whole: another row of group {scene.group!r} cannot be used", "probe")


def _without_boxes(scene: Scene) -> tuple[Scene, list[Rejection]]:
    """Without boxes, since they speak of the picture as stored, and it is turned before it is shown."""
    if not any(each.box for each in scene.objects or ()):
        return scene, []
    bare = replace(scene, objects=tuple(replace(each, box=None) for each in scene.objects or ()))
    return bare, [Rejection(scene.origin, "boxes not used: EXIF turns the picture", "cut")]


ENTAILMENT_PROMPT = 'This image describes "{caption}". Is it right? Answer:'
"""As in 2402.17304."""
PICTURE_QUESTION = "Which things are in this picture?"
TRUTH = ("false", "true")
_CAPTION_FIELD = "{caption}"


@dataclass(frozen=True)
class SampledProbeSet:
    """A probe set, and what could not be put into it."""

    probe_set: ProbeSet
    rejections: tuple[Rejection, ...]


def build_probe_rows(
    shown: Sequence[SelectedImage], *, source: str, prompt: str = ENTAILMENT_PROMPT, seed: int = 0
) -> SampledProbeSet:
    """Write every row that can be asked about these pictures.

    Args:
        shown: The chosen pictures.
        source: Where they are from, for the record.
        prompt: Of entailment rows, with ``{caption}`` where the caption goes.
        seed: Of the pairing.

    Raises:
        UserError: The prompt has no place for a caption, or nothing can be asked.
    """
    _check_prompt(prompt)
    scenes = [each.scene for each in shown]
    wrong = make_false_captions([scene for scene in scenes if scene.captions], seed)
    _log_false_captions(scenes, wrong)
    questions = ObjectProbes.of(scenes, [each.size for each in shown])
    rows: list[ProbeRow] = []
    rejections: list[Rejection] = []
    drafts = [made for each in shown for made in _rows(each, wrong.get(each.scene.id), questions, prompt)]
    torn = {made.group for made in drafts if made.role == "entailment" and not made.is_clear}
    for made in drafts:
        if not made.is_clear:
            rejections.append(Rejection(made.origin, f"caption says what the question says: {made.span!r}", "cut"))
        elif made.role == "entailment" and made.group in torn:
            rejections.append(Rejection(made.origin, f"trade not whole: {made.span!r} lost its counterpart", "cut"))
        else:
            rows.append(made.row())
    probes = {probe for row in rows for probe in row.labels}
    _check_any(source, rows, probes)
    named = {**dict.fromkeys(("entailment/random", "entailment/hard"), TRUTH), **questions.names}
    classes = {probe: names for probe, names in named.items() if probe in probes}
    return SampledProbeSet(ProbeSet(tuple(rows), classes, seed, source), tuple(rejections))


@dataclass(frozen=True)
class _RowDraft:
    """A row before it is known that its span can be found in its text."""

    id: str
    group: str
    role: Role
    text: str
    span: str
    image: Path | None
    labels: Mapping[str, Label]
    origin: str
    boxes: tuple[ObjectBox, ...] = ()

    @property
    def is_clear(self) -> bool:
        return self.text.count(self.span) == 1

    def row(self) -> ProbeRow:
        sample = Sample(self.id, (Turn("user", self.text),), (self.image,) if self.image else (), self.origin)
        return ProbeRow(self.id, self.group, self.role, sample, self.span, self.labels, self.boxes)


def _rows(
    shown: SelectedImage, wrong: FalseCaptions | None, questions: ObjectProbes, prompt: str
) -> Iterator[_RowDraft]:
    scene = shown.scene
    if wrong:
        yield from _entailment(scene, wrong, prompt)
    labels, boxes = questions.labels(scene, shown.size)
    if labels or scene.captions:
        text = f"{IMAGE_MARK}\n{PICTURE_QUESTION}"
        yield _RowDraft(
            f"{scene.id}:picture",
            scene.family,
            "picture",
            text,
            PICTURE_QUESTION,
            scene.image,
            labels,
            scene.origin,
            boxes,
        )
    if scene.captions:
        text = f"{scene.caption}\n{PICTURE_QUESTION}"
        yield _RowDraft(f"{scene.id}:text", scene.family, "text", text, scene.caption, None, {}, scene.origin)


def _entailment(scene: Scene, wrong: FalseCaptions, prompt: str) -> Iterator[_RowDraft]:
    """The true caption serves both probes: the wrong ones are as many in each."""
    said: dict[str, tuple[str, Mapping[str, Label]]] = {
        "true": (scene.caption, {"entailment/random": 1, "entailment/hard": 1}),
        "hard": (wrong.hard, {"entailment/hard": 0}),
    }
    if wrong.random is None:
        said["true"] = (scene.caption, {"entailment/hard": 1})
    else:
        said["random"] = (wrong.random, {"entailment/random": 0})
    head = "" if IMAGE_MARK in prompt else f"{IMAGE_MARK}\n"
    for name, (caption, labels) in said.items():
        text = head + prompt.replace(_CAPTION_FIELD, caption)
        yield _RowDraft(
            f"{scene.id}:{name}", wrong.group, "entailment", text, caption, scene.image, labels, scene.origin
        )


def _check_prompt(prompt: str) -> None:
    if prompt.count(_CAPTION_FIELD) != 1 or prompt.count(IMAGE_MARK) > 1:
        raise UserError(
            f"data.probe_prompt cannot be used: {prompt!r}.",
            f"It asks whether a caption is right, so it holds {_CAPTION_FIELD} once, and {IMAGE_MARK} once or not at all.",
            f"Write it like {ENTAILMENT_PROMPT!r}.",
        )


def _check_any(source: str, rows: Sequence[ProbeRow], probes: set[str]) -> None:
    if probes or any(row.role == "text" for row in rows):
        return
    raise UserError(
        f"Nothing can be probed with {source}.",
        "It takes two pictures with different captions, or two kinds of things, each in 8 pictures or more.",
        "Give --data.probes FILE with rows such as "
        '{"image": "a.jpg", "caption": "a cat", "objects": [{"name": "cat", "box": [0, 0, 9, 9]}]}.',
    )


def _log_false_captions(scenes: Sequence[Scene], wrong: Mapping[str, FalseCaptions]) -> None:
    captioned = sum(bool(scene.captions) for scene in scenes)
    kinds = Counter(each.kind for each in wrong.values())
    names: dict[Kind, str] = {
        "given": "given by their rows",
        "traded": "one noun traded",
        "nearest": "the nearest other",
    }
    told = ", ".join(f"{kinds[kind]} {name}" for kind, name in names.items() if kinds[kind])
    alone = captioned - len(wrong)
    decide(
        "data.probes.entailment",
        f"hard wrong captions: {told or 'none'}",
        f"{captioned} of {len(scenes)} pictures have a caption"
        + (f", {alone} of them find no partner" if alone else ""),
    )
