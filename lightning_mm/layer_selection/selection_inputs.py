"""What layer criteria and significance tests are computed from, and the measures of pictures with their captions.

Data flow: hidden states + ``ProbeSet`` -> ``SelectionInputs`` (all pictures, or a random part of them) ->
``ImageTextPair`` at one of two places -> kNN overlap and information imbalance of every slice.

Shapes: T slices of the hidden states (embeddings and blocks), N samples, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.analysis.select_rows import RowFilter, select_pairs
from lightning_mm.core.estimate import Estimate
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.geometry.information_imbalance import information_imbalance
from lightning_mm.geometry.knn_overlap import overlap
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.representations import Representations

PAIRED_PLACES = {"last": ("picture/last", "text/last"), "image~text": ("picture/image", "text/text")}
"""Where pictures are compared with captions: at the last token of both, or pooled over image and text tokens."""


@dataclass(frozen=True, eq=False)
class SelectionInputs:
    """What criteria are computed from.

    Args:
        reading: Hidden states of the untuned model.
        probe_set: Its rows.
        device: Where to compute.
        keep: Whether a row belongs to this resample.
    """

    reading: HiddenStates
    probe_set: ProbeSet
    device: torch.device
    keep: RowFilter


@dataclass(frozen=True, eq=False)
class ImageTextPair:
    """Pictures and their captions at one place, sample by sample.

    Args:
        pictures: (T, N, D) of the pictures.
        captions: (T, N, D) of their captions.
        groups: (N,) ids of pictures that depend on each other.
    """

    pictures: Representations
    captions: Representations
    groups: Tensor

    @classmethod
    def at(cls, inputs: SelectionInputs, place: str) -> "ImageTextPair | None":
        """The pair at a key of ``PAIRED_PLACES``; None where no picture has both."""
        pair = select_pairs(inputs.reading, inputs.probe_set, *PAIRED_PLACES[place], inputs.keep)
        if pair is None:
            return None
        pictures, captions = (half.to(inputs.device) for half in pair)
        return cls(Representations.of(pictures.features), Representations.of(captions.features), pictures.groups)

    @property
    def num_neighbors(self) -> int:
        """How many neighbors to compare: ten, or an eighth of the samples where there are few."""
        return max(1, min(10, self.pictures.num_samples // 8))

    @property
    def neighbors(self) -> tuple[Neighbors, Neighbors]:
        """Neighbors among pictures, and among captions."""
        return Neighbors.of(self.pictures), Neighbors.of(self.captions)


def knn_overlap_profile(inputs: SelectionInputs, place: str) -> list[Estimate]:
    """Mutual kNN overlap of pictures and captions in every slice; empty without pairs.

    After Palacios et al. 2026, arXiv:2606.03871.
    """
    pair = ImageTextPair.at(inputs, place)
    return [] if pair is None else overlap(*pair.neighbors, pair.num_neighbors, pair.groups)


def imbalance_profiles(inputs: SelectionInputs, place: str) -> tuple[list[Estimate], list[Estimate]]:
    """1 - information imbalance from pictures to captions, and back, in every slice; empty without pairs.

    0 is chance, 1 is equal neighbors.
    """
    pair = ImageTextPair.at(inputs, place)
    if pair is None:
        return [], []
    a, b, groups = pair.pictures, pair.captions, pair.groups
    forward, backward = information_imbalance(a, b, groups=groups), information_imbalance(b, a, groups=groups)
    return [_complement(e) for e in forward], [_complement(e) for e in backward]


def _complement(e: Estimate) -> Estimate:
    """1 - e, with its interval and its null turned around."""
    if e.value is None:
        return e
    turned = {"low": e.high, "high": e.low, "null": e.null, "null_low": e.null_high, "null_high": e.null_low}
    return Estimate.of(1 - e.value, e.n, **{name: None if x is None else 1 - x for name, x in turned.items()})
