"""A probe set as a file: JSON that names its pictures and carries its hash.

Data flow: ``ProbeSet.save`` -> ``write``; ``read`` -> ``Told`` -> ``ProbeSet.load``, which checks the hash.

Pictures are named relative to ``image_root``, the folder that holds all of them, and may not leave it.

One row of a probe set: what is asked about one picture, or about its caption, and what is true of it.

Data flow: ``probing`` makes rows -> ``probe_sets`` holds them -> ``probe_collator`` turns them into tensors.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_atomically
from lightning_mm.data.sample import Sample, Turn

Role = Literal["entailment", "picture", "text"]
Label = int | tuple[int, ...]


@dataclass(frozen=True)
class ObjectBox:
    """A thing and where it is: x0, y0, x1, y1 in pixels of the picture as stored, the far edges exclusive."""

    name: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class ProbeRow:
    """One question, never answered: what counts is what the model holds of it.

    Args:
        id: ``picture:question``, unique within the set, and the same whenever it is drawn from the same data.
        group: What splits and intervals must not tear apart: the picture, or the group that its file puts it into; for
            entailment rows all that trade captions, since a caption that is true in one row is false in another: a
            probe that saw one of them would be wrong about the other.
        role: ``entailment`` (picture and caption: do they agree?), ``picture`` (picture and question) or ``text`` (its
            caption in place of the picture, and the same question).
        sample: One user turn; it has no picture for role ``text``.
        span: The part of the turn that is read as site ``text``: the caption, or the question of a picture row.
        labels: Probe -> index into its classes; for ``objects`` one 0 or 1 per class; for ``object_at_patches`` one
            index per box.
        boxes: The things that have sites ``object:0``, ``object:1``, ...
        blank: Whether the picture is withheld: a grey one of its size takes its place.
    """

    id: str
    group: str
    role: Role
    sample: Sample
    span: str
    labels: Mapping[str, Label]
    boxes: tuple[ObjectBox, ...] = ()
    blank: bool = False

    def __post_init__(self) -> None:
        assert self.text.count(self.span) == 1, f"the span {self.span!r} is to be found in {self.text!r}"

    @property
    def text(self) -> str:
        """The user's turn."""
        return self.sample.turns[0].text

    @property
    def subject(self) -> str:
        """The picture that it is about, whether it shows it or says its caption.

        Example:
            >>> from lightning_mm.data.sample import Turn
            >>> sample = Sample("7:text", (Turn("user", "A cat. What is it?"),))
            >>> ProbeRow("7:text", "clip 3", "text", sample, "A cat.", {}).subject
            '7'
        """
        return self.id.rpartition(":")[0] or self.id

    def told(self) -> dict[str, Any]:
        """All that the row says, but for its picture, in JSON's types."""
        labels = {probe: list(label) if isinstance(label, tuple) else label for probe, label in self.labels.items()}
        boxes = [{"name": each.name, "box": [float(edge) for edge in each.box]} for each in self.boxes]
        return {
            "id": self.id,
            "group": self.group,
            "role": self.role,
            "text": self.text,
            "span": self.span,
            "labels": labels,
            "boxes": boxes,
            "blank": self.blank,
        }


FORMAT = "lightning_mm probe set 1"
"""The first value of each such file."""


@dataclass(frozen=True)
class Told:
    """What a file says, as a ProbeSet has it."""

    rows: tuple[ProbeRow, ...]
    classes: Mapping[str, tuple[str, ...]]
    seed: int
    source: str
    hash: str


def write(
    path: Path, rows: Sequence[ProbeRow], classes: Mapping[str, Sequence[str]], *, seed: int, source: str, hash: str
) -> None:
    """Write a set; a reader never finds half of one."""
    folders = {image.parent for row in rows for image in row.sample.images}
    root = Path(os.path.commonpath(folders)) if folders else Path()
    told = {
        "format": FORMAT,
        "hash": hash,
        "seed": seed,
        "source": source,
        "image_root": str(root),
        "classes": {probe: list(names) for probe, names in classes.items()},
        "rows": [{**row.told(), "images": [str(i.relative_to(root)) for i in row.sample.images]} for row in rows],
    }
    write_atomically(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def is_probe_set(head: str) -> bool:
    """Whether a file that begins so was written by ``write``."""
    return FORMAT in head[:200]


def read(path: Path) -> Told:
    """Read a set that was saved; that it is the same is for the caller to check, by the hash.

    Raises:
        UserError: No such file, or not what ``write`` writes.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ValueError(f"its format is {told['format']!r}, not {FORMAT!r}")
        root = Path(told["image_root"]).resolve()
        rows = tuple(_row(row, root, f"{path.name}[{number}]") for number, row in enumerate(told["rows"]))
        classes = {str(probe): tuple(map(str, names)) for probe, names in told["classes"].items()}
        return Told(rows, classes, int(told["seed"]), str(told["source"]), str(told["hash"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{path} cannot be read as a probe set.",
            f"{type(error).__name__}: {error}.",
            "Name a file that a run or an inspection has saved (probe_set.json), or draw the set anew.",
        ) from error


def _row(told: Mapping[str, Any], root: Path, origin: str) -> ProbeRow:
    images = tuple((root / name).resolve() for name in told["images"])
    for image in images:
        if not image.is_relative_to(root) or not image.is_file():
            raise ValueError(f"{origin}: no picture {image} in {root}")
    if told["role"] not in get_args(Role):
        raise ValueError(f"{origin}: there is no role {told['role']!r}")
    boxes = tuple(ObjectBox(str(each["name"]), _box(each["box"])) for each in told["boxes"])
    return ProbeRow(
        id=str(told["id"]),
        group=str(told["group"]),
        role=told["role"],
        sample=Sample(str(told["id"]), (Turn("user", str(told["text"])),), images, origin),
        span=str(told["span"]),
        labels={str(probe): _label(label) for probe, label in told["labels"].items()},
        boxes=boxes,
        blank=bool(told["blank"]),
    )


def _box(edges: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = map(float, edges)
    return left, top, right, bottom


def _label(label: int | Sequence[int]) -> Label:
    return tuple(map(int, label)) if isinstance(label, list) else int(label)  # type: ignore[arg-type]
