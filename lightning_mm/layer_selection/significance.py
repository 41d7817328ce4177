"""Whether a model shows at all in which layers picture and language meet: without that, a choice of layers is a guess.

Data flow: hidden states -> estimates with their nulls -> tests of all layers (Benjamini-Hochberg) -> yes or no,
and why.

A measure must be above chance and above a baseline. A random network sorts pictures by how full they are and captions
by how long they are, so that the two agree a little without any meaning: the baseline is the agreement of the same
pictures' and captions' embeddings, which no decoder block has made. A probe of random features learns something of
which captions belong to which pictures, where things repeat: its baseline is its accuracy on a control task (Hewitt and
Liang 2019, arXiv:1909.03368), and after the first block, in which picture and caption have met once. It must be above
either; both are estimates as it is, from the same pictures, so that the differences are paired.

Shapes: profiles have one estimate per slice, embeddings first.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.core.estimate import Estimate
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.geometry.information_imbalance import imbalance_gain
from lightning_mm.geometry.knn_overlap import overlap_gain
from lightning_mm.layer_selection.entailment_probe import entailment_accuracy, entailment_gains
from lightning_mm.layer_selection.selection_inputs import (
    PAIRED_PLACES,
    ImageTextPair,
    SelectionInputs,
    imbalance_profiles,
    knn_overlap_profile,
)

FALSE_DISCOVERY_RATE = 0.01
"""Of the tests over layers."""


@dataclass(frozen=True)
class Significance:
    """Whether any layer is significant, and in which measure, as a sentence."""

    found: bool
    reason: str


@dataclass(frozen=True)
class SignificanceTest:
    """A measure of every slice, to be tested against chance and against a baseline.

    Args:
        name: As printed.
        profile: Per slice, with its null.
        gain: Per slice, how far it is above the baseline; undefined where there is none.
    """

    name: str
    profile: list[Estimate]
    gain: list[Estimate]

    def result(self) -> str:
        """The best layer that is significant, as a sentence; '' where none is."""
        tests = zip(self.profile[1:], self.gain[1:], strict=True)
        p_values = [(_p_value(estimate), _p_value(gain)) for estimate, gain in tests]
        # Both tests must be passed; where there is no baseline, the one against chance.
        largest = [None if p is None else max(p, p_gain or 0.0) for p, p_gain in p_values]
        defined = [(p, layer) for layer, p in enumerate(largest) if p is not None]
        ranked = enumerate(sorted(defined), 1)
        passed = {layer for rank, (p, layer) in ranked if p <= FALSE_DISCOVERY_RATE * rank / len(defined)}
        if not passed:
            return ""
        best = max(passed, key=lambda layer: self.profile[layer + 1].value or 0.0)
        e, gain = self.profile[best + 1], self.gain[best + 1]
        assert e.value is not None
        assert e.null is not None
        beyond = "" if gain.value is None else f" and {gain.value:.2f} above its rival"
        return f"{self.name} is {e.value:.2f} at layer {best} where chance gives {e.null:.2f}{beyond} (n = {e.n})"


def assess_significance(reading: HiddenStates, probe_set: ProbeSet, device: torch.device) -> Significance:
    """Test every layer against chance and against its baseline.

    Args:
        reading: Hidden states of the untuned model.
        probe_set: Its rows.
        device: Where to compute.
    """
    inputs = SelectionInputs(reading, probe_set, device, lambda row: True)
    tests = [*_overlap_tests(inputs), *_imbalance_tests(inputs), *_entailment_tests(inputs)]
    results = [result for test in tests if (result := test.result())]
    if results:
        return Significance(True, "; ".join(results))
    tested = ", ".join(test.name for test in tests) or "nothing that could be tested"
    return Significance(False, f"no layer is beyond chance and beyond the embeddings ({tested})")


def _overlap_tests(inputs: SelectionInputs) -> Iterator[SignificanceTest]:
    """Neighbors that picture and caption share, beyond those that the embeddings share at the better place."""
    pairs = {place: pair for place in PAIRED_PLACES if (pair := ImageTextPair.at(inputs, place)) is not None}
    profiles = {place: knn_overlap_profile(inputs, place) for place in pairs}
    baselines = {place: profile[0].value for place, profile in profiles.items() if profile[0].value is not None}
    for place, pair in pairs.items():
        same_samples = [p for p in baselines if torch.equal(pairs[p].groups, pair.groups)] or [place]
        baseline = pairs[max(same_samples, key=lambda p: baselines.get(p, 0.0))].neighbors
        gain = overlap_gain(*pair.neighbors, baseline, pair.num_neighbors, pair.groups)
        yield SignificanceTest(f"overlap of picture and caption ({place})", profiles[place], gain)


def _imbalance_tests(inputs: SelectionInputs) -> Iterator[SignificanceTest]:
    """How much better one predicts the other's neighbors than its embeddings do."""
    pair = ImageTextPair.at(inputs, "image~text")
    if pair is None:
        return
    forward, backward = imbalance_profiles(inputs, "image~text")
    a, b, groups = pair.pictures, pair.captions, pair.groups
    yield SignificanceTest("how well pictures foretell captions", forward, imbalance_gain(a, b, groups))
    yield SignificanceTest("how well captions foretell pictures", backward, imbalance_gain(b, a, groups))


def _entailment_tests(inputs: SelectionInputs) -> Iterator[SignificanceTest]:
    """How much better a probe answers than on a control task, and than after the first block."""
    profile, gains = entailment_accuracy(inputs), entailment_gains(inputs)
    if profile:
        gain = [max(rivals, key=lambda e: _p_value(e) or 0.0) for rivals in zip(*gains, strict=True)]
        yield SignificanceTest("entailment probe", profile, gain)


def _p_value(e: Estimate) -> float | None:
    """One-sided p-value of an estimate above its null, by its standard error; None where there is no value."""
    if e.value is None or e.low is None or e.high is None or e.null is None:
        return None
    error = (e.high - e.low) / 2 / 1.96
    if e.null_high is not None:
        error = math.hypot(error, (e.null_high - e.null) / 1.96)
    if error <= 0:
        return 0.0 if e.value > e.null else 1.0
    return 0.5 * math.erfc((e.value - e.null) / error / math.sqrt(2))
