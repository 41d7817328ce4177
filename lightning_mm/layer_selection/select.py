"""``layers: auto``: choose the blocks to train from the untuned model, with an interval, reasons and controls.

Data flow: hidden states of a probe set + gradients of a few training batches -> ``forward_criteria`` and
``gradient_criteria`` -> ``search_layer_range``, unless nothing is significant -> ``Selection``, which is printed, saved
with the run, and trained.

Shapes: L decoder blocks, R resamples.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.layer_selection.forward_criteria import FORWARD_CRITERIA, forward_criteria
from lightning_mm.layer_selection.gradient_criteria import GRADIENT_CRITERIA, GradientScores, gradient_criteria
from lightning_mm.layer_selection.layer_range_search import (
    Criterion,
    LayerRange,
    combine_criteria,
    reliability,
    search_layer_range,
)
from lightning_mm.layer_selection.significance import Significance, assess_significance
from lightning_mm.planning.flops import relative_decoder_cost
from lightning_mm.tuning.layers import LayerSpec, count_layers, describe_layers, resolve_layers
from lightning_mm.tuning.policy import TuningPolicy

FALLBACK = "25%-50%"
"""What trains where nothing is significant: the middle of LLaVA-7B (Palacios et al. 2026, arXiv:2606.03871)."""
FAMILIES = ("meaning", "shape", "gradients")
_AUTO = re.compile(r"auto(?::(\d+%?))?")


@dataclass(frozen=True)
class AutoRange:
    """How ``layers: auto`` chooses.

    Args:
        criteria: Reasons that count: overlap, imbalance, entailment (meaning), dimension, influence, angle (shape),
            rgn, snr, fisher (gradients).
        weights: Say of each family: meaning, shape, gradients.
        price: How much of the evidence one would give for the compute of a whole step; higher means fewer blocks.
        batches: Training batches for the gradient criteria, 2 or more.
        resamples: Halves of the pictures that the interval is drawn from, 2 or more.
        seed: Of the halves.
    """

    criteria: tuple[str, ...] = (*FORWARD_CRITERIA, *GRADIENT_CRITERIA)
    weights: dict[str, float] = field(default_factory=lambda: {"meaning": 1.0, "shape": 0.25, "gradients": 0.25})
    price: float = 0.25
    batches: int = 4
    resamples: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        _refuse_unknown("criterion", self.criteria, (*FORWARD_CRITERIA, *GRADIENT_CRITERIA))
        _refuse_unknown("family of criteria", self.weights, FAMILIES)
        if not self.criteria:
            raise UserError("auto.criteria is empty.", "Layers are chosen by something.", "Name a criterion.")
        least = {"batches": (self.batches, 2), "resamples": (self.resamples, 2), "price": (self.price, 0)}
        least |= {f"weights.{family}": (weight, 0) for family, weight in self.weights.items()}
        for name, (value, bound) in least.items():
            if not bound <= value < math.inf:
                raise UserError(f"auto.{name} is {value}.", f"It is {bound} or more.", f"Give auto.{name} {bound}.")


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen blocks and the reasons for them.

    Args:
        chosen: The range, with the interval of either end.
        score: (L,) combined score of each block.
        score_range: (2, L) its 95 % interval over resamples.
        criteria: What it was combined from.
        significance: Whether the model shows in which layers picture and language meet at all.
        controls: Layers of equal budget, by the name of the policy that trains them.
        why: The reasons, as sentences.
    """

    chosen: LayerRange
    score: Tensor
    score_range: Tensor
    criteria: tuple[Criterion, ...]
    significance: Significance
    controls: dict[str, str]
    why: tuple[str, ...]

    @property
    def expression(self) -> str:
        return describe_layers(self.chosen.layers)

    def to_dict(self) -> dict[str, Any]:
        """The selection as ``selection.json`` holds it."""
        return {
            "layers": list(self.chosen.layers),
            "expression": self.expression,
            "first_range": list(self.chosen.first_range),
            "last_range": list(self.chosen.last_range),
            "score": self.score.tolist(),
            "score_low": self.score_range[0].tolist(),
            "score_high": self.score_range[1].tolist(),
            "criteria": {c.name: c.scores.tolist() for c in self.criteria},
            "controls": self.controls,
            "evidence": self.significance.found,
            "why": list(self.why),
        }


def auto_layers_option(policy: TuningPolicy) -> str | None:
    """Name of the policy's option that says ``auto``; None where none does."""
    named = (name for name in ("layers", "budget") if _AUTO.fullmatch(str(getattr(policy, name, ""))))
    return next(named, None)


def with_layers(policy: TuningPolicy, layers: Sequence[int]) -> TuningPolicy:
    """The policy with these layers in place of ``auto``."""
    option = auto_layers_option(policy)
    assert option is not None
    spec: LayerSpec = describe_layers(layers).replace(" ", "")
    return replace(policy, **{option: spec})  # type: ignore[type-var]  # every policy is a dataclass


def select_layers(
    reading: HiddenStates,
    probe_set: ProbeSet,
    gradients: GradientScores | None,
    options: AutoRange,
    device: torch.device,
    spec: str = "auto",
    pilot: Sequence[Criterion] = (),
) -> Selection:
    """Choose the blocks to train.

    Args:
        reading: Hidden states of the untuned model.
        probe_set: Its rows.
        gradients: Of the untuned model; None leaves the gradient criteria out.
        options: Which criteria, and the weight of compute.
        device: Where to compute.
        spec: 'auto', or 'auto:25%' and 'auto:8' for an exact number of blocks.
        pilot: Criteria of a second checkpoint (drift, transplant gain), where there is one.

    Raises:
        UserError: No row was read, or none of the criteria can be computed.
    """
    num_layers = reading.num_slices - 1
    forward = tuple(name for name in options.criteria if name in FORWARD_CRITERIA)
    criteria = [*forward_criteria(reading, probe_set, forward, options.resamples, options.seed, device)]
    if gradients is not None:
        criteria += gradient_criteria(gradients, options.criteria, options.resamples)
    criteria += pilot
    if not criteria:
        raise UserError(
            "Layers cannot be chosen.",
            f"None of the criteria can be computed: {', '.join(options.criteria)}.",
            "Give probes with captions, or conversations for the gradient criteria; or name the layers.",
        )
    significance = assess_significance(reading, probe_set, device)
    score, resampled = combine_criteria(criteria, options.weights)
    match = _AUTO.fullmatch(spec)
    budget = count_layers(match[1], num_layers) if match and match[1] else None
    margin = round(0.05 * num_layers) if budget is None else min(round(0.05 * num_layers), (num_layers - budget) // 2)
    chosen = search_layer_range(score, resampled, options.price, budget, margin)
    if chosen is None:
        significance = Significance(False, _why_no_range(score, margin))
    if chosen is None or not significance.found:
        chosen = _fallback(num_layers, budget)
    controls = _controls(chosen, num_layers)
    ranges = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=resampled.dtype), dim=0)
    why = _why(chosen, criteria, significance, options, num_layers)
    return Selection(chosen, score, ranges, tuple(criteria), significance, controls, why)


def log_selection(selection: Selection) -> None:
    """Log the choice with its reasons, and its controls."""
    log_decision("model.tuning.layers", selection.expression, "; ".join(selection.why))
    log_decision("model.tuning.controls", selection.controls, "rivals of equal budget: hold every claim against them")


def _fallback(num_layers: int, budget: int | None) -> LayerRange:
    spec = FALLBACK if budget is None else f"middle:{budget}"
    layers = resolve_layers(spec, num_layers)
    return LayerRange(layers[0], layers[-1], (0, num_layers - 1), (0, num_layers - 1))


def _why_no_range(score: Tensor, margin: int) -> str:
    if bool(score.any()):
        return f"only the outermost {margin} blocks at either end, which are left as they are, score above average"
    return "no criterion has a profile that other pictures repeat"


def _controls(chosen: LayerRange, num_layers: int) -> dict[str, str]:
    count = len(chosen.layers)
    specs = {"EarlyLayers": "first", "LateLayers": "last", "UniformSparse": "uniform", "RandomLayers": "random"}
    return {name: describe_layers(resolve_layers(f"{kind}:{count}", num_layers)) for name, kind in specs.items()}


def _why(
    chosen: LayerRange, criteria: Sequence[Criterion], significance: Significance, options: AutoRange, num_layers: int
) -> tuple[str, ...]:
    if not significance.found:
        return (
            f"no evidence: {significance.reason}",
            f"the fall-back {describe_layers(chosen.layers)} rests on 2606.03871, not on this model",
        )
    peaks = ", ".join(f"{c.name} {int(c.scores.nan_to_num(-1e30).argmax())} ({reliability(c):.0%})" for c in criteria)
    cost = relative_decoder_cost(chosen.first, chosen.last, num_layers)
    return (
        significance.reason,
        f"peaks by criterion (and how repeatable its profile is): {peaks}",
        f"95 % range of the ends over {options.resamples} halves of the pictures: "
        f"{chosen.first_range[0]}-{chosen.first_range[1]} to {chosen.last_range[0]}-{chosen.last_range[1]}",
        f"a step costs {cost:.0%} of full tuning's in the decoder",
    )


def _refuse_unknown(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"There is no {what} {name!r}.", f"There are {', '.join(known)}.", "Name those.")
