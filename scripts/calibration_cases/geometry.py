"""Cases of every geometric measure: of one cloud, of two that are independent, of two that have something in common.

Independent clouds of one distribution are what both nulls say: pairs are random, and the two readings of a sample may
change places.

Data flow: two clouds -> ``analysis.geometry.measure_geometry`` -> one reading per measure.
"""

from dataclasses import replace
from functools import partial

import torch

from calibration_cases.case import Case, Outcome, Reading, reading_of
from calibration_cases.made_up import WIDTH, States, cloud, groups_of, states_of
from lightning_mm.analysis.drift import measure_drift
from lightning_mm.analysis.geometry import MATRIX_MEASURES, PAIR_MEASURES, SINGLE_MEASURES, measure_geometry
from lightning_mm.analysis.hidden_states import HiddenStates

_CPU = torch.device("cpu")
_NEIGHBORS = 10
_CLASSES = 5
_BETWEEN_LAYERS = ("block_influence", "angular_distance")
"""Measures of two consecutive layers."""

_GROUPS = {"alone": (1,), "groups": (2, 3, 4)}
_RESTS_ON = ("geometry", "analysis/geometry.py", "analysis/drift.py", "analysis/select_rows.py")


def draw(seed: int, rows: int, grouping: str, planted: bool) -> States:
    """Pictures and texts in two layers, and one kind of object per picture, the same in a group."""
    generator = torch.Generator().manual_seed(seed)
    groups = groups_of(rows, _GROUPS[grouping])
    picture, text = (cloud(groups, 2, generator) for _ in range(2))
    kind = torch.randint(_CLASSES, (int(groups.max()) + 1,), generator=generator)[groups]
    if planted:
        direction = torch.randn(_CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
        picture = picture + 0.3 * direction[kind]
        text = 0.6 * picture + 0.8 * text + 0.2
    shown = [{"objects": tuple(int(kind_) == each for each in range(_CLASSES))} for kind_ in kind]
    groups_of_roles = {"picture": groups, "text": groups}
    labels = {"picture": shown, "text": [{} for _ in shown]}
    return states_of({"picture/last": picture, "text/last": text}, groups_of_roles, labels)


def measure(drawn: States) -> Outcome:
    """Every measure, of the last layer: single ones of the pictures, those of pairs of both."""
    picture = drawn.states.features["picture/last"]
    one_layer = {name: x[1:] for name, x in drawn.states.features.items()}
    single = tuple(name for name in (*SINGLE_MEASURES, "label_overlap") if name not in _BETWEEN_LAYERS)
    readings = [
        *_readings(drawn, {"picture/last": one_layer["picture/last"]}, single),
        *_readings(drawn, {"picture/last": picture}, _BETWEEN_LAYERS),
        *_readings(drawn, one_layer, tuple(PAIR_MEASURES)),
    ]
    return Outcome([each for each in readings if each.statistic not in MATRIX_MEASURES])


def _readings(drawn: States, features: dict[str, torch.Tensor], measures: tuple[str, ...]) -> list[Reading]:
    states = HiddenStates(0, features, drawn.states.sample_index)
    found = measure_geometry(states, drawn.probe_set, measures, _NEIGHBORS, _CPU)
    last = max(row.layer for row in found.rows)
    rows = [row for row in found.rows if row.layer == last]
    return [_without_null(reading_of(row)) if row.measure in SINGLE_MEASURES else reading_of(row) for row in rows]


def _without_null(reading: Reading) -> Reading:
    """Of one cloud the null is isotropic noise, which clouds with a spectrum, a mean and groups are not."""
    return replace(reading, null=None, null_low=None, null_high=None, found=None)


def draw_noise(seed: int, rows: int) -> States:
    """Isotropic noise, the null of all measures of one cloud."""
    noise = torch.randn(1, rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return states_of({"picture/last": noise}, {"picture": torch.arange(rows)}, {"picture": [{}] * rows})


def measure_noise(drawn: States) -> Outcome:
    """Every measure of one cloud, with its null."""
    names = tuple(name for name in SINGLE_MEASURES if name not in _BETWEEN_LAYERS)
    found = measure_geometry(drawn.states, drawn.probe_set, names, _NEIGHBORS, _CPU)
    return Outcome([reading_of(row) for row in found.rows])


def draw_drift(seed: int, rows: int, grouping: str, kept: float) -> tuple[States, States]:
    """Pictures before and after a training that keeps this much of each, and that changes no dimension."""
    generator = torch.Generator().manual_seed(seed)
    groups = groups_of(rows, _GROUPS[grouping])
    before, other = (cloud(groups, 1, generator) for _ in range(2))
    middle = before.mean(1, keepdim=True)
    after = middle + kept * (before - middle) + (1 - kept**2) ** 0.5 * (other - middle)
    labels = [{} for _ in range(rows)]
    one, two = (states_of({"picture/last": x}, {"picture": groups}, {"picture": labels}) for x in (before, after))
    return one, two


def measure_both(drawn: tuple[States, States], kept: float) -> Outcome:
    """Every measure of drift; that the dimension has changed is never true."""
    before, after = drawn
    found = measure_drift(before.states, after.states, before.probe_set, _NEIGHBORS, _CPU)
    readings = [reading_of(row) for row in found.rows]
    return Outcome([replace(one, found=None) if kept and one.statistic == "drift_id" else one for one in readings])


_WORDS = {
    "alone": "all independent",
    "groups": "in groups of 2 to 4 that share 80 % of their variance, such as frames of a clip",
}


def cases() -> list[Case]:
    """All of them."""
    made = []
    for rows in (96, 1000):
        about = f"{rows} samples of isotropic noise of {WIDTH} features"
        drawn = partial(draw_noise, rows=rows)
        made.append(Case(f"one cloud/{rows}/noise/null", about, drawn, measure_noise, _RESTS_ON, is_small=rows < 1000))
        for grouping, words in _WORDS.items():
            small = rows < 1000
            for kind in ("null", "planted"):
                about = f"{rows} pictures and texts of {WIDTH} features, {words}; " + (
                    "the two are independent, of one distribution" if kind == "null" else "texts hold 0.6 of a picture"
                )
                drawn = partial(draw, rows=rows, grouping=grouping, planted=kind == "planted")
                made.append(
                    Case(f"geometry/{rows}/{grouping}/{kind}", about, drawn, measure, _RESTS_ON, is_small=small)
                )
                kept = 0.0 if kind == "null" else 0.8
                about = f"{rows} pictures of {WIDTH} features, {words}; training keeps {kept} of each"
                drawn, how = (
                    partial(draw_drift, rows=rows, grouping=grouping, kept=kept),
                    partial(measure_both, kept=kept),
                )
                made.append(Case(f"drift/{rows}/{grouping}/{kind}", about, drawn, how, _RESTS_ON, is_small=small))
    return made
