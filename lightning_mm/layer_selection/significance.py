"""Whether a model shows at all where picture and language meet: a choice of layers without that would be a guess.

Data flow: ``HiddenStates`` -> estimates with their nulls -> tests of all layers (Benjamini-Hochberg) -> yes or no, and
why.

Chance is not enough of a rival. A random network sorts pictures by how full they are and captions by how long they
are, so that the two agree a little without any meaning: what counts is more agreement than the embeddings of the same
pictures and captions have, which no decoder block has made. And a probe of random features learns something of which
captions belong to which pictures, where things repeat: what counts is more than it learns of random answers to the same
pairs (Hewitt and Liang 2019), and more than the first block has, in which picture and caption have met once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.core.estimate import Estimate, values
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.geometry.information_imbalance import imbalance_gain
from lightning_mm.geometry.knn_overlap import overlap_gain
from lightning_mm.layer_selection.forward_criteria import (
    MEETING_PLACES,
    Material,
    Pair,
    by_heart,
    entailment,
    foretelling,
    meeting,
)

LEVEL = 0.01
"""False discovery rate of the tests over layers."""


@dataclass(frozen=True)
class Evidence:
    """The verdict, in a sentence too."""

    found: bool
    reason: str


@dataclass(frozen=True)
class Claim:
    """What would be evidence: a measure of every slice that beats chance, and beats its rival too.

    Args:
        name: As a person would say it.
        profile: Per slice, with what chance gives.
        gain: Per slice, how far it is above the rival; undefined where there is none.
    """

    name: str
    profile: list[Estimate]
    gain: list[Estimate]


def weigh(reading: HiddenStates, probe_set: ProbeSet, device: torch.device) -> Evidence:
    """Test every layer against chance and against its rival: the embeddings, or random answers."""
    material = Material(reading, probe_set, device, lambda row: True)
    claims = [*_meetings(material), *_foretellings(material), *_entailments(material)]
    found = [told for claim in claims if (told := _beyond_chance(claim))]
    if found:
        return Evidence(True, "; ".join(found))
    tested = ", ".join(claim.name for claim in claims) or "nothing that could be tested"
    return Evidence(False, f"no layer is beyond chance and beyond the embeddings ({tested})")


def _meetings(material: Material) -> Iterator[Claim]:
    """Neighbours that picture and caption share, beyond those that the better of the embeddings' sites has."""
    pairs = {site: pair for site in MEETING_PLACES if (pair := Pair.at(material, site)) is not None}
    profiles = {site: meeting(material, site) for site in pairs}
    rivals = {site: profile[0].value for site, profile in profiles.items() if profile[0].value is not None}
    for site, pair in pairs.items():
        same = [s for s in rivals if torch.equal(pairs[s].groups, pair.groups)] or [site]
        rival = pairs[max(same, key=lambda s: rivals.get(s, 0.0))].neighbors
        gain = overlap_gain(*pair.neighbors, rival, pair.near, pair.groups)
        yield Claim(f"overlap of picture and caption ({site})", profiles[site], gain)


def _foretellings(material: Material) -> Iterator[Claim]:
    """How much better one foretells the other than its embeddings do."""
    pair = Pair.at(material, "image~text")
    if pair is None:
        return
    there, back = foretelling(material, "image~text")
    a, b, groups = pair.pictures, pair.captions, pair.groups
    yield Claim("how well pictures foretell captions", there, imbalance_gain(a, b, groups))
    yield Claim("how well captions foretell pictures", back, imbalance_gain(b, a, groups))


def _entailments(material: Material) -> Iterator[Claim]:
    """How much better a probe answers than one that learns by heart, and than one after the first block."""
    profile = entailment(material)
    if not profile:
        return
    first = values(profile[1:2])
    floors = [max([rival, *first]) for rival in by_heart(material)]
    yield Claim("entailment probe", profile, [_above(e, floor) for e, floor in zip(profile, floors, strict=True)])


def _above(e: Estimate, floor: float) -> Estimate:
    if e.value is None or e.low is None or e.high is None:
        return e
    return Estimate.of(e.value - floor, e.n, low=e.low - floor, high=e.high - floor, null=0.0)


def _beyond_chance(claim: Claim) -> str:
    """What was found, or nothing."""
    tests = [(_chance(e), _chance(gain)) for e, gain in zip(claim.profile[1:], claim.gain[1:], strict=True)]
    # Both must be beaten; where there is no rival, chance alone.
    chances = [None if p is None else max(p, rival or 0.0) for p, rival in tests]
    defined = [(p, layer) for layer, p in enumerate(chances) if p is not None]
    passed = {layer for rank, (p, layer) in enumerate(sorted(defined), 1) if p <= LEVEL * rank / len(defined)}
    if not passed:
        return ""
    best = max(passed, key=lambda layer: claim.profile[layer + 1].value or 0.0)
    e, gain = claim.profile[best + 1], claim.gain[best + 1]
    assert e.value is not None
    assert e.null is not None
    beyond = "" if gain.value is None else f" and {gain.value:.2f} above its rival"
    return f"{claim.name} is {e.value:.2f} at layer {best} where chance gives {e.null:.2f}{beyond} (n = {e.n})"


def _chance(e: Estimate) -> float | None:
    """Probability of such a value by chance; None where there is no value."""
    if e.value is None or e.low is None or e.high is None or e.null is None:
        return None
    error = (e.high - e.low) / 2 / 1.96
    if e.null_high is not None:
        error = math.hypot(error, (e.null_high - e.null) / 1.96)
    if error <= 0:
        return 0.0 if e.value > e.null else 1.0
    return 0.5 * math.erfc((e.value - e.null) / error / math.sqrt(2))
