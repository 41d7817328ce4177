"""Whether a model shows at all where picture and language meet: a choice of layers without that would be a guess.

Data flow: ``Reading`` -> estimates with their nulls -> tests of all layers (Benjamini-Hochberg) -> yes or no, and why.

Chance is not enough of a rival. A random network sorts pictures by how full they are and captions by how long they
are, so that the two agree a little without any meaning: what counts is more agreement than the embeddings of picture
and caption have, which no decoder block has made. And a probe of random features learns something of which captions
belong to which pictures, where things repeat: what counts is more than it learns of random answers to the same pairs
(Hewitt and Liang 2019), and more than the first block has, in which picture and caption have met once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_mm.data.probe_sets import ProbeSet
from lightning_mm.estimate import Estimate, values
from lightning_mm.taps.reading import Reading
from lightning_mm.tuning.criteria import MEETING_PLACES, Material, by_heart, entailment, foretelling, meeting

LEVEL = 0.01
"""False discovery rate of the tests over layers."""


@dataclass(frozen=True)
class Evidence:
    """The verdict, in a sentence too."""

    found: bool
    reason: str


def weigh(reading: Reading, probe_set: ProbeSet, device: torch.device) -> Evidence:
    """Test every layer against chance and against the embeddings."""
    material = Material(reading, probe_set, device, lambda row: True)
    profiles = {f"overlap of picture and caption ({site})": meeting(material, site) for site in MEETING_PLACES}
    ways = (f"how well {one} foretell {other}" for one, other in (("pictures", "captions"), ("captions", "pictures")))
    foretold = dict(zip(ways, foretelling(material, "image~text"), strict=True))
    embedded = max(
        [first for profile in profiles.values() for first in values(profile[:1])], key=_known, default=math.nan
    )
    floors = {name: [embedded] * len(profile) for name, profile in profiles.items()}
    floors |= {name: values(profile[:1]) * len(profile) for name, profile in foretold.items()}
    profiles |= foretold
    profiles["entailment probe"] = entailment(material)
    first = values(profiles["entailment probe"][1:2])
    floors["entailment probe"] = [max([rival, *first]) for rival in by_heart(material)]
    found = [
        told for name, profile in profiles.items() if (told := _beyond_chance(name, profile, floors.get(name, [])))
    ]
    if found:
        return Evidence(True, "; ".join(found))
    tested = ", ".join(name for name, profile in profiles.items() if profile) or "nothing that could be tested"
    return Evidence(False, f"no layer is beyond chance and beyond the embeddings ({tested})")


def _known(value: float) -> float:
    """For comparisons in which NaN comes last."""
    return -math.inf if math.isnan(value) else value


def _beyond_chance(name: str, profile: Sequence[Estimate], floor: Sequence[float]) -> str:
    """What was found, or nothing."""
    if not profile:
        return ""
    chances = [_chance(e, rival) for e, rival in zip(profile[1:], floor[1:], strict=True)]
    defined = [(p, layer) for layer, p in enumerate(chances) if p is not None]
    passed = {layer for rank, (p, layer) in enumerate(sorted(defined), 1) if p <= LEVEL * rank / len(defined)}
    if not passed:
        return ""
    best = max(passed, key=lambda layer: profile[layer + 1].value or 0.0)
    e = profile[best + 1]
    assert e.value is not None
    assert e.null is not None
    return f"{name} is {e.value:.2f} at layer {best} where chance gives {e.null:.2f} (n = {e.n})"


def _chance(e: Estimate, rival: float) -> float | None:
    """Probability of such a value if chance, or the rival (NaN: none), had it; None where there is no value."""
    if e.value is None or e.low is None or e.high is None or e.null is None:
        return None
    error = (e.high - e.low) / 2 / 1.96
    if e.null_high is not None:
        error = math.hypot(error, (e.null_high - e.null) / 1.96)
    floor = e.null if math.isnan(rival) else max(e.null, rival)
    if error <= 0:
        return 0.0 if e.value > floor else 1.0
    return 0.5 * math.erfc((e.value - floor) / error / math.sqrt(2))
