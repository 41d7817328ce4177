"""Probes of hidden states for global semantics (does the caption fit the picture?) and local (which objects, where?).

Both questions of Tao et al. 2024, arXiv:2402.17304, are probed at the last prompt token; objects also at the mean of
the image tokens and at the tokens of each object's own patches.

Data flow: ``HiddenStates`` + labels of the ``ProbeSet`` -> ``probes.probe`` -> ``Findings``.

Shapes: T slices (embeddings and blocks), N vectors of one position.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.analysis.findings import Findings
from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.analysis.select_rows import SelectedRows, select_rows
from lightning_mm.core.errors import UserError
from lightning_mm.core.estimate import Estimate
from lightning_mm.core.layer_table import LayerRow
from lightning_mm.core.peak_note import peak_note
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
class _ProbeTask:
    """One probe: its name, the position it reads (``role/site``), and the kind of its labels."""

    name: str
    position: str
    kind: Literal["multinomial", "multilabel"]

    @property
    def site(self) -> str:
        return self.position.partition("/")[2]


_TASKS = (
    _ProbeTask("entailment/random", "entailment/last", "multinomial"),
    _ProbeTask("entailment/hard", "entailment/last", "multinomial"),
    _ProbeTask("objects", "picture/last", "multilabel"),
    _ProbeTask("objects", "picture/image", "multilabel"),
    _ProbeTask("object_at_patches", "picture/object", "multinomial"),
    _ProbeTask("position", "picture/last", "multinomial"),
    _ProbeTask("count", "picture/last", "multinomial"),
)


def run_probes(
    states: HiddenStates,
    text_only: HiddenStates | None,
    probe_set: ProbeSet,
    options: ProbingOptions,
    device: torch.device,
) -> Findings:
    """All probes that the options name and the probe set has labels for.

    Args:
        states: Hidden states of the probe set.
        text_only: Those of the entailment rows without their pictures; None leaves that baseline out.
        probe_set: The rows and their labels.
        options: Which probes.
        device: Where to compute.
    """
    found = Findings(states.step)
    for task in (task for task in _TASKS if task.name in options.probes):
        result = _probe(states, probe_set, task, options, device)
        if result is None:
            if any(task.name in row.labels for row in probe_set.rows):
                found.problems.append(f"{task.name} at {task.site}: no row that has its labels was read there")
            continue
        found.add("probing", task.name, task.site, _note_peak(result))
        if result.selectivity is not None:
            found.add("probing", f"{task.name}/selectivity", task.site, result.selectivity)
        if result.compression is not None:
            found.add("probing", f"{task.name}/compression", task.site, result.compression)
        if text_only is not None and task.position.startswith("entailment"):
            baseline = _probe(text_only, probe_set, task, options, device)
            if baseline is not None:
                found.add("probing", f"{task.name}/text_only", task.site, baseline.estimates)
    _add_contrast(found)
    return found


def _probe(
    states: HiddenStates, probe_set: ProbeSet, task: _ProbeTask, options: ProbingOptions, device: torch.device
) -> ProbeResult | None:
    """One probe in every slice; None where no row with labels for it has the position."""
    selected = select_rows(states, probe_set, task.position, lambda row: task.name in row.labels)
    if selected is None:
        return None
    rows_and_objects = zip(selected.rows, selected.objects, strict=True)
    labels = torch.tensor([_label(task.name, row, number) for row, number in rows_and_objects])
    # Objects that belong to no class (-1) are left out.
    labeled = (labels >= 0).reshape(len(labels), -1).all(1).nonzero().flatten()
    if not len(labeled):
        return None
    labels, selected = labels[labeled], selected.at(labeled.tolist()).to(device)
    return probe(
        selected.features,
        labels.to(device),
        selected.groups,
        kind=task.kind,
        seed=options.seed,
        control=options.selectivity,
        types_N=_control_types(task.name, probe_set, selected),
        compression=options.compression,
    )


def _label(name: str, row: ProbeRow, number: int) -> int | tuple[int, ...]:
    label = row.labels[name]
    return label[number] if name == "object_at_patches" and isinstance(label, tuple) else label


def _control_types(name: str, probe_set: ProbeSet, selected: SelectedRows) -> Tensor:
    """(N,) ids of what has one label in the control task: a true and shown caption, a kind of object, a picture."""
    true = {row.sample.images: row.span for row in probe_set.rows if row.labels.get("entailment/random") == 1}
    types: list[object] = []
    for row, number in zip(selected.rows, selected.objects, strict=True):
        if name.startswith("entailment"):
            types.append((true.get(row.sample.images, ""), row.span))
        else:
            types.append(row.boxes[number].name if name == "object_at_patches" else row.id)
    ids = {each: number for number, each in enumerate(dict.fromkeys(types))}
    return torch.tensor([ids[each] for each in types])


def _note_peak(result: ProbeResult) -> list[Estimate]:
    """The main score; the highest one carries a note of the layers that the peak may be at."""
    estimates = list(result.estimates)
    if result.peak is not None:
        index, low, high = result.peak
        estimates[index] = estimates[index].noted(peak_note(low - 1, high - 1))
    return estimates


def _add_contrast(found: Findings) -> None:
    """Add ``global_minus_local``: entailment minus objects, each rescaled so that chance is 0 and the best value 1."""
    whole, parts = found.profile("entailment/random", "last"), found.profile("objects", "last")
    layers = sorted(whole.keys() & parts.keys())
    if layers:
        estimates = [_contrast(whole[layer], parts[layer], len(layers)) for layer in layers]
        found.add("probing", "global_minus_local", "last", estimates)


def _contrast(one: LayerRow, other: LayerRow, num_layers: int) -> Estimate:
    n = min(one.n or 0, other.n or 0)
    if one.value is None or other.value is None:
        return Estimate.undefined_because(one.undefined or other.undefined, n)
    difference, width = 0.0, 0.0
    for row, sign in ((one, 1), (other, -1)):
        chance = row.null if row.null is not None else 0.0
        difference += sign * ((row.value or 0.0) - chance) / max(1 - chance, 1e-9)
        if row.low is not None and row.high is not None:
            width += ((row.high - row.low) / 2 / max(1 - chance, 1e-9)) ** 2
    half = width**0.5
    # Two-sided, by the normal law whose 95 % interval this is; for the maximum over layers after Bonferroni.
    z = 1.96 * abs(difference) / half if half > 0 else math.inf
    p = min(1.0, num_layers * math.erfc(z / math.sqrt(2)))
    return Estimate.of(difference, n, low=difference - half, high=difference + half, null=0.0, p_adjusted=p)
