"""Readings of the peak over many layers, and cases of the geometric measures whose peaks are shown.

The layers are alike to 0.9 to the next. Planted is a bump of what picture and text have in common, and of the number of
directions that the pictures spread in, both with the peak at one layer.

Data flow: findings of 31 layers -> ``analysis.summary`` -> the peak's value, verdict and range of layers.
"""

from functools import partial

import torch

from calibration_cases.case import Case, Outcome, Reading, is_clear
from calibration_cases.made_up import WIDTH, States, cloud, groups_of, states_of
from lightning_mm.analysis.findings import Findings
from lightning_mm.analysis.geometry import measure_geometry
from lightning_mm.analysis.summary import summarize_profile

LAYERS, PEAK, BREADTH = 31, 20, 4.0
BUMP_L = torch.exp(-0.5 * ((torch.arange(LAYERS) - PEAK) / BREADTH) ** 2)
"""(T,) height of what is planted: 1 at ``PEAK``."""

_MEASURES = ("id_gride", "overlap", "cka")
_RESTS_ON = ("geometry", "analysis/geometry.py", "analysis/summary.py", "core/peak_note.py")


def peak_readings(found: Findings, name: str, site: str, planted: bool) -> list[Reading]:
    """The highest layer: its value, whether it is above chance, and where it may be."""
    summary = summarize_profile(found.profile(name, site))
    if summary is None:
        return []
    row, place = summary.peak, summary.peak_layer + 1
    clear = None if row.null is None else is_clear(row)
    readings = [
        Reading(f"{name}: value at the peak", row.value, row.low, row.high, profile=name, layer=place),
        Reading(f"{name}: peak above chance", row.value, found=clear),
    ]
    if planted and (ends := summary.peak_range) is not None:
        low, high = (float(end) + 1 for end in ends)
        readings.append(Reading(f"{name}: layer of the peak", float(place), low, high, truth=float(PEAK)))
    if planted and summary.plateau is not None:
        low, high = (float(end) + 1 for end in summary.plateau)
        readings.append(Reading(f"{name}: plateau", float(place), low, high, truth=float(PEAK)))
    return readings


def draw(seed: int, rows: int, grouped: bool, planted: bool) -> States:
    """Pictures and texts in all layers."""
    generator = torch.Generator().manual_seed(seed)
    groups = groups_of(rows, (2, 3, 4) if grouped else (1,))
    picture, text = (cloud(groups, LAYERS, generator) for _ in range(2))
    if planted:
        height_L11 = BUMP_L[:, None, None]
        share = 0.8 * height_L11
        text = share * picture + (1 - share**2).sqrt() * text
        picture = picture * (1 + height_L11 * (torch.arange(WIDTH) ** 0.4 - 1).clamp_min(0))
    labels = [{} for _ in range(rows)]
    features = {"picture/last": picture, "text/last": text}
    return states_of(features, {"picture": groups, "text": groups}, {"picture": labels, "text": labels})


def measure(drawn: States, planted: bool) -> Outcome:
    """The peaks that are shown."""
    found = measure_geometry(drawn.states, drawn.probe_set, _MEASURES, 10, torch.device("cpu"))
    readings, profiles = [], {}
    for name, site in (("id_gride", "picture"), ("overlap", "last"), ("cka", "last")):
        profile = found.profile(name, site)
        profiles[name] = [profile[layer].value for layer in sorted(profile)]
        mine = peak_readings(found, name, site, planted)
        # The null of a dimension is noise, which these clouds are not.
        readings += [one for one in mine if name != "id_gride" or one.found is None]
    return Outcome(readings, profiles)


def cases() -> list[Case]:
    """All of them."""
    made = []
    for rows in (96, 1000):
        for grouped in (False, True):
            for kind in ("null", "planted"):
                planted = kind == "planted"
                words = "in groups of 2 to 4" if grouped else "all independent"
                said = f"what they share peaks at layer {PEAK}" if planted else "independent"
                about = f"{rows} pictures and texts in {LAYERS} layers, {words}; {said}"
                name = f"peaks/{rows}/{'groups' if grouped else 'alone'}/{kind}"
                drawn = partial(draw, rows=rows, grouped=grouped, planted=planted)
                how = partial(measure, planted=planted)
                made.append(Case(name, about, drawn, how, _RESTS_ON, is_small=rows < 1000))
    return made
