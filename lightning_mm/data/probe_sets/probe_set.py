"""A probe set: fixed rows with known labels, and batches of them.

A set is saved beside the measurements made with it, and identified by its hash.

Data flow: ``probe_sets.build`` -> ``ProbeSet`` -> ``probe_sets.collator`` -> ``ProbeBatch`` ->
``analysis.hidden_states`` -> ``probes``, ``geometry``.

Shapes: B rows, L tokens after padding, S sites: the largest number of a row in the batch.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mm.core.errors import UserError
from lightning_mm.data.image_source import image_file
from lightning_mm.data.probe_sets.files import Label, ObjectBox, ProbeRow, Role, read_probe_set, write_probe_set
from lightning_mm.data.sample import Rejection

__all__ = ["Label", "ObjectBox", "ProbeBatch", "ProbeRow", "ProbeSet", "Role"]


@dataclass(frozen=True)
class ProbeSet:
    """A held-out set of probe rows.

    Args:
        rows: Rows, those of one image together.
        classes: Probe -> names of its classes, in the order of the labels.
        seed: Random seed of the draw.
        source: File that it was drawn from.
    """

    rows: tuple[ProbeRow, ...]
    classes: Mapping[str, tuple[str, ...]]
    seed: int
    source: str

    def __post_init__(self) -> None:
        assert len({row.id for row in self.rows}) == len(self.rows), "ids are unique"

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def images(self) -> tuple[Path, ...]:
        """Every image once, sorted."""
        return tuple(sorted({image_file(image) for row in self.rows for image in row.sample.images}))

    @cached_property
    def hash(self) -> str:
        """SHA-256 over ids, texts, labels, boxes, classes and image bytes, independent of the order of the rows."""
        digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.images}
        rows = sorted(
            _digest([row.to_dict(), [digests[image_file(image)] for image in row.sample.images]]) for row in self.rows
        )
        return _digest([rows, {probe: list(names) for probe, names in self.classes.items()}])

    def subset(self, max_pictures: int) -> "ProbeSet":
        """A random part with at most ``max_pictures`` images, drawn with the set's seed; groups stay together.

        Args:
            max_pictures: Largest number of images.

        Raises:
            UserError: Every group has more images.
        """
        if len(self.images) <= max_pictures:
            return self
        families = sorted(_connected_groups(self.rows), key=lambda family: min(row.id for row in family))
        random.Random(f"{self.seed}:subset").shuffle(families)
        sizes = [len({path for row in family for path in row.sample.images}) for family in families]
        kept: set[str] = set()
        taken = 0
        for family, pictures in zip(families, sizes, strict=True):
            if taken + pictures <= max_pictures:
                kept |= {row.id for row in family}
                taken += pictures
        if not kept:
            raise UserError(
                f"No part of the probe set fits into {max_pictures} pictures.",
                f"Pictures that trade captions stay together, and they are {min(sizes)} or more.",
                f"Give --data.probe_images {min(sizes)}, or draw a set of so many from its source.",
            )
        return replace(self, rows=tuple(row for row in self.rows if row.id in kept))

    def without_pictures(self) -> "ProbeSet":
        """The entailment rows with gray images: the baseline that reads captions only. Ids are kept."""
        rows = (replace(row, blank=True) for row in self.rows if row.role == "entailment")
        return replace(self, rows=tuple(rows))

    def summary(self) -> dict[str, Any]:
        """Content of probes.json of a run: the hash, and numbers of rows and images of each probe."""
        tasks = {probe: [row for row in self.rows if probe in row.labels] for probe in self.classes}
        tasks["pairs"] = [row for row in self.rows if row.role == "text"]
        subjects = {row.subject for row in tasks["pairs"]}
        tasks["pairs"] += [row for row in self.rows if row.role == "picture" and row.subject in subjects]
        return {
            "hash": self.hash,
            "seed": self.seed,
            "source": self.source,
            "rows": len(self.rows),
            "images": len(self.images),
            "tasks": {
                task: {"rows": len(rows), "images": len({path for row in rows for path in row.sample.images})}
                for task, rows in tasks.items()
                if rows
            },
        }

    def save(self, path: Path) -> None:
        """Write the set to a JSON file that names the images."""
        write_probe_set(path, self.rows, self.classes, seed=self.seed, source=self.source, hash=self.hash)

    @classmethod
    def load(cls, path: Path) -> "ProbeSet":
        """The set that ``save`` wrote.

        Args:
            path: The file.

        Raises:
            UserError: It is not a probe set, or its rows or images have changed.
        """
        saved = read_probe_set(path)
        probe_set = cls(saved.rows, saved.classes, saved.seed, saved.source)
        if probe_set.hash != saved.hash:
            raise UserError(
                f"{path} is not the probe set that was saved.",
                f"Its hash was {saved.hash[:12]} and is {probe_set.hash[:12]}: a row or a picture has been changed.",
                "Put the pictures back as they were, or draw the set anew from its source.",
            )
        return probe_set


@dataclass(frozen=True)
class ProbeBatch:
    """Probe rows as model inputs, and the tokens of their sites.

    Args:
        inputs: Arguments of the model's forward; ``input_ids`` (B, L), right-padded, ending with the generation prompt.
        weights: (B, S, L) float32: weight of each token in site s of row b, summing to 1 over L; zeros where row b has
            fewer sites.
        sites: Names of each row's sites, in the order of S: ``last``, ``image``, ``text``, ``token``, ``object:0``, ...
        rows: The B rows.
        rejected: Rows that were dropped, and rows that lack a site.
    """

    inputs: dict[str, Tensor]
    weights: Tensor
    sites: tuple[tuple[str, ...], ...]
    rows: tuple[ProbeRow, ...]
    rejected: tuple[Rejection, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ProbeBatch":
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ProbeBatch":
        return self._map(lambda t: t.pin_memory())

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "ProbeBatch":
        return replace(self, inputs={k: fn(v) for k, v in self.inputs.items()}, weights=fn(self.weights))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _connected_groups(rows: Sequence[ProbeRow]) -> list[list[ProbeRow]]:
    """Connected components of rows that share a group or an image."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            key = parents[key]
        return key

    for row in rows:
        for path in row.sample.images:
            parents[root(f"picture {path}")] = root(f"group {row.group}")
    families: dict[str, list[ProbeRow]] = {}
    for row in rows:
        families.setdefault(root(f"group {row.group}"), []).append(row)
    return list(families.values())
