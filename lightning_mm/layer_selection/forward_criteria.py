"""Criteria that forward passes of the untuned model give: reasons to train some blocks rather than others.

Data flow: hidden states of the probe set -> one score per block, on all pictures and on random halves of them ->
``Criterion``. A block is judged by its output (slice i + 1 of the hidden states).

Shapes: T slices, L = T - 1 decoder blocks, R resamples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lightning_mm.analysis.geometry import gride_scales
from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.analysis.select_rows import RowFilter, select_rows
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.estimate import Estimate, values
from lightning_mm.data.probe_sets.probe_set import ProbeRow, ProbeSet
from lightning_mm.geometry.block_influence import angular_distance, block_influence
from lightning_mm.geometry.intrinsic_dimension import gride
from lightning_mm.geometry.knn_overlap import overlap
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.null_models import adjust_for_chance
from lightning_mm.geometry.representations import Representations
from lightning_mm.layer_selection.entailment_probe import entailment_accuracy
from lightning_mm.layer_selection.layer_range_search import Criterion
from lightning_mm.layer_selection.selection_inputs import (
    PAIRED_PLACES,
    SelectionInputs,
    imbalance_profiles,
    knn_overlap_profile,
)

Score = Callable[[SelectionInputs], Tensor]
"""Gives (T,) scores, or an empty tensor where the inputs have no row for it."""


def _overlap(inputs: SelectionInputs) -> Tensor:
    profiles = [knn_overlap_profile(inputs, place) for place in PAIRED_PLACES]
    return _mean_profile(
        torch.tensor(values([adjust_for_chance(e) for e in profile])) for profile in profiles if profile
    )


def _imbalance(inputs: SelectionInputs) -> Tensor:
    profiles = (profile for place in PAIRED_PLACES for profile in imbalance_profiles(inputs, place) if profile)
    return _mean_profile(torch.tensor(values(profile)) for profile in profiles)


def _entailment(inputs: SelectionInputs) -> Tensor:
    return torch.tensor(values(entailment_accuracy(inputs)))


def _dimension(inputs: SelectionInputs) -> Tensor:
    selected = select_rows(inputs.reading, inputs.probe_set, "picture/last", inputs.keep)
    if selected is None:
        return torch.empty(0)
    selected = selected.to(inputs.device)
    neighbors = Neighbors.of(Representations.of(selected.features))
    return torch.tensor(values(gride(neighbors, *gride_scales(len(selected)), groups=selected.groups)))


def _influence(inputs: SelectionInputs) -> Tensor:
    return _mean_over_places(inputs, block_influence, ("picture/image", "picture/last"))


def _angle(inputs: SelectionInputs) -> Tensor:
    return _mean_over_places(inputs, angular_distance, ("picture/last", "text/last"))


FORWARD_CRITERIA: Mapping[str, tuple[str, Score]] = {
    "overlap": ("meaning", _overlap),
    "imbalance": ("meaning", _imbalance),
    "entailment": ("meaning", _entailment),
    "dimension": ("shape", _dimension),
    "influence": ("shape", _influence),
    "angle": ("shape", _angle),
}
"""Name -> family, and the score of every slice."""


def forward_criteria(
    reading: HiddenStates, probe_set: ProbeSet, names: tuple[str, ...], resamples: int, seed: int, device: torch.device
) -> Iterator[Criterion]:
    """The named criteria, on all pictures and on random halves of them; one that is undefined is left out and logged.

    Args:
        reading: Hidden states of the untuned model.
        probe_set: Its rows.
        names: Keys of ``FORWARD_CRITERIA``.
        resamples: R, the number of halves.
        seed: Of the halves.
        device: Where to compute.
    """
    for name in names:
        family, score = FORWARD_CRITERIA[name]
        scores, resampled = _resampled(score, reading, probe_set, resamples, seed, device)
        if not len(scores):
            log_decision("auto.criteria", f"without {name}", "the probe set has no rows for it, or none could be read")
        elif scores.isnan().all():
            log_decision(
                "auto.criteria", f"without {name}", "it is undefined at every block: too few rows, or all alike"
            )
        else:
            yield Criterion(name, scores, resampled, family)


def drift_criterion(
    before: HiddenStates, after: HiddenStates, probe_set: ProbeSet, resamples: int, seed: int, device: torch.device
) -> Criterion | None:
    """Share of neighbors among pictures that a pilot run has changed (Palacios et al. 2026, arXiv:2606.03871).

    None, and logged, where no picture was read.

    Args:
        before: Hidden states of the untuned model.
        after: Those of the pilot run's model, of the same rows.
        probe_set: Their rows.
        resamples: R, the number of halves.
        seed: Of the halves.
        device: Where to compute.
    """

    def changed(inputs: SelectionInputs) -> Tensor:
        one, other = (select_rows(reading, probe_set, "picture/last", inputs.keep) for reading in (before, after))
        if one is None or other is None:
            return torch.empty(0)
        count = max(1, min(10, len(one) // 8))
        then, now = (Neighbors.of(Representations.of(x.features.to(device))) for x in (one, other))
        return 1 - torch.tensor(values(overlap(then, now, count)))

    scores, resampled = _resampled(changed, before, probe_set, resamples, seed, device)
    if not len(scores) or scores.isnan().all():
        log_decision("auto.criteria", "without drift", "no pictures were read, or too few to have neighbours")
        return None
    return Criterion("drift", scores, resampled, "meaning")


def _resampled(
    score: Score, reading: HiddenStates, probe_set: ProbeSet, resamples: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(L,) a score of every block, and (R, L) on random halves of the pictures; NaN where a half has no row for it."""
    whole = score(SelectionInputs(reading, probe_set, device, lambda row: True))
    if not len(whole) or whole[1:].isnan().all():
        return whole[1:].double(), torch.empty(0)
    undefined = torch.full_like(whole, torch.nan)
    halves = [SelectionInputs(reading, probe_set, device, keep) for keep in _halves(probe_set, resamples, seed)]
    rows = [found if len(found := score(half)) else undefined for half in halves]
    return whole[1:].double(), torch.stack(rows)[:, 1:].double()


def _halves(probe_set: ProbeSet, count: int, seed: int) -> Iterator[RowFilter]:
    """Random halves of the picture groups, as filters of rows."""
    groups = sorted({row.group for row in probe_set.rows})
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        order = torch.randperm(len(groups), generator=generator)[: (len(groups) + 1) // 2].tolist()
        yield _in_groups({groups[i] for i in order})


def _in_groups(groups: set[str]) -> RowFilter:
    def keep(row: ProbeRow) -> bool:
        return row.group in groups

    return keep


def _mean_over_places(
    inputs: SelectionInputs, measure: Callable[[Tensor], list[Estimate]], places: tuple[str, ...]
) -> Tensor:
    """Mean of a measure over the places that were read."""
    selected = (select_rows(inputs.reading, inputs.probe_set, place, inputs.keep) for place in places)
    features = (rows.features.to(inputs.device) for rows in selected if rows is not None)
    return _mean_profile(torch.tensor(values(measure(x))) for x in features)


def _mean_profile(profiles: Iterable[Tensor]) -> Tensor:
    """(T,) mean of the profiles' defined values; empty where there are no profiles."""
    held = list(profiles)
    return torch.stack(held).nanmean(0) if held else torch.empty(0)
