"""Selects the images of a probe set and builds its rows.

Image files are decoded at selection, so that none is missing later and leaves its counterpart alone. Roles of rows:
``entailment``: does the caption describe the image (the global question of arXiv:2402.17304), with the true caption, a
random false one and a hard one. ``picture``: the image and a question, to probe for its objects (the local question of
arXiv:2402.17304). ``text``: the caption in place of the image and the same question; with ``picture`` a pair of equal
meaning (arXiv:2606.03871). ``text_last`` and ``picture_last``, where they are asked for: image and caption in one
prompt, in either order (arXiv:2606.03871).

Data flow: Scenes -> ``select_images`` -> ``SelectedImage`` -> ``entailment`` (false captions), ``objects`` (classes)
-> ``build_probe_rows`` -> ``ProbeSet``.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_mm.core.decisions import log_decision
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
    """An image of a probe set.

    Args:
        scene: Its annotations.
        size: Width and height in pixels; as stored, where its objects have boxes.
    """

    scene: Scene
    size: tuple[int, int]


def select_images(
    scenes: Iterable[Scene], max_pictures: int, load: Callable[[Path], DecodedImage], seed: int
) -> tuple[list[SelectedImage], list[Rejection]]:
    """Random images for a probe set, those with more annotations first, groups as a whole.

    Args:
        scenes: Candidates.
        max_pictures: Largest number of images. Of a larger group, some are drawn.
        load: Decodes an image file; raises ``BadImage`` where it cannot be used.
        seed: Random seed of the selection.

    Returns:
        The selected images in the order of their ids, and rejections of those that were tried.
    """
    chosen: list[SelectedImage] = []
    rejections: list[Rejection] = []
    boxes: list[tuple[Box, tuple[int, int]]] = []
    for unit in _subsample_large_groups(_sampling_units(scenes, seed), max_pictures, seed):
        if len(chosen) == max_pictures:
            break
        if len(chosen) + len(unit) <= max_pictures:
            selected, faults = _load_unit(unit, load, boxes)
            chosen += selected
            rejections += faults
    check_box_format(boxes)
    return sorted(chosen, key=lambda selected: selected.scene.id), rejections


def _sampling_units(scenes: Iterable[Scene], seed: int) -> list[list[Scene]]:
    """Groups, and scenes without a group, shuffled; those with more annotations first."""
    by_family: dict[tuple[bool, str], list[Scene]] = {}
    for scene in sorted(scenes, key=lambda scene: scene.id):
        by_family.setdefault((not scene.group, scene.family), []).append(scene)
    units = list(by_family.values())
    random.Random(f"{seed}:pictures").shuffle(units)
    return sorted(units, key=_negative_richness)


def _subsample_large_groups(units: list[list[Scene]], max_pictures: int, seed: int) -> list[list[Scene]]:
    """The units; a group larger than ``max_pictures`` is reduced to an even share."""
    share = max(2, max_pictures // max(1, len(units)))
    too_large = [unit for unit in units if len(unit) > max_pictures]
    if too_large:
        log_decision(
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
    """The scenes of a unit whose files can be used; none of an incomplete group with false captions of its own.

    All boxes and the sizes of their images are added to ``boxes``.
    """
    selected: list[SelectedImage] = []
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
        selected.append(SelectedImage(scene, size))
        rejections += cut
    if len(selected) < len(unit) and any(scene.false_captions for scene in unit):
        rejections += [incomplete_group(each.scene) for each in selected]
        selected = []
    return selected, rejections


def incomplete_group(scene: Scene) -> Rejection:
    """Rejection of a row whose group lost another row: the balance of true and false captions is broken."""
    return Rejection(scene.origin, f"group not whole: another row of group {scene.group!r} cannot be used", "probe")


def _without_boxes(scene: Scene) -> tuple[Scene, list[Rejection]]:
    """The scene without boxes: they refer to the stored image, which EXIF rotates."""
    if not any(each.box for each in scene.objects or ()):
        return scene, []
    bare = replace(scene, objects=tuple(replace(each, box=None) for each in scene.objects or ()))
    return bare, [Rejection(scene.origin, "boxes not used: EXIF turns the picture", "cut")]


ENTAILMENT_PROMPT = 'This image describes "{caption}". Is it right? Answer:'
"""Attributed to arXiv:2402.17304 second-hand; neither its full text nor its code could be read: not verified."""
PICTURE_QUESTION = "Which things are in this picture?"
TRUTH = ("false", "true")
_CAPTION_FIELD = "{caption}"


@dataclass(frozen=True)
class SampledProbeSet:
    """A probe set, and rejections of what could not be put into it."""

    probe_set: ProbeSet
    rejections: tuple[Rejection, ...]


def build_probe_rows(
    selected: Sequence[SelectedImage],
    *,
    source: str,
    prompt: str = ENTAILMENT_PROMPT,
    seed: int = 0,
    both_last: bool = False,
) -> SampledProbeSet:
    """The probe set with every row that can be built from the selected images.

    Args:
        selected: The images.
        source: File that they are from, for the record.
        prompt: Prompt of entailment rows, with ``{caption}`` where the caption goes.
        seed: Random seed of the pairing.
        both_last: Whether to add rows of roles ``text_last`` and ``picture_last``.

    Raises:
        UserError: The prompt has no place for a caption, or no row can be built.
    """
    _check_prompt(prompt)
    scenes = [each.scene for each in selected]
    false_captions = make_false_captions([scene for scene in scenes if scene.captions], seed)
    _log_false_captions(scenes, false_captions)
    object_probes = ObjectProbes.of(scenes, [each.size for each in selected])
    rows: list[ProbeRow] = []
    rejections: list[Rejection] = []
    drafts = [
        made for each in selected for made in _rows(each, false_captions.get(each.scene.id), object_probes, prompt)
    ]
    drafts += [made for each in selected if both_last for made in _both_last(each.scene)]
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
    named = {**dict.fromkeys(("entailment/random", "entailment/hard"), TRUTH), **object_probes.names}
    classes = {probe: names for probe, names in named.items() if probe in probes}
    return SampledProbeSet(ProbeSet(tuple(rows), classes, seed, source), tuple(rejections))


@dataclass(frozen=True)
class _RowDraft:
    """A row before it is known that its span occurs once in its text."""

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
    selected: SelectedImage, false_captions: FalseCaptions | None, probes: ObjectProbes, prompt: str
) -> Iterator[_RowDraft]:
    scene = selected.scene
    if false_captions:
        yield from _entailment(scene, false_captions, prompt)
    labels, boxes = probes.labels(scene, selected.size)
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


def _both_last(scene: Scene) -> Iterator[_RowDraft]:
    """Rows with image and caption in one prompt, each once as the last of the two (arXiv:2606.03871)."""
    if scene.captions:
        orders: tuple[tuple[Role, str], ...] = (
            ("text_last", f"{IMAGE_MARK}\n{scene.caption}"),
            ("picture_last", f"{scene.caption}\n{IMAGE_MARK}"),
        )
        for role, text in orders:
            yield _RowDraft(
                f"{scene.id}:{role}", scene.family, role, text, scene.caption, scene.image, {}, scene.origin
            )


def _entailment(scene: Scene, false_captions: FalseCaptions, prompt: str) -> Iterator[_RowDraft]:
    """Rows of both entailment probes; the true caption is shared, since each probe has as many false ones."""
    said: dict[str, tuple[str, Mapping[str, Label]]] = {
        "true": (scene.caption, {"entailment/random": 1, "entailment/hard": 1}),
        "hard": (false_captions.hard, {"entailment/hard": 0}),
    }
    if false_captions.random is None:
        said["true"] = (scene.caption, {"entailment/hard": 1})
    else:
        said["random"] = (false_captions.random, {"entailment/random": 0})
    head = "" if IMAGE_MARK in prompt else f"{IMAGE_MARK}\n"
    for name, (caption, labels) in said.items():
        text = head + prompt.replace(_CAPTION_FIELD, caption)
        yield _RowDraft(
            f"{scene.id}:{name}", false_captions.group, "entailment", text, caption, scene.image, labels, scene.origin
        )


def _check_prompt(prompt: str) -> None:
    if prompt.count(_CAPTION_FIELD) != 1 or prompt.count(IMAGE_MARK) > 1:
        raise UserError(
            f"data.probe_prompt cannot be used: {prompt!r}.",
            f"It asks whether a caption is right: it holds {_CAPTION_FIELD} once, and {IMAGE_MARK} once or not at all.",
            f"Write it like {ENTAILMENT_PROMPT!r}.",
        )


def _check_any(source: str, rows: Sequence[ProbeRow], probes: set[str]) -> None:
    if probes or any(row.role == "text" for row in rows):
        return
    raise UserError(
        f"Nothing can be probed with {source}.",
        "It takes two pictures with different captions, or two kinds of things, each in 8 pictures or more.",
        "Give --data.probes FILE, or MMDataModule(probes=FILE), with rows such as "
        '{"image": "a.jpg", "caption": "a cat", "objects": [{"name": "cat", "box": [0, 0, 9, 9]}]}.',
    )


def _log_false_captions(scenes: Sequence[Scene], false_captions: Mapping[str, FalseCaptions]) -> None:
    captioned = sum(bool(scene.captions) for scene in scenes)
    kinds = Counter(each.kind for each in false_captions.values())
    names: dict[Kind, str] = {
        "given": "given by their rows",
        "traded": "one noun traded",
        "nearest": "the nearest other",
    }
    counts = ", ".join(f"{kinds[kind]} {name}" for kind, name in names.items() if kinds[kind])
    alone = captioned - len(false_captions)
    log_decision(
        "data.probes.entailment",
        f"hard wrong captions: {counts or 'none'}",
        f"{captioned} of {len(scenes)} pictures have a caption"
        + (f", {alone} of them find no partner" if alone else ""),
    )
