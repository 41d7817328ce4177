"""What reasons to choose layers are computed from: a reading, or a part of its pictures, and pairs of equal meaning.

Data flow: ``Reading`` + ``ProbeSet`` -> ``Material`` -> ``Pair`` -> ``criteria``, ``entailment``, ``evidence``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mm.analysis.places import Keep, paired
from lightning_mm.data.probe_sets import ProbeSet
from lightning_mm.geometry.gram import Bank
from lightning_mm.geometry.neighbours import Neighbours
from lightning_mm.taps.reading import Reading

MEETING_PLACES = {"last": ("picture/last", "text/last"), "image~text": ("picture/image", "text/text")}


@dataclass(frozen=True, eq=False)
class Material:
    """What criteria are computed from; ``keep`` names the pictures of a resample."""

    reading: Reading
    probe_set: ProbeSet
    device: torch.device
    keep: Keep


@dataclass(frozen=True, eq=False)
class Pair:
    """Pictures and their captions at one site, sample by sample."""

    pictures: Bank
    captions: Bank
    groups: Tensor

    @classmethod
    def at(cls, material: Material, site: str) -> "Pair | None":
        """At ``last`` or ``image~text``; None where no picture was read with a caption."""
        pair = paired(material.reading, material.probe_set, *MEETING_PLACES[site], material.keep)
        if pair is None:
            return None
        one, other = (half.to(material.device) for half in pair)
        return cls(Bank.of(one.features), Bank.of(other.features), one.groups)

    @property
    def near(self) -> int:
        """How many neighbours: ten, or an eighth of the samples where there are few."""
        return max(1, min(10, self.pictures.num_samples // 8))

    @property
    def neighbours(self) -> tuple[Neighbours, Neighbours]:
        return Neighbours.of(self.pictures), Neighbours.of(self.captions)
