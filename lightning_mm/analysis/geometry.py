"""Geometry of hidden states: the shape of each layer's representations, and how alike picture and caption are.

Sites of one position: ``picture`` and ``text`` (last prompt token, of a question about a picture or about its caption),
``image`` (mean of the image tokens). Site pairs: ``last`` (those two), ``image~text`` (mean of the image tokens against
mean of the caption tokens), ``token`` (one random token of each, each read alone), ``token_last`` (one random token of
each, both in one prompt, the one that is read last; Palacios et al. 2026, arXiv:2606.03871; where it is asked for).

Data flow: ``HiddenStates`` -> one centered Gram matrix per position -> every measure of ``lightning_mm.geometry`` ->
``Findings``.

Shapes: T slices (embeddings and blocks), N samples, D hidden size.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_mm.analysis.findings import Findings, LayerMatrix
from lightning_mm.analysis.hidden_states import SITES, HiddenStates
from lightning_mm.analysis.select_rows import SelectedRows, select_pairs, select_rows
from lightning_mm.core.errors import UserError
from lightning_mm.core.estimate import Estimate
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.geometry import (
    block_influence,
    cca,
    cka,
    divergence,
    intrinsic_dimension,
    isotropy,
    modality_gap,
    rsa,
)
from lightning_mm.geometry.distance_correlation import distance_correlation
from lightning_mm.geometry.id_correlation import id_correlation
from lightning_mm.geometry.information_imbalance import information_imbalance
from lightning_mm.geometry.knn_overlap import label_overlap, overlap, overlap_matrix
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.procrustes import procrustes
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.separability import separability
from lightning_mm.geometry.spectrum import Spectrum, alpha_req, effective_rank, entropy, participation_ratio, rankme

SITE_PAIRS: Mapping[str, tuple[str, str]] = {
    "last": ("picture/last", "text/last"),
    "image~text": ("picture/image", "text/text"),
    "token": ("picture/token", "text/token"),
    "token_last": ("picture_last/token", "text_last/token"),
}
"""Site of pair measures -> the two positions that are compared."""

SVCCA_VARIANCE = 0.99
"""Share of the variance that SVCCA's directions explain (Raghu et al. 2017)."""


@dataclass(frozen=True, eq=False)
class PositionData:
    """The vectors of one position, and what several measures derive from them, computed once.

    Args:
        selected: (T, N, D) features with their rows and pictures.
        k: Number of neighbors.
        variance: Share of its variance that SVCCA's directions explain.
    """

    selected: SelectedRows
    k: int
    variance: float = SVCCA_VARIANCE

    @classmethod
    def of(
        cls, selected: SelectedRows, k: int, device: torch.device, variance: float = SVCCA_VARIANCE
    ) -> "PositionData":
        """Vectors on a device, and k for their number."""
        return cls(selected.to(device), num_neighbors(k, len(selected)), variance)

    @cached_property
    def reps(self) -> Representations:
        return Representations.of(self.selected.features)

    @cached_property
    def neighbors(self) -> Neighbors:
        return Neighbors.of(self.reps)

    @cached_property
    def spectrum(self) -> Spectrum:
        return Spectrum.of(self.reps)

    @property
    def groups(self) -> Tensor:
        return self.selected.groups


SINGLE_MEASURES: Mapping[str, Callable[[PositionData], list[Estimate]]] = {
    "id_twonn": lambda p: intrinsic_dimension.two_nn(p.neighbors, groups=p.groups),
    "id_gride": lambda p: intrinsic_dimension.gride(p.neighbors, *gride_scales(len(p.selected)), groups=p.groups),
    "id_calibrated": lambda p: intrinsic_dimension.calibrated_dimension(
        SINGLE_MEASURES["id_gride"](p), intrinsic_dimension.Gride(*gride_scales(len(p.selected)))
    ),
    "participation_ratio": lambda p: participation_ratio(p.reps, groups=p.groups),
    "effective_rank": lambda p: effective_rank(p.spectrum, p.groups),
    "rankme": lambda p: rankme(p.reps, p.groups),
    "entropy": lambda p: entropy(p.spectrum, p.groups),
    "entropy_unit_rows": lambda p: entropy(Spectrum.of(p.reps, unit_rows=True), p.groups),
    "alpha_req": lambda p: alpha_req(p.spectrum, groups=p.groups),
    "anisotropy": lambda p: isotropy.anisotropy(p.reps, p.groups),
    "uniformity": lambda p: isotropy.uniformity(p.reps, groups=p.groups),
    "block_influence": lambda p: block_influence.block_influence(p.selected.features, p.groups),
    "angular_distance": lambda p: block_influence.angular_distance(p.selected.features, p.groups),
}
"""Measures of one position."""

PAIR_MEASURES: Mapping[str, Callable[[PositionData, PositionData], list[Estimate]]] = {
    "overlap": lambda a, b: overlap(a.neighbors, b.neighbors, a.k, a.groups),
    "cka": lambda a, b: cka.cka(a.reps, b.reps, a.groups),
    "cka_rbf": lambda a, b: cka.cka_rbf(a.reps, b.reps, groups=a.groups),
    "cka_biased": lambda a, b: cka.cka_biased(a.reps, b.reps, a.groups),
    "svcca": lambda a, b: cca.svcca(a.reps, b.reps, a.variance, a.groups),
    "pwcca": lambda a, b: cca.pwcca(a.reps, b.reps, groups=a.groups),
    "procrustes": lambda a, b: procrustes(a.reps, b.reps, groups=a.groups),
    "distance_correlation": lambda a, b: distance_correlation(a.reps, b.reps, groups=a.groups),
    "id_correlation": lambda a, b: id_correlation(a.reps, b.reps, groups=a.groups),
    "rsa": lambda a, b: rsa.rsa(a.reps, b.reps, groups=a.groups),
    "imbalance_image_to_text": lambda a, b: information_imbalance(a.reps, b.reps, groups=a.groups),
    "imbalance_text_to_image": lambda a, b: information_imbalance(b.reps, a.reps, groups=a.groups),
    "alignment": lambda a, b: modality_gap.alignment(a.reps, b.reps, a.groups),
    "gap": lambda a, b: modality_gap.modality_gap(a.reps, b.reps, groups=a.groups),
    "gap_auc": lambda a, b: separability(a.reps, b.reps, groups=a.groups),
    "matched_cosine": lambda a, b: modality_gap.matched_cosine(a.reps, b.reps, a.groups),
    "token_cosine": lambda a, b: modality_gap.token_cosine(a.reps, b.reps, a.groups),
    "frechet": lambda a, b: divergence.frechet(a.reps, b.reps, groups=a.groups),
    "mmd": lambda a, b: divergence.mmd(a.reps, b.reps, groups=a.groups),
}
"""Measures of a pair of positions, sample by sample."""

DEFAULT_MEASURES = (
    "id_gride",
    "participation_ratio",
    "entropy",
    "anisotropy",
    "block_influence",
    "label_overlap",
    "overlap",
    "cka",
    "imbalance_image_to_text",
    "imbalance_text_to_image",
    "gap",
    "gap_auc",
    "matched_cosine",
    "cka_matrix",
)
"""Measured by default: one of each kind, all of them fast."""

_MIN_PICTURES = 3
"""Pictures from which on one can be nearer to another than to a third."""

MATRIX_MEASURES = ("cka_matrix", "overlap_matrix")
"""One number for every layer of the one position with every layer of the other, or of the same."""

ALL_MEASURES = (*SINGLE_MEASURES, *PAIR_MEASURES, "label_overlap", *MATRIX_MEASURES)


def resolve_measures(measures: Sequence[str]) -> tuple[str, ...]:
    """Names of measures, with ``all`` expanded.

    Raises:
        UserError: One of them does not exist.
    """
    named = ALL_MEASURES if "all" in measures else tuple(measures)
    for name in named:
        if name not in ALL_MEASURES:
            known = f"There are {', '.join(ALL_MEASURES)}."
            raise UserError(f"There is no geometric measure {name!r}.", known, "Name those.")
    return named


def measure_geometry(
    states: HiddenStates,
    probe_set: ProbeSet,
    measures: Collection[str],
    k: int,
    device: torch.device,
    variance: float = SVCCA_VARIANCE,
) -> Findings:
    """All chosen measures of every layer.

    Args:
        states: Hidden states of the probe set.
        probe_set: The rows and their labels.
        measures: Names, as ``resolve_measures`` returns them.
        k: Number of neighbors; fewer where there are fewer than ten times as many samples.
        device: Where to compute.
        variance: Share of its variance that SVCCA's directions explain, where there are samples enough.
    """
    found = Findings(states.step)
    for site, position in SITES.items():
        selected = select_rows(states, probe_set, position)
        if selected is not None:
            _measure_site(found, site, PositionData.of(selected, k, device), measures)
        elif any(row.role == position.partition("/")[0] for row in probe_set.rows):
            found.problems.append(f"geometry of {site}: {position} was not read of any row")
    for site, (one, other) in SITE_PAIRS.items():
        pair = select_pairs(states, probe_set, one, other)
        if pair is None and site == "token_last" and not any(row.role == "picture_last" for row in probe_set.rows):
            continue  # not asked for
        if pair is None:
            found.problems.append(f"geometry of {site}: no picture has both {one} and {other}")
            continue
        a, b = (PositionData.of(half, k, device, variance) for half in pair)
        for measure in (name for name in PAIR_MEASURES if name in measures):
            found.add("geometry", measure, site, PAIR_MEASURES[measure](a, b))
        _add_matrices(found, site, a, b, measures)
    return found


def _add_matrices(found: Findings, site: str, a: PositionData, b: PositionData, measures: Collection[str]) -> None:
    """Add the matrices of two positions, or of one with itself: layers of the first by layers of the second."""
    if "cka_matrix" in measures:
        found.matrices.append(LayerMatrix("cka", site, cka.cka_matrix(a.reps, None if a is b else b.reps).cpu()))
    if "overlap_matrix" in measures:
        found.matrices.append(LayerMatrix("overlap", site, overlap_matrix(a.neighbors, b.neighbors, a.k).cpu()))


def _measure_site(found: Findings, site: str, data: PositionData, measures: Collection[str]) -> None:
    for measure in (name for name in SINGLE_MEASURES if name in measures):
        found.add("geometry", measure, site, SINGLE_MEASURES[measure](data))
    _add_matrices(found, site, data, data, measures)
    if "label_overlap" in measures and (estimates := _object_overlap(data)) is not None:
        found.add("geometry", "label_overlap", site, estimates)
    elif "label_overlap" in measures and any("objects" in row.labels for row in data.selected.rows):
        found.problems.append(f"label_overlap of {site}: fewer than {_MIN_PICTURES} pictures with one kind of object")


def _object_overlap(data: PositionData) -> list[Estimate] | None:
    """Label overlap of the pictures that show one kind of object; None where there are too few to compare."""
    shown = [row.labels.get("objects") for row in data.selected.rows]
    chosen = [i for i, label in enumerate(shown) if isinstance(label, tuple) and sum(label) == 1]
    if len(chosen) < _MIN_PICTURES:
        return None
    labels = torch.tensor([label.index(1) for label in (shown[i] for i in chosen) if isinstance(label, tuple)])
    part, groups = Neighbors.of(Representations.of(data.selected.features[:, chosen])), data.groups[chosen]
    return label_overlap(part, labels.to(groups.device), num_neighbors(data.k, len(chosen)), groups)


def gride_scales(n: int) -> tuple[int, int]:
    """GRIDE's two neighbors among n samples: (16, 32) as in arXiv:2606.03871, nearer ones where n is less than 256.

    Example:
        >>> gride_scales(1000), gride_scales(64)
        ((16, 32), (4, 8))
    """
    far = min(32, max(2, n // 8))
    return far // 2, far


def num_neighbors(k: int, n: int) -> int:
    """k, but at most a tenth of the n samples: a neighborhood that holds most of them says nothing."""
    return max(1, min(k, n // 10))
