"""What a model is asked when one looks inside it: a fixed set of rows with known answers, and batches of them.

Data flow: ``probing`` draws a ProbeSet from pictures with captions and objects -> ``probe_collator`` makes ProbeBatches
-> ``taps`` reads hidden states at their sites -> ``probes`` and ``geometry``. The set is saved beside what was measured
on it, with its hash.

Shapes: B rows, L tokens after padding, S sites: the most that a row of the batch has.
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
from lightning_mm.data.probe_sets.files import Label, ObjectBox, ProbeRow, Role, read_probe_set, write_probe_set
from lightning_mm.data.sample import Rejection

__all__ = ["Label", "ObjectBox", "ProbeBatch", "ProbeRow", "ProbeSet", "Role"]


@dataclass(frozen=True)
class ProbeSet:
    """A held-out set of probe rows.

    Args:
        rows: Each picture's rows together.
        classes: Probe -> names of its classes, in the order of the labels.
        seed: That it was drawn with.
        source: What it was drawn from.
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
        """Each picture once, sorted."""
        return tuple(sorted({path for row in self.rows for path in row.sample.images}))

    @cached_property
    def hash(self) -> str:
        """SHA-256 over ids, texts, labels, boxes, classes and the pictures' bytes, whatever the order of the rows."""
        digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.images}
        rows = sorted(_digest([row.to_dict(), [digests[path] for path in row.sample.images]]) for row in self.rows)
        return _digest([rows, {probe: list(names) for probe, names in self.classes.items()}])

    def subset(self, max_pictures: int) -> "ProbeSet":
        """At most so many pictures, drawn by the set's seed; pictures that share a group stay together.

        Raises:
            UserError: Every group has more pictures.
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
        """The entailment rows with grey pictures: what a probe reads off the captions alone. Ids stay."""
        rows = (replace(row, blank=True) for row in self.rows if row.role == "entailment")
        return replace(self, rows=tuple(rows))

    def summary(self) -> dict[str, Any]:
        """What probes.json of a run says: the hash, and how many rows and pictures each probe has."""
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
        """Write it as JSON; pictures are named, not copied."""
        write_probe_set(path, self.rows, self.classes, seed=self.seed, source=self.source, hash=self.hash)

    @classmethod
    def load(cls, path: Path) -> "ProbeSet":
        """Read what ``save`` wrote.

        Raises:
            UserError: It is no probe set, or its rows or pictures are not what they were.
        """
        told = read_probe_set(path)
        probe_set = cls(told.rows, told.classes, told.seed, told.source)
        if probe_set.hash != told.hash:
            raise UserError(
                f"{path} is not the probe set that was saved.",
                f"Its hash was {told.hash[:12]} and is {probe_set.hash[:12]}: a row or a picture has been changed.",
                "Put the pictures back as they were, or draw the set anew from its source.",
            )
        return probe_set


@dataclass(frozen=True)
class ProbeBatch:
    """Probe rows as the model takes them, and where in them to read.

    Args:
        inputs: What the model's forward takes; ``input_ids`` (B, L), right-padded, ending with the generation prompt.
        weights: (B, S, L) float32: weights[b, s] are how much each token counts in site s of row b, summing to 1;
            zero where row b has fewer sites.
        sites: The sites that each row has, in the order of S: ``last``, ``image``, ``text``, ``token``, ``object:0``...
        rows: One per row of the tensors.
        rejected: Rows that fell out, and rows that lack a site.
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


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _connected_groups(rows: Sequence[ProbeRow]) -> list[list[ProbeRow]]:
    """Rows that hang together by a group or a picture."""
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
