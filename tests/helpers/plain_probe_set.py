"""Annotated pictures of noise to probe with, and every vector that is read of them, found by transformers alone.

Pictures differ in size, captions in length and from their first letter on, some pictures share a group, and three rows
show two pictures: rows of a batch are padded, and a picture's place in the batch is not the row's.

Data flow: ``write_scenes`` -> JSON -> the package's ``ProbeSet`` (with ``two_pictures``) -> ``PlainVectors``: position
and row -> (T, D), and the labels as the JSON tells them.

Shapes: T slices (embeddings and the output of each block), N vectors, D hidden size.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from string import ascii_letters
from typing import Any

import numpy as np
from PIL import Image

from lightning_mm.data.probe_sets.build import open_probe_set
from lightning_mm.data.probe_sets.probe_set import ProbeRow, ProbeSet
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.sample import Turn
from tests.helpers.plain_states import PlainModel, PlainRow, opened

COLORS = ("blue", "green", "red")
TWO = "<image><image>\nWhat is here?"
Overlap = Callable[[tuple[int, int], Sequence[float], int], Any]
"""Size of a picture, a box in it, number of its tokens -> (P,) weights of the tokens."""


def write_scenes(folder: Path, count: int = 48, grouped: int = 16) -> Path:
    """Write pictures of one or two squares on noise, and what is true of them.

    Args:
        folder: Where to.
        count: Number of pictures.
        grouped: So many of them share a group with the one before or after.
    """
    rows, draw = [], np.random.default_rng(0)
    for number in range(count):
        width, height = 40 + 8 * (number % 3), 40 + 4 * (number % 2)
        pixels = draw.integers(0, 255, (height, width, 3), dtype=np.uint8)
        names = [COLORS[number % 3], COLORS[(number // 3) % 3]][: 1 + number % 2]
        objects = []
        for name, left in zip(dict.fromkeys(names), (width - 14 if number % 4 > 1 else 2, 12), strict=False):
            box = [left, 3 + number % 5, left + 9 + number % 4, 15 + number % 7]
            pixels[box[1] : box[3], box[0] : box[2]] = 255 * (np.arange(3) == COLORS.index(name))
            objects.append({"name": name, "box": box})
        Image.fromarray(pixels).save(folder / f"{number}.png")
        padded = " and small" * (number % 4)
        caption = f"{ascii_letters[number]}: a {' and a '.join(o['name'] for o in objects)} thing{padded}"
        row = {"id": f"s{number:02d}", "image": f"{number}.png", "caption": caption, "objects": objects}
        row["false_captions"] = [f"{ascii_letters[number]}: a grey thing{padded}"]
        rows.append(row | ({"group": f"clip {number // 2}"} if number < grouped else {}))
    file = folder / "scenes.json"
    file.write_text(json.dumps(rows))
    return file


def two_pictures(file: Path, shown: Sequence[str] = ("s05", "s20", "s33")) -> ProbeSet:
    """The probe set of a file, in which some picture rows show another picture too, and are shorter than the others."""
    made = open_probe_set(file, None, RejectedSamples(), max_pictures=99, both_last=True)
    images = {row.id: row.sample.images for row in made.rows}

    def changed(row: ProbeRow) -> ProbeRow:
        if row.role != "picture" or row.subject not in shown:
            return row
        both = (*row.sample.images, *images["s01:picture"])
        sample = replace(row.sample, turns=(Turn("user", TWO),), images=both)
        labels = {name: label for name, label in row.labels.items() if name != "object_at_patches"}
        return replace(row, sample=sample, span="What is here?", labels=labels, boxes=())

    return replace(made, rows=tuple(changed(row) for row in made.rows))


def overlap_of_cropped(size: tuple[int, int], box: Sequence[float], tokens: int, side: int = 28) -> Any:
    """Weights of a square grid that shows the middle of a picture: resized by its shorter side, then cropped (CLIP)."""
    resized = [int(edge * side / min(size)) for edge in size]
    first = [(edge - side) // 2 for edge in resized]
    window = [at * own / new for at, own, new in zip(first, size, resized, strict=True)]
    window += [(at + side) * own / new for at, own, new in zip(first, size, resized, strict=True)]
    return _overlaps(box, window, round(tokens**0.5), round(tokens**0.5))


def overlap_of_resized(size: tuple[int, int], box: Sequence[float], tokens: int, cell: int = 14) -> Any:
    """Weights of a grid that shows a whole picture, each side rounded to whole cells (Qwen2-VL)."""
    columns, rows = (round(edge / cell) for edge in size)
    assert columns * rows == tokens
    return _overlaps(box, (0, 0, *size), rows, columns)


def _overlaps(box: Sequence[float], window: Sequence[float], rows: int, columns: int) -> Any:
    def along(axis: int, count: int) -> Any:
        edges = np.linspace(window[axis], window[axis + 2], count + 1)
        inside = np.minimum(edges[1:], box[axis + 2]) - np.maximum(edges[:-1], box[axis])
        return np.maximum(inside, 0)

    return np.outer(along(1, rows), along(0, columns)).ravel()


@dataclass(frozen=True, eq=False)
class PlainVectors:
    """The vectors of a probe set under one model, each row read alone.

    Args:
        model: The model.
        scenes: The file that the set was drawn from.
        rows: Of the set.
        overlap: Which tokens of a picture a box covers.
    """

    model: PlainModel
    scenes: Path
    rows: Sequence[ProbeRow]
    overlap: Overlap

    @cached_property
    def told(self) -> dict[str, dict[str, Any]]:
        """What the file tells of each picture."""
        return {scene["id"]: scene for scene in json.loads(self.scenes.read_text())}

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Group -> its number in the order of names."""
        return {name: number for number, name in enumerate(sorted({row.group for row in self.rows}))}

    @cached_property
    def read(self) -> dict[str, PlainRow]:
        """Row id -> its states."""
        return {row.id: self.model.read(row.text, row.sample.images) for row in self.rows}

    @cached_property
    def read_blank(self) -> dict[str, PlainRow]:
        """Entailment row id -> its states with a gray picture of the same size."""
        gray = {}
        for row in self.of_role("entailment"):
            (file,) = row.sample.images
            picture = Image.new("RGB", opened(file).size, (127, 127, 127))
            gray[row.id] = self.model.read(row.text, [picture])
        return gray

    def of_role(self, role: str) -> list[ProbeRow]:
        return [row for row in self.rows if row.role == role]

    def groups(self, rows: Sequence[ProbeRow]) -> Any:
        return np.array([self.numbers[row.group] for row in rows])

    def stacked(self, rows: Sequence[ProbeRow], site: str, blank: bool = False) -> Any:
        """(T, N, D) vectors of rows at a site: last, image, text or token."""
        read = self.read_blank if blank else self.read
        return np.stack([self._at(row, read[row.id], site) for row in rows], 1)

    def _at(self, row: ProbeRow, states: PlainRow, site: str) -> Any:
        if site == "last":
            return states.hidden[:, -1]
        text = states.span(row.span)
        pictured = states.image and row.role != "text_last"
        drawn = states.drawn(states.image if pictured else text, row.id)
        return states.mean({"image": states.image, "text": text, "token": [drawn]}[site])

    def pairs(self, one: str, other: str) -> tuple[Any, Any, Any]:
        """Both sides (T, N, D) of pictures and their captions by ``role/site``, and their groups (N,)."""
        sides = []
        for role, _, site in (each.partition("/") for each in (one, other)):
            rows = sorted(self.of_role(role), key=lambda row: row.subject)
            sides.append((rows, self.stacked(rows, site)))
        (rows, a), (matching, b) = sides
        assert [row.subject for row in rows] == [row.subject for row in matching]
        return a, b, self.groups(rows)

    def entailment(self, kind: str) -> tuple[list[ProbeRow], Any]:
        """The rows of a probe (random or hard) and whether their captions are true, as the file tells.

        A picture that no other caption is surely false of has no random one, and its true one does not count there.
        """
        rows, truth = [], []
        asked = {row.subject for row in self.of_role("entailment") if row.id.endswith(f":{kind}")}
        for row in self.of_role("entailment"):
            scene = self.told[row.subject]
            is_hard, is_true = row.span in scene["false_captions"], row.span == scene["caption"]
            if row.subject in asked and (is_true or is_hard == (kind == "hard")):
                rows.append(row)
                truth.append(int(is_true))
        return rows, np.array(truth)

    def objects(self) -> Iterator[tuple[ProbeRow, dict[str, Any], Any]]:
        """Row, object and (T, D) mean over its patches, largest objects first, where any patch is seen."""
        for row in self.of_role("picture"):
            if len(row.sample.images) > 1:
                continue
            size, states = opened(row.sample.images[0]).size, self.read[row.id]

            def area(thing: dict[str, Any]) -> float:
                left, top, right, bottom = thing["box"]
                return float((right - left) * (bottom - top))

            for thing in sorted(self.told[row.subject]["objects"], key=area, reverse=True):
                weights = self.overlap(size, thing["box"], len(states.image))
                if weights.any():
                    yield row, thing, states.mean(states.image, weights)
