"""Reasons to train some blocks rather than others, read off the untuned model without a gradient.

Data flow: ``Reading`` of the probe set -> one score per block, on all pictures and on random halves of them ->
``Criterion``. A block is judged by what it puts out (slice i + 1 of the reading).

Shapes: L decoder blocks, R resamples.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lightning_mm.analysis.geometry import scales
from lightning_mm.analysis.places import Keep, select
from lightning_mm.data.probe_sets import ProbeRow, ProbeSet
from lightning_mm.decisions import decide
from lightning_mm.estimate import Estimate, finite, values
from lightning_mm.geometry.chance import calibrated
from lightning_mm.geometry.dimension import gride
from lightning_mm.geometry.gram import Bank
from lightning_mm.geometry.imbalance import information_imbalance
from lightning_mm.geometry.influence import angular_distance, block_influence
from lightning_mm.geometry.neighbours import Neighbours
from lightning_mm.geometry.overlap import overlap
from lightning_mm.taps.reading import Reading
from lightning_mm.tuning.entailment import entailment
from lightning_mm.tuning.material import MEETING_PLACES, Material, Pair
from lightning_mm.tuning.window import Criterion


def meeting(material: Material, site: str) -> list[Estimate]:
    """Mutual kNN overlap of pictures and captions (2606.03871), every slice."""
    pair = Pair.at(material, site)
    return [] if pair is None else overlap(*pair.neighbours, pair.near, pair.groups)


def foretelling(material: Material, site: str) -> tuple[list[Estimate], list[Estimate]]:
    """1 - information imbalance from picture to caption, and back: 0 by chance, 1 where neighbours are the same."""
    pair = Pair.at(material, site)
    if pair is None:
        return [], []
    a, b, groups = pair.pictures, pair.captions, pair.groups
    there, back = information_imbalance(a, b, groups=groups), information_imbalance(b, a, groups=groups)
    return [_complement(e) for e in there], [_complement(e) for e in back]


def _complement(e: Estimate) -> Estimate:
    if e.value is None:
        return e
    turned = {"low": e.high, "high": e.low, "null": e.null, "null_low": e.null_high, "null_high": e.null_low}
    return finite(1 - e.value, e.n, **{name: None if x is None else 1 - x for name, x in turned.items()})


def _overlaps(material: Material) -> Tensor:
    sites = [meeting(material, site) for site in MEETING_PLACES]
    return _mean_of(torch.tensor(values([calibrated(e) for e in site])) for site in sites if site)


def _imbalances(material: Material) -> Tensor:
    both = (way for site in MEETING_PLACES for way in foretelling(material, site) if way)
    return _mean_of(torch.tensor(values(way)) for way in both)


def _entailments(material: Material) -> Tensor:
    return torch.tensor(values(entailment(material)))


def _dimensions(material: Material) -> Tensor:
    selected = select(material.reading, material.probe_set, "picture/last", material.keep)
    if selected is None:
        return torch.empty(0)
    selected = selected.to(material.device)
    near = Neighbours.of(Bank.of(selected.features))
    return torch.tensor(values(gride(near, *scales(len(selected)), groups=selected.groups)))


def _influences(material: Material) -> Tensor:
    return _mean_of(_of_places(material, block_influence, ("picture/image", "picture/last")))


def _angles(material: Material) -> Tensor:
    return _mean_of(_of_places(material, angular_distance, ("picture/last", "text/last")))


FORWARD: Mapping[str, tuple[str, Callable[[Material], Tensor]]] = {
    "overlap": ("meaning", _overlaps),
    "imbalance": ("meaning", _imbalances),
    "entailment": ("meaning", _entailments),
    "dimension": ("shape", _dimensions),
    "influence": ("shape", _influences),
    "angle": ("shape", _angles),
}
"""Criteria 1, 4 (meaning), 2 and 10 (shape) by name: family, and the score of every slice."""


def forward_criteria(
    reading: Reading, probe_set: ProbeSet, names: tuple[str, ...], resamples: int, seed: int, device: torch.device
) -> Iterator[Criterion]:
    """The criteria named, on all pictures and on random halves of them; one that cannot be had is said to be missing.

    Args:
        reading: Of the untuned model.
        probe_set: Its rows.
        names: Keys of ``FORWARD``.
        resamples: How many halves.
        seed: Of the draw.
        device: Where to compute.
    """
    everything = Material(reading, probe_set, device, lambda row: True)
    halves = [Material(reading, probe_set, device, keep) for keep in _halves(probe_set, resamples, seed)]
    for name in names:
        family, score = FORWARD[name]
        scores = score(everything)
        if not len(scores):
            decide("auto.criteria", f"without {name}", "the probe set has no rows for it, or none could be read")
        elif scores[1:].isnan().all():
            decide("auto.criteria", f"without {name}", "it is undefined at every block: too few rows, or all alike")
        else:
            yield Criterion(name, scores[1:].double(), _drawn(score, halves, scores), family)


def drift_criterion(
    before: Reading, after: Reading, probe_set: ProbeSet, resamples: int, seed: int, device: torch.device
) -> Criterion | None:
    """Criterion 3: how much of each layer's neighbourhoods a pilot run has changed, in pictures (2606.03871).

    None, and said so, where no picture was read. The two readings hold the same rows.
    """

    def changed(material: Material) -> Tensor:
        one, other = (select(reading, probe_set, "picture/last", material.keep) for reading in (before, after))
        if one is None or other is None:
            return torch.empty(0)
        near = max(1, min(10, len(one) // 8))
        then, now = (Neighbours.of(Bank.of(x.features.to(device))) for x in (one, other))
        return 1 - torch.tensor(values(overlap(then, now, near)))

    scores = changed(Material(before, probe_set, device, lambda row: True))
    if not len(scores) or scores[1:].isnan().all():
        decide("auto.criteria", "without drift", "no pictures were read, or too few to have neighbours")
        return None
    halves = [Material(before, probe_set, device, keep) for keep in _halves(probe_set, resamples, seed)]
    return Criterion("drift", scores[1:].double(), _drawn(changed, halves, scores), "meaning")


def _drawn(score: Callable[[Material], Tensor], halves: list[Material], whole: Tensor) -> Tensor:
    """(R, L) a score on halves of the pictures; NaN where a half has none of the rows that it is made of."""
    nothing = torch.full_like(whole, torch.nan)
    rows = [found if len(found := score(half)) else nothing for half in halves]
    return torch.stack(rows)[:, 1:].double()


def _halves(probe_set: ProbeSet, count: int, seed: int) -> Iterator[Keep]:
    groups = sorted({row.group for row in probe_set.rows})
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        order = torch.randperm(len(groups), generator=generator)[: (len(groups) + 1) // 2].tolist()
        yield _in({groups[i] for i in order})


def _in(groups: set[str]) -> Keep:
    def keep(row: ProbeRow) -> bool:
        return row.group in groups

    return keep


def _of_places(
    material: Material, measure: Callable[[Tensor], list[Estimate]], places: tuple[str, ...]
) -> Iterator[Tensor]:
    for place in places:
        selected = select(material.reading, material.probe_set, place, material.keep)
        if selected is not None:
            yield torch.tensor(values(measure(selected.features.to(material.device))))


def _mean_of(profiles: Iterator[Tensor] | list[Tensor]) -> Tensor:
    """Mean of the profiles' defined values; empty where there is none."""
    held = list(profiles)
    return torch.stack(held).nanmean(0) if held else torch.empty(0)
