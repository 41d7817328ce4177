"""A probe set, drawn once: which pictures, and every row that is asked about them.

Data flow: ``choosing`` (pictures) -> ``entailment`` (wrong captions), ``objects`` (classes) -> rows -> ``ProbeSet``.

Three roles of rows. ``entailment``: does the caption belong to the picture (2402.17304's global question)? With the
true caption, a random wrong one and a hard one. ``picture``: the picture and a question, for what things it shows
(2402.17304's local question). ``text``: the caption in the picture's place and the same question; with ``picture`` it
is a pair of equal meaning (2606.03871).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_mm.data.probe_rows import Label, ObjectBox, ProbeRow, Role
from lightning_mm.data.probe_sets import ProbeSet
from lightning_mm.data.probing.choosing import Shown
from lightning_mm.data.probing.entailment import Kind, Wrong, wrong_captions
from lightning_mm.data.probing.objects import Questions
from lightning_mm.data.probing.scenes import Scene
from lightning_mm.data.sample import IMAGE_MARK, Rejection, Sample, Turn
from lightning_mm.decisions import decide
from lightning_mm.errors import UserError

ENTAILMENT_PROMPT = 'This image describes "{caption}". Is it right? Answer:'
"""As in 2402.17304."""
PICTURE_QUESTION = "Which things are in this picture?"
TRUTH = ("false", "true")
_PLACE = "{caption}"


@dataclass(frozen=True)
class Drawn:
    """A probe set, and what could not be put into it."""

    probe_set: ProbeSet
    rejections: tuple[Rejection, ...]


def draw(shown: Sequence[Shown], *, source: str, prompt: str = ENTAILMENT_PROMPT, seed: int = 0) -> Drawn:
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
    wrong = wrong_captions([scene for scene in scenes if scene.captions], seed)
    _say_kinds(scenes, wrong)
    questions = Questions.of(scenes, [each.size for each in shown])
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
    return Drawn(ProbeSet(tuple(rows), classes, seed, source), tuple(rejections))


@dataclass(frozen=True)
class _Draft:
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


def _rows(shown: Shown, wrong: Wrong | None, questions: Questions, prompt: str) -> Iterator[_Draft]:
    scene = shown.scene
    if wrong:
        yield from _entailment(scene, wrong, prompt)
    labels, boxes = questions.labels(scene, shown.size)
    if labels or scene.captions:
        text = f"{IMAGE_MARK}\n{PICTURE_QUESTION}"
        yield _Draft(
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
        yield _Draft(f"{scene.id}:text", scene.family, "text", text, scene.caption, None, {}, scene.origin)


def _entailment(scene: Scene, wrong: Wrong, prompt: str) -> Iterator[_Draft]:
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
        text = head + prompt.replace(_PLACE, caption)
        yield _Draft(f"{scene.id}:{name}", wrong.group, "entailment", text, caption, scene.image, labels, scene.origin)


def _check_prompt(prompt: str) -> None:
    if prompt.count(_PLACE) != 1 or prompt.count(IMAGE_MARK) > 1:
        raise UserError(
            f"data.probe_prompt cannot be used: {prompt!r}.",
            f"It asks whether a caption is right, so it holds {_PLACE} once, and {IMAGE_MARK} once or not at all.",
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


def _say_kinds(scenes: Sequence[Scene], wrong: Mapping[str, Wrong]) -> None:
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
