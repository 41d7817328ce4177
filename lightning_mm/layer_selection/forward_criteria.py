"""Reasons to train some blocks rather than others, read off the untuned model without a gradient.

Data flow: ``HiddenStates`` of the probe set -> one score per block, on all pictures and on random halves of them ->
``Criterion``. A block is judged by what it puts out (slice i + 1 of the reading).

Shapes: L decoder blocks, R resamples.

Whether a layer tells which caption belongs to which picture, by a probe in closed form.

Data flow: entailment rows of a ``Material`` -> ``probes.ridge``, one group of pictures left out at a time -> accuracy
of every slice, and that of the same probe on random answers.

Shapes: T slices, N rows, D hidden size.

What reasons to choose layers are computed from: a reading, or a part of its pictures, and pairs of equal meaning.

Data flow: ``HiddenStates`` + ``ProbeSet`` -> ``Material`` -> ``Pair`` -> ``criteria``, ``entailment``, ``evidence``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mm.analysis.geometry import gride_scales
from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.analysis.select_rows import RowFilter, SelectedRows, select_pairs, select_rows
from lightning_mm.core.decisions import decide
from lightning_mm.core.estimate import Estimate, values
from lightning_mm.data.probe_sets.probe_set import ProbeRow, ProbeSet
from lightning_mm.geometry.block_influence import angular_distance, block_influence
from lightning_mm.geometry.information_imbalance import information_imbalance
from lightning_mm.geometry.intrinsic_dimension import gride
from lightning_mm.geometry.knn_overlap import overlap
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.null_models import adjust_for_chance
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.resampling import clustered_mean_interval
from lightning_mm.layer_selection.layer_range_search import Criterion
from lightning_mm.probes.ridge import Ridge

MEETING_PLACES = {"last": ("picture/last", "text/last"), "image~text": ("picture/image", "text/text")}


@dataclass(frozen=True, eq=False)
class Material:
    """What criteria are computed from; ``keep`` names the pictures of a resample."""

    reading: HiddenStates
    probe_set: ProbeSet
    device: torch.device
    keep: RowFilter


@dataclass(frozen=True, eq=False)
class Pair:
    """Pictures and their captions at one site, sample by sample."""

    pictures: Representations
    captions: Representations
    groups: Tensor

    @classmethod
    def at(cls, material: Material, site: str) -> "Pair | None":
        """At ``last`` or ``image~text``; None where no picture was read with a caption."""
        pair = select_pairs(material.reading, material.probe_set, *MEETING_PLACES[site], material.keep)
        if pair is None:
            return None
        one, other = (half.to(material.device) for half in pair)
        return cls(Representations.of(one.features), Representations.of(other.features), one.groups)

    @property
    def near(self) -> int:
        """How many neighbors: ten, or an eighth of the samples where there are few."""
        return max(1, min(10, self.pictures.num_samples // 8))

    @property
    def neighbors(self) -> tuple[Neighbors, Neighbors]:
        return Neighbors.of(self.pictures), Neighbors.of(self.captions)


_MIN_GROUPS = 10
_PENALTIES = (0.1, 1.0, 10.0, 100.0)
"""Ridge penalties over D, for features of variance 1."""

_ROUNDING = 1e-6
"""A feature that spreads by less than this share of its size is constant."""


def entailment(material: Material) -> list[Estimate]:
    """Accuracy of a closed-form probe that was never shown the picture it is asked about, every slice.

    Of wrong captions that differ by one noun where there are such, else of random ones.
    """
    asked = _entailment_rows(material)
    if asked is None:
        return []
    chosen, labels = asked
    return leave_group_out_accuracy(chosen.features, labels, chosen.groups)


def by_heart(material: Material, draws: int = 5, seed: int = 0) -> list[float]:
    """Accuracy of the same probe on random answers, one for each pair of true and shown caption, every slice."""
    asked = _entailment_rows(material)
    if asked is None:
        return []
    chosen, labels = asked
    true = {row.sample.images: row.span for row in material.probe_set.rows if row.labels.get("entailment/random") == 1}
    pairs = [(true.get(row.sample.images, ""), row.span) for row in chosen.rows]
    types = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(draws):
        answers = (torch.randperm(len(types), generator=generator) % 2).tolist()
        random = torch.tensor([answers[types[pair]] for pair in pairs], device=labels.device)
        drawn.append(values(leave_group_out_accuracy(chosen.features, random, chosen.groups)))
    return torch.tensor(drawn).mean(0).tolist()


def leave_group_out_accuracy(features: Tensor, labels: Tensor, groups: Tensor) -> list[Estimate]:
    """Accuracy of a ridge probe on groups that it has not seen, in closed form.

    The penalty that a group is judged by is the one that all other groups prefer. Mean and scale of the features are
    those of all rows, which have no labels to tell; a feature that varies by no more than rounding has no say.

    Args:
        features: (T, N, D).
        labels: (N,) 0 or 1.
        groups: (N,) ids of what is left out together.
    """
    n, problems = len(labels), Representations.of(features).problems
    if len(torch.unique(groups)) < _MIN_GROUPS or len(torch.unique(labels)) < 2 or all(problems):
        return [
            Estimate.undefined_because(problem or "too few: groups or classes to leave one out", n)
            for problem in problems
        ]
    mean_T1D = features.mean(1, keepdim=True)
    spread_T1D = features.std(1, keepdim=True)
    x_TND = (features - mean_T1D) / torch.where(spread_T1D > _ROUNDING * mean_T1D.abs(), spread_T1D, torch.inf)
    sound = [layer for layer, problem in enumerate(problems) if not problem]
    y_N1 = (labels.to(x_TND) * 2 - 1)[:, None]
    penalties = [strength * x_TND.shape[2] for strength in _PENALTIES]
    fitted = Ridge.fit(x_TND[sound], y_N1, penalties, groups_N=groups)
    right_TN = ((y_N1 - fitted.loo_residuals)[..., 0] * y_N1[:, 0] > 0).double()
    ends = zip(*clustered_mean_interval(right_TN, groups), strict=True)
    majority = max(float(labels.double().mean()), 1 - float(labels.double().mean()))
    found = [Estimate.of(float(mean), n, low=float(low), high=float(high), null=majority) for mean, low, high in ends]
    by_layer = dict(zip(sound, found, strict=True))
    return [by_layer.get(layer) or Estimate.undefined_because(problem, n) for layer, problem in enumerate(problems)]


def _entailment_rows(material: Material) -> tuple[SelectedRows, Tensor] | None:
    for name in ("entailment/hard", "entailment/random"):

        def wanted(row: ProbeRow, name: str = name) -> bool:
            return name in row.labels and material.keep(row)

        chosen = select_rows(material.reading, material.probe_set, "entailment/last", wanted)
        if chosen is not None:
            labels = torch.tensor([row.labels[name] for row in chosen.rows], device=material.device)
            return chosen.to(material.device), labels
    return None


def meeting(material: Material, site: str) -> list[Estimate]:
    """Mutual kNN overlap of pictures and captions (2606.03871), every slice."""
    pair = Pair.at(material, site)
    return [] if pair is None else overlap(*pair.neighbors, pair.near, pair.groups)


def foretelling(material: Material, site: str) -> tuple[list[Estimate], list[Estimate]]:
    """1 - information imbalance from picture to caption, and back: 0 by chance, 1 where neighbors are the same."""
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
    return Estimate.of(1 - e.value, e.n, **{name: None if x is None else 1 - x for name, x in turned.items()})


def _overlaps(material: Material) -> Tensor:
    sites = [meeting(material, site) for site in MEETING_PLACES]
    return _mean_of(torch.tensor(values([adjust_for_chance(e) for e in site])) for site in sites if site)


def _imbalances(material: Material) -> Tensor:
    both = (way for site in MEETING_PLACES for way in foretelling(material, site) if way)
    return _mean_of(torch.tensor(values(way)) for way in both)


def _entailments(material: Material) -> Tensor:
    return torch.tensor(values(entailment(material)))


def _dimensions(material: Material) -> Tensor:
    selected = select_rows(material.reading, material.probe_set, "picture/last", material.keep)
    if selected is None:
        return torch.empty(0)
    selected = selected.to(material.device)
    near = Neighbors.of(Representations.of(selected.features))
    return torch.tensor(values(gride(near, *gride_scales(len(selected)), groups=selected.groups)))


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
    reading: HiddenStates, probe_set: ProbeSet, names: tuple[str, ...], resamples: int, seed: int, device: torch.device
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
    before: HiddenStates, after: HiddenStates, probe_set: ProbeSet, resamples: int, seed: int, device: torch.device
) -> Criterion | None:
    """Criterion 3: how much of each layer's neighbourhoods a pilot run has changed, in pictures (2606.03871).

    None, and said so, where no picture was read. The two readings hold the same rows.
    """

    def changed(material: Material) -> Tensor:
        one, other = (select_rows(reading, probe_set, "picture/last", material.keep) for reading in (before, after))
        if one is None or other is None:
            return torch.empty(0)
        near = max(1, min(10, len(one) // 8))
        then, now = (Neighbors.of(Representations.of(x.features.to(device))) for x in (one, other))
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


def _halves(probe_set: ProbeSet, count: int, seed: int) -> Iterator[RowFilter]:
    groups = sorted({row.group for row in probe_set.rows})
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        order = torch.randperm(len(groups), generator=generator)[: (len(groups) + 1) // 2].tolist()
        yield _in({groups[i] for i in order})


def _in(groups: set[str]) -> RowFilter:
    def keep(row: ProbeRow) -> bool:
        return row.group in groups

    return keep


def _of_places(
    material: Material, measure: Callable[[Tensor], list[Estimate]], places: tuple[str, ...]
) -> Iterator[Tensor]:
    for place in places:
        selected = select_rows(material.reading, material.probe_set, place, material.keep)
        if selected is not None:
            yield torch.tensor(values(measure(selected.features.to(material.device))))


def _mean_of(profiles: Iterator[Tensor] | list[Tensor]) -> Tensor:
    """Mean of the profiles' defined values; empty where there is none."""
    held = list(profiles)
    return torch.stack(held).nanmean(0) if held else torch.empty(0)
