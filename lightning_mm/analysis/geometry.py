"""The geometry of a reading: the shape of each layer's representations, and where picture and caption meet.

Data flow: ``Reading`` -> one centred Gram per place -> every measure of ``lightning_mm.geometry`` -> ``Findings``.

Sites of one place: ``picture`` and ``text`` (last prompt token, asked about a picture or about its caption), ``image``
(mean of the picture's tokens). Pairs: ``last`` (those two), ``image~text`` (mean of the picture's tokens against mean
of the caption's), ``token`` (one random token of each, 2606.03871's reading).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_mm.analysis.findings import Findings, Matrix
from lightning_mm.analysis.hidden_states import Reading
from lightning_mm.analysis.select_rows import Selected, paired, select
from lightning_mm.core.errors import UserError
from lightning_mm.core.estimate import Estimate
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.geometry import block_influence, cca, cka, dimension, divergence, isotropy, modality_gap, rsa
from lightning_mm.geometry.gride import Gride
from lightning_mm.geometry.information_imbalance import information_imbalance
from lightning_mm.geometry.knn_overlap import label_overlap, overlap
from lightning_mm.geometry.neighbors import Neighbours
from lightning_mm.geometry.procrustes import procrustes
from lightning_mm.geometry.representations import Bank
from lightning_mm.geometry.separability import separability
from lightning_mm.geometry.spectrum import Spectrum, alpha_req, effective_rank, entropy, participation_ratio, rankme

SITES: Mapping[str, str] = {"picture": "picture/last", "text": "text/last", "image": "picture/image"}
PAIRS: Mapping[str, tuple[str, str]] = {
    "last": ("picture/last", "text/last"),
    "image~text": ("picture/image", "text/text"),
    "token": ("picture/token", "text/token"),
}


@dataclass(frozen=True, eq=False)
class Place:
    """The vectors of one place and what is derived from them once.

    Args:
        selected: (T, N, D) features with their rows and pictures.
        k: Neighbours.
        classes: Names of the objects that labels speak of.
    """

    selected: Selected
    k: int

    @cached_property
    def bank(self) -> Bank:
        return Bank.of(self.selected.features)

    @cached_property
    def neighbours(self) -> Neighbours:
        return Neighbours.of(self.bank)

    @cached_property
    def spectrum(self) -> Spectrum:
        return Spectrum.of(self.bank)

    @property
    def groups(self) -> Tensor:
        return self.selected.groups


OneSite = Callable[[Place], list[Estimate]]
TwoSites = Callable[[Place, Place], list[Estimate]]

SHAPES: Mapping[str, OneSite] = {
    "id_twonn": lambda p: dimension.two_nn(p.neighbours, groups=p.groups),
    "id_gride": lambda p: dimension.gride(p.neighbours, *scales(len(p.selected)), groups=p.groups),
    "id_calibrated": lambda p: _calibrated(p, *scales(len(p.selected))),
    "participation_ratio": lambda p: participation_ratio(p.bank, groups=p.groups),
    "effective_rank": lambda p: effective_rank(p.spectrum, p.groups),
    "rankme": lambda p: rankme(p.bank, p.groups),
    "entropy": lambda p: entropy(p.spectrum, p.groups),
    "alpha_req": lambda p: alpha_req(p.spectrum, groups=p.groups),
    "anisotropy": lambda p: isotropy.anisotropy(p.bank, p.groups),
    "uniformity": lambda p: isotropy.uniformity(p.bank, groups=p.groups),
    "block_influence": lambda p: block_influence.block_influence(p.selected.features, p.groups),
    "angular_distance": lambda p: block_influence.angular_distance(p.selected.features, p.groups),
}
"""Measures of one place."""

MEETINGS: Mapping[str, TwoSites] = {
    "overlap": lambda a, b: overlap(a.neighbours, b.neighbours, a.k, a.groups),
    "cka": lambda a, b: cka.cka(a.bank, b.bank, a.groups),
    "cka_rbf": lambda a, b: cka.cka_rbf(a.bank, b.bank, groups=a.groups),
    "cka_biased": lambda a, b: cka.cka_biased(a.bank, b.bank, a.groups),
    "svcca": lambda a, b: cca.svcca(a.bank, b.bank, groups=a.groups),
    "pwcca": lambda a, b: cca.pwcca(a.bank, b.bank, groups=a.groups),
    "procrustes": lambda a, b: procrustes(a.bank, b.bank, groups=a.groups),
    "rsa": lambda a, b: rsa.rsa(a.bank, b.bank, groups=a.groups),
    "imbalance_image_to_text": lambda a, b: information_imbalance(a.bank, b.bank, groups=a.groups),
    "imbalance_text_to_image": lambda a, b: information_imbalance(b.bank, a.bank, groups=a.groups),
    "alignment": lambda a, b: modality_gap.alignment(a.bank, b.bank, a.groups),
    "gap": lambda a, b: modality_gap.modality_gap(a.bank, b.bank, groups=a.groups),
    "gap_auc": lambda a, b: separability(a.bank, b.bank, groups=a.groups),
    "matched_cosine": lambda a, b: modality_gap.matched_cosine(a.bank, b.bank, a.groups),
    "token_cosine": lambda a, b: modality_gap.token_cosine(a.bank, b.bank, a.groups),
    "frechet": lambda a, b: divergence.frechet(a.bank, b.bank),
    "mmd": lambda a, b: divergence.mmd(a.bank, b.bank),
}
"""Measures of a pair of places, sample by sample."""

DEFAULT = (
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
"""What is measured where nothing is named: one of each kind, all of them fast."""

_FEWEST = 3
"""Pictures among which one can be next to another rather than to a third."""

ALL = (*SHAPES, *MEETINGS, "label_overlap", "cka_matrix")


def checked(measures: Sequence[str]) -> tuple[str, ...]:
    """Names of measures, ``all`` written out.

    Raises:
        UserError: One of them does not exist.
    """
    named = ALL if "all" in measures else tuple(measures)
    for name in named:
        if name not in ALL:
            raise UserError(f"There is no geometric measure {name!r}.", f"There are {', '.join(ALL)}.", "Name those.")
    return named


def geometry(
    reading: Reading, probe_set: ProbeSet, measures: Collection[str], k: int, device: torch.device
) -> Findings:
    """All measures asked for, of every layer.

    Args:
        reading: What to analyse.
        probe_set: Its rows.
        measures: Names, as ``checked`` returns them.
        k: Neighbours; fewer where there are fewer than ten times as many samples.
        device: Where to compute.
    """
    found = Findings(reading.step)
    for site, name in SITES.items():
        selected = select(reading, probe_set, name)
        if selected is None:
            if any(row.role == name.partition("/")[0] for row in probe_set.rows):
                found.problems.append(f"geometry of {site}: {name} was not read of any row")
        else:
            _one_site(found, site, Place(selected.to(device), _neighbours(k, len(selected))), measures)
    for site, (one, other) in PAIRS.items():
        pair = paired(reading, probe_set, one, other)
        if pair is None:
            found.problems.append(f"geometry of {site}: no picture has both {one} and {other}")
            continue
        a, b = (Place(half.to(device), _neighbours(k, len(half))) for half in pair)
        for measure in (name for name in MEETINGS if name in measures):
            found.add("geometry", measure, site, MEETINGS[measure](a, b))
        if "cka_matrix" in measures:
            found.matrices.append(Matrix("cka", site, cka.cka_matrix(a.bank, b.bank).cpu()))
    return found


def _one_site(found: Findings, site: str, place: Place, measures: Collection[str]) -> None:
    for measure in (name for name in SHAPES if name in measures):
        found.add("geometry", measure, site, SHAPES[measure](place))
    if "cka_matrix" in measures:
        found.matrices.append(Matrix("cka", site, cka.cka_matrix(place.bank).cpu()))
    if "label_overlap" in measures and (sole := _sole_objects(place)) is not None:
        found.add("geometry", "label_overlap", site, sole)
    elif "label_overlap" in measures and any("objects" in row.labels for row in place.selected.rows):
        found.problems.append(f"label_overlap of {site}: fewer than {_FEWEST} pictures with one kind of object")


def _sole_objects(place: Place) -> list[Estimate] | None:
    """Label overlap of the pictures that hold one kind of object; None where there are too few to compare."""
    shown = [row.labels.get("objects") for row in place.selected.rows]
    chosen = [i for i, label in enumerate(shown) if isinstance(label, tuple) and sum(label) == 1]
    if len(chosen) < _FEWEST:
        return None
    labels = torch.tensor([label.index(1) for label in (shown[i] for i in chosen) if isinstance(label, tuple)])
    part = Neighbours.of(Bank.of(place.selected.features[:, chosen]))
    return label_overlap(part, labels.to(place.groups.device), _neighbours(place.k, len(chosen)))


def _calibrated(place: Place, near: int, far: int) -> list[Estimate]:
    measured = dimension.gride(place.neighbours, near, far, place.groups)
    return dimension.calibrated_dimension(measured, Gride(near, far))


def scales(n: int) -> tuple[int, int]:
    """GRIDE's two neighbours among n samples: (16, 32) as in 2606.03871, nearer ones where n is less than 256.

    Example:
        >>> scales(1000), scales(64)
        ((16, 32), (4, 8))
    """
    far = min(32, max(2, n // 8))
    return far // 2, far


def _neighbours(k: int, n: int) -> int:
    """k, or a tenth of the samples: a neighbourhood that holds most of them says nothing."""
    return max(1, min(k, n // 10))
