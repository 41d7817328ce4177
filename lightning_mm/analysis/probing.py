"""Probes of a reading: global meaning (does the caption belong to the picture?) and local (which objects, and where?).

Data flow: ``Reading`` + labels of the ``ProbeSet`` -> ``probes.protocol`` -> ``Findings``.
Both of 2402.17304's questions are asked of the last prompt token; objects also of the picture's tokens and of the
tokens of each object's own patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.analysis.findings import Findings
from lightning_mm.analysis.hidden_states import Reading
from lightning_mm.analysis.select_rows import Selected, select
from lightning_mm.core.errors import UserError
from lightning_mm.core.estimate import Estimate
from lightning_mm.data.probe_sets.probe_set import ProbeRow, ProbeSet
from lightning_mm.probes.probe import probe
from lightning_mm.probes.result import ProbeResult

PROBES = ("entailment/random", "entailment/hard", "objects", "object_at_patches", "position", "count")


@dataclass(frozen=True)
class ProbingOptions:
    """Which probes are trained, and what is measured beside their accuracy.

    Args:
        probes: Names; those that the probe set has no labels for are left out.
        selectivity: Accuracy minus that of the same probe on random labels of the same kind (Hewitt and Liang 2019):
            how much the layer knows, rather than the probe.
        compression: Description length against that of a uniform code (Voita and Titov 2020). Takes eleven fits.
        seed: Of the splits.
    """

    probes: Sequence[str] = PROBES
    selectivity: bool = False
    compression: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.probes:
            if name not in PROBES:
                raise UserError(f"There is no probe {name!r}.", f"There are {', '.join(PROBES)}.", "Name those.")


@dataclass(frozen=True)
class _Question:
    """One probe: its name, where its answer is looked for, and how its labels are written."""

    probe: str
    place: str
    kind: Literal["multinomial", "multilabel"]

    @property
    def site(self) -> str:
        return self.place.partition("/")[2]


_QUESTIONS = (
    _Question("entailment/random", "entailment/last", "multinomial"),
    _Question("entailment/hard", "entailment/last", "multinomial"),
    _Question("objects", "picture/last", "multilabel"),
    _Question("objects", "picture/image", "multilabel"),
    _Question("object_at_patches", "picture/object", "multinomial"),
    _Question("position", "picture/last", "multinomial"),
    _Question("count", "picture/last", "multinomial"),
)


def probing(
    reading: Reading, text_only: Reading | None, probe_set: ProbeSet, options: ProbingOptions, device: torch.device
) -> Findings:
    """All probes that the options name and the probe set has labels for.

    Args:
        reading: What to probe.
        text_only: The entailment rows without their pictures; None leaves that baseline out.
        probe_set: The rows and their labels.
        options: Which probes.
        device: Where to compute.
    """
    found = Findings(reading.step)
    for question in (question for question in _QUESTIONS if question.probe in options.probes):
        result = _ask(reading, probe_set, question, options, device)
        if result is None:
            if any(question.probe in row.labels for row in probe_set.rows):
                found.problems.append(f"{question.probe} at {question.site}: no row that has its labels was read there")
            continue
        found.add("probing", question.probe, question.site, _with_peak(result))
        if result.selectivity is not None:
            found.add("probing", f"{question.probe}/selectivity", question.site, result.selectivity)
        if result.compression is not None:
            found.add("probing", f"{question.probe}/compression", question.site, result.compression)
        if text_only is not None and question.place.startswith("entailment"):
            alone = _ask(text_only, probe_set, question, options, device)
            if alone is not None:
                found.add("probing", f"{question.probe}/text_only", question.site, alone.estimates)
    _contrast(found)
    return found


def _ask(
    reading: Reading, probe_set: ProbeSet, question: _Question, options: ProbingOptions, device: torch.device
) -> ProbeResult | None:
    """One probe of all slices; None where no row with labels for it was read."""
    selected = select(reading, probe_set, question.place, lambda row: question.probe in row.labels)
    if selected is None:
        return None
    labels = torch.tensor(
        [_label(question.probe, row, i) for row, i in zip(selected.rows, selected.objects, strict=True)]
    )
    labelled = _labelled(labels, selected)
    if labelled is None:
        return None
    labels, selected = labelled
    selected = selected.to(device)
    return probe(
        selected.features,
        labels.to(device),
        selected.groups,
        kind=question.kind,
        seed=options.seed,
        control=options.selectivity,
        types_N=_types(question.probe, probe_set, selected),
        compression=options.compression,
    )


def _with_peak(result: ProbeResult) -> list[Estimate]:
    """The scores, the highest one with a note of where else it might be."""
    estimates = list(result.estimates)
    if result.peak is not None:
        index, low, high = result.peak
        estimates[index] = estimates[index].noted(f"the peak is at layer {low - 1} to {high - 1} in 95 % of resamples")
    return estimates


def _types(name: str, probe_set: ProbeSet, selected: Selected) -> Tensor:
    """What has one label in the control task: a pair of true and shown caption, a kind of object, a picture."""
    true = {row.sample.images: row.span for row in probe_set.rows if row.labels.get("entailment/random") == 1}
    kinds: list[object] = []
    for row, number in zip(selected.rows, selected.objects, strict=True):
        if name.startswith("entailment"):
            kinds.append((true.get(row.sample.images, ""), row.span))
        else:
            kinds.append(row.boxes[number].name if name == "object_at_patches" else row.id)
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return torch.tensor([numbers[kind] for kind in kinds])


def _label(name: str, row: ProbeRow, number: int) -> int | tuple[int, ...]:
    label = row.labels[name]
    return label[number] if name == "object_at_patches" and isinstance(label, tuple) else label


def _labelled(labels: Tensor, selected: Selected) -> tuple[Tensor, Selected] | None:
    """Without the vectors of objects that belong to no class (-1)."""
    keep = (labels >= 0).reshape(len(labels), -1).all(1).nonzero().flatten()
    if not len(keep):
        return None
    chosen = keep.tolist()
    rows, objects = tuple(selected.rows[i] for i in chosen), tuple(selected.objects[i] for i in chosen)
    return labels[keep], Selected(selected.features[:, keep], rows, objects, selected.groups[keep])


def _contrast(found: Findings) -> None:
    """Global minus local: each as its share of the way from chance to certainty, layer by layer."""
    whole, parts = found.profile("entailment/random", "last"), found.profile("objects", "last")
    layers = sorted(whole.keys() & parts.keys())
    if not layers:
        return
    estimates: list[Estimate] = []
    for layer in layers:
        one, other = whole[layer], parts[layer]
        if one.value is None or other.value is None:
            estimates.append(
                Estimate.undefined_because(one.undefined or other.undefined, min(one.n or 0, other.n or 0))
            )
            continue
        difference, width = 0.0, 0.0
        for row, sign in ((one, 1), (other, -1)):
            chance = row.null if row.null is not None else 0.0
            difference += sign * ((row.value or 0.0) - chance) / max(1 - chance, 1e-9)
            if row.low is not None and row.high is not None:
                width += ((row.high - row.low) / 2 / max(1 - chance, 1e-9)) ** 2
        half = width**0.5
        n = min(one.n or 0, other.n or 0)
        estimates.append(Estimate.of(difference, n, low=difference - half, high=difference + half, null=0.0))
    found.add("probing", "global_minus_local", "last", estimates)
