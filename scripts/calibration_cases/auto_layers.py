"""Cases of ``layers: auto``: hidden states of random residual networks, with meaning planted in some blocks or in none.

Pictures and captions are random vectors that agree in two numbers alone (how full, how long), which every layer keeps:
what a random network finds in common. Rows of entailment mix a picture and a caption. Planted is, in the outputs of
some blocks, a vector that a picture and its caption share, and a direction for true captions.

Data flow: seed -> a random network's outputs at every position -> ``layer_selection.select`` -> evidence and range.
"""

from functools import partial

import torch
from torch import Tensor

from calibration_cases.case import Case, Outcome, Reading
from calibration_cases.made_up import States, states_of
from lightning_mm.layer_selection.select import AutoRange, select_layers
from lightning_mm.layer_selection.significance import assess_significance

_WIDTH = 48
_RESTS_ON = (
    "layer_selection",
    "geometry",
    "probes/ridge.py",
    "analysis/select_rows.py",
    "planning/flops.py",
)
_NOISE = 0.7
"""Of the position: last tokens and means of one row are alike, not equal."""


def draw(seed: int, pictures: int, layers: int, first: int, last: int, strength: float) -> States:
    """Pictures, their captions, and two entailment rows of each, in groups of two pictures that trade captions.

    Args:
        seed: Of the network and of the pictures.
        pictures: Number of pictures.
        layers: Number of blocks.
        first: First block whose output is planted.
        last: Last one.
        strength: Of what is planted, in standard deviations of the features.
    """
    generator = torch.Generator().manual_seed(seed)
    shown, told = (torch.randn(pictures, _WIDTH, generator=generator) for _ in range(2))
    told[:, :2] = 0.5 * told[:, :2] + 0.75**0.5 * shown[:, :2]
    rows, truth = torch.arange(2 * pictures) // 2, torch.arange(2 * pictures) % 2
    captions = torch.where(truth == 1, rows, rows ^ 1)
    inputs = {
        "picture/last": shown,
        "picture/image": shown,
        "text/last": told,
        "text/text": told,
        "entailment/last": (shown[rows] + told[captions]) / 2**0.5,
    }
    meaning = torch.randn(pictures, _WIDTH, generator=generator)
    direction = torch.randn(_WIDTH, generator=generator)
    planted = dict.fromkeys(inputs, meaning) | {"entailment/last": (truth[:, None] * 2 - 1) * direction}
    weights_LDD = torch.randn(layers, _WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5
    features = {}
    for name, x_ND in inputs.items():
        noise_ND = torch.randn(x_ND.shape, generator=generator)
        out_TND = _network((1 - _NOISE**2) ** 0.5 * x_ND + _NOISE * noise_ND, weights_LDD)
        spread_T11 = out_TND.std(1, keepdim=True).mean(2, keepdim=True)
        inside_T11 = torch.zeros(layers + 1, 1, 1)
        inside_T11[first + 1 : last + 2] = strength
        features[name] = out_TND + inside_T11 * spread_T11 * planted[name]
    groups = torch.arange(pictures) // 2
    labels = {
        "picture": [{} for _ in range(pictures)],
        "text": [{} for _ in range(pictures)],
        "entailment": [{"entailment/random": int(each)} for each in truth],
    }
    by_role = {"picture": groups, "text": groups, "entailment": groups[rows]}
    return states_of(features, by_role, labels, [f"caption {int(each)}" for each in captions])


def _network(x_ND: Tensor, weights_LDD: Tensor) -> Tensor:
    """(T, N, D) the input and the outputs of residual blocks."""
    outputs = [x_ND]
    for weight_DD in weights_LDD:
        x_ND = x_ND + 0.4 * torch.tanh(torch.nn.functional.layer_norm(x_ND, x_ND.shape[-1:]) @ weight_DD)
        outputs.append(x_ND)
    return torch.stack(outputs)


def measure(drawn: States, first: int, last: int, strength: float) -> Outcome:
    """Whether there is evidence, which alone decides; where something is planted, how right the range is."""
    if not strength:
        found = assess_significance(drawn.states, drawn.probe_set, torch.device("cpu")).found
        return Outcome([Reading("evidence", found=found)])
    selection = select_layers(drawn.states, drawn.probe_set, None, AutoRange(), torch.device("cpu"))
    evidence = selection.significance.found
    chosen = selection.chosen
    readings = [
        Reading("evidence", found=evidence),
        Reading("the exact range", found=evidence and (chosen.first, chosen.last) == (first, last)),
        Reading("a range that holds it", found=evidence and chosen.first <= first and chosen.last >= last),
    ]
    ends = (("first", first, chosen.first, chosen.first_range), ("last", last, chosen.last, chosen.last_range))
    readings += [
        Reading(f"{name} block", float(at), float(low), float(high), truth=float(true))
        for name, true, at, (low, high) in ends
        if evidence
    ]
    return Outcome(readings)


def cases() -> list[Case]:
    """All of them."""
    made = []
    for pictures, layers in ((64, 12), (160, 12), (64, 31)):
        first, last = (5, 7) if layers == 12 else (12, 18)
        for strength in (0.0, 0.05, 0.1):
            kind = f"{layers} blocks/null" if not strength else f"{layers} blocks, {strength}/planted"
            said = f"{strength} of the spread in blocks {first} to {last}" if strength else "random weights"
            about = f"{pictures} pictures, {layers} blocks, {said}"
            drawn = partial(draw, pictures=pictures, layers=layers, first=first, last=last, strength=strength)
            how = partial(measure, first=first, last=last, strength=strength)
            made.append(Case(f"layers auto/{pictures}/{kind}", about, drawn, how, _RESTS_ON, is_small=not strength))
    return made
