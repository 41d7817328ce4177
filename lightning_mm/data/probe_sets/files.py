"""Rows of a probe set, and the JSON file that a probe set is saved to.

Images are named relative to ``image_root``, the folder that contains all of them, and may not leave it. The file
contains the hash of the set.

Data flow: ``probe_sets.build`` -> ``ProbeRow`` -> ``probe_sets.collator``; ``ProbeSet.save`` -> ``write_probe_set``;
``read_probe_set`` -> ``ProbeSetFile`` -> ``ProbeSet.load``, which checks the hash.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_atomically
from lightning_mm.data.image_source import image_file
from lightning_mm.data.sample import Sample, Turn

Role = Literal["entailment", "picture", "text", "picture_last", "text_last"]
Label = int | tuple[int, ...]


@dataclass(frozen=True)
class ObjectBox:
    """An object and its box: x0, y0, x1, y1 in pixels of the image as stored, x1 and y1 exclusive."""

    name: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class ProbeRow:
    """One question about an image or a caption; it is never answered, only hidden states are read.

    Args:
        id: ``image:question``, unique within the set, and the same whenever it is drawn from the same data.
        group: Rows of one group must not be divided by splits and intervals: the image, or the group given by its file;
            for entailment rows all images that exchange captions, since a caption that is true in one row is false in
            another.
        role: ``entailment`` (image and caption: do they agree?), ``picture`` (image and question), ``text`` (its
            caption in place of the image, and the same question), ``text_last`` (image, then caption) or
            ``picture_last`` (caption, then image).
        sample: One user turn; without an image for role ``text``.
        span: Part of the turn that is site ``text``: the caption, or the question of a ``picture`` row.
        labels: Probe -> index into its classes; for ``objects`` one 0 or 1 per class; for ``object_at_patches`` one
            index per box.
        boxes: Objects of the sites ``object:0``, ``object:1``, ...
        blank: Whether the image is replaced by a gray one of its size.
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
        """Text of the user's turn."""
        return self.sample.turns[0].text

    @property
    def subject(self) -> str:
        """Id of the image that the row is about, by image or by caption.

        Example:
            >>> from lightning_mm.data.sample import Turn
            >>> sample = Sample("7:text", (Turn("user", "A cat. What is it?"),))
            >>> ProbeRow("7:text", "clip 3", "text", sample, "A cat.", {}).subject
            '7'
        """
        return self.id.rpartition(":")[0] or self.id

    def to_dict(self) -> dict[str, Any]:
        """The row without its image, in JSON types."""
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
"""Value of ``format``, the first key of each file."""


@dataclass(frozen=True)
class ProbeSetFile:
    """Content of a saved probe set; arguments as in ``ProbeSet``.

    Args:
        rows: The rows.
        classes: Probe -> names of its classes.
        seed: Random seed of the draw.
        source: File that it was drawn from.
        hash: Hash of the set when it was saved.
    """

    rows: tuple[ProbeRow, ...]
    classes: Mapping[str, tuple[str, ...]]
    seed: int
    source: str
    hash: str


def write_probe_set(
    path: Path, rows: Sequence[ProbeRow], classes: Mapping[str, Sequence[str]], *, seed: int, source: str, hash: str
) -> None:
    """Write a set to a file, which is replaced at once, so that it is never incomplete.

    Args:
        path: File to write.
        rows: The rows.
        classes: Probe -> names of its classes.
        seed: Random seed of the draw.
        source: File that it was drawn from.
        hash: Hash of the set.
    """
    folders = {image_file(image).parent for row in rows for image in row.sample.images}
    root = Path(os.path.commonpath(folders)) if folders else Path()
    content = {
        "format": FORMAT,
        "hash": hash,
        "seed": seed,
        "source": source,
        "image_root": str(root),
        "classes": {probe: list(names) for probe, names in classes.items()},
        "rows": [
            {**row.to_dict(), "images": [str(image_file(i).relative_to(root)) for i in row.sample.images]}
            for row in rows
        ],
    }
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def is_probe_set(head: str) -> bool:
    """Whether a file with this beginning was written by ``write_probe_set``."""
    return FORMAT in head[:200]


def read_probe_set(path: Path) -> ProbeSetFile:
    """The content of a saved set; the caller compares the hash.

    Args:
        path: A file that ``write_probe_set`` wrote.

    Raises:
        UserError: There is no such file, or it has another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        root = Path(content["image_root"]).resolve()
        rows = tuple(_row(row, root, f"{path.name}[{number}]") for number, row in enumerate(content["rows"]))
        classes = {str(probe): tuple(map(str, names)) for probe, names in content["classes"].items()}
        return ProbeSetFile(rows, classes, int(content["seed"]), str(content["source"]), str(content["hash"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{path} cannot be read as a probe set.",
            f"{type(error).__name__}: {error}.",
            "Name a file that a run or an inspection has saved (probe_set.json), or draw the set anew.",
        ) from error


def _row(row: Mapping[str, Any], root: Path, origin: str) -> ProbeRow:
    images = tuple((root / name).resolve() for name in row["images"])
    for image in images:
        if not image.is_relative_to(root) or not image.is_file():
            raise ValueError(f"{origin}: no picture {image} in {root}")
    if row["role"] not in get_args(Role):
        raise ValueError(f"{origin}: there is no role {row['role']!r}")
    boxes = tuple(ObjectBox(str(each["name"]), _box(each["box"])) for each in row["boxes"])
    return ProbeRow(
        id=str(row["id"]),
        group=str(row["group"]),
        role=row["role"],
        sample=Sample(str(row["id"]), (Turn("user", str(row["text"])),), images, origin),
        span=str(row["span"]),
        labels={str(probe): _label(label) for probe, label in row["labels"].items()},
        boxes=boxes,
        blank=bool(row["blank"]),
    )


def _box(edges: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = map(float, edges)
    return left, top, right, bottom


def _label(label: int | Sequence[int]) -> Label:
    return tuple(map(int, label)) if isinstance(label, list) else int(label)  # type: ignore[arg-type]
