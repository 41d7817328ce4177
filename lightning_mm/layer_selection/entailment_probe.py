"""Whether a layer's state tells which caption belongs to which picture, by a closed-form linear probe.

Data flow: entailment rows of ``SelectionInputs`` -> ``probes.ridge``, one group of pictures left out at a time ->
accuracy of every slice, and of the same probe on a control task.

Shapes: T slices, N rows, D hidden size.
"""

import torch
from torch import Tensor

from lightning_mm.analysis.select_rows import SelectedRows, select_rows
from lightning_mm.core.estimate import Estimate, values
from lightning_mm.data.probe_sets.probe_set import ProbeRow
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.resampling import clustered_mean_interval
from lightning_mm.layer_selection.selection_inputs import SelectionInputs
from lightning_mm.probes.ridge import Ridge

_MIN_GROUPS = 10
_PENALTIES = (0.1, 1.0, 10.0, 100.0)
"""Ridge penalties over D, for features of variance 1."""

_ROUNDING = 1e-6
"""A feature that spreads by less than this share of its size is constant."""


def entailment_accuracy(inputs: SelectionInputs) -> list[Estimate]:
    """Accuracy of the probe on pictures that it was not fitted on, every slice; empty without entailment rows.

    The wrong captions differ by one noun where the probe set has such rows, else they are random ones.
    """
    labeled = _entailment_rows(inputs)
    if labeled is None:
        return []
    rows, labels = labeled
    return leave_group_out_accuracy(rows.features, labels, rows.groups)


def control_task_accuracy(inputs: SelectionInputs, draws: int = 5, seed: int = 0) -> list[float]:
    """Accuracy of the same probe on a control task, every slice (Hewitt and Liang 2019, arXiv:1909.03368).

    The control task gives a random answer to each pair of true and shown caption: what the probe learns of it, it has
    learned by heart.

    Args:
        inputs: What the probe is fitted on.
        draws: Random answers to average over.
        seed: Of the draws.
    """
    labeled = _entailment_rows(inputs)
    if labeled is None:
        return []
    chosen, labels = labeled
    true = {row.sample.images: row.span for row in inputs.probe_set.rows if row.labels.get("entailment/random") == 1}
    pairs = [(true.get(row.sample.images, ""), row.span) for row in chosen.rows]
    types = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    generator = torch.Generator().manual_seed(seed)
    accuracies = []
    for _ in range(draws):
        answers = (torch.randperm(len(types), generator=generator) % 2).tolist()
        random = torch.tensor([answers[types[pair]] for pair in pairs], device=labels.device)
        accuracies.append(values(leave_group_out_accuracy(chosen.features, random, chosen.groups)))
    return torch.tensor(accuracies).mean(0).tolist()


def leave_group_out_accuracy(features: Tensor, labels: Tensor, groups: Tensor) -> list[Estimate]:
    """Accuracy of a ridge probe on groups that it was not fitted on, in closed form.

    The penalty that a group is judged by is the one that all other groups prefer. Mean and scale of the features are
    those of all rows, which have no labels to leak; a feature that varies by no more than rounding is left out.

    Args:
        features: (T, N, D).
        labels: (N,) 0 or 1.
        groups: (N,) ids of what is left out together.
    """
    n, problems = len(labels), Representations.of(features).problems
    if len(torch.unique(groups)) < _MIN_GROUPS or len(torch.unique(labels)) < 2 or all(problems):
        return [
            Estimate.undefined_because(problem or "too few: groups or classes to leave one out", n)
            for problem in problems
        ]
    mean_T1D = features.mean(1, keepdim=True)
    spread_T1D = features.std(1, keepdim=True)
    x_TND = (features - mean_T1D) / torch.where(spread_T1D > _ROUNDING * mean_T1D.abs(), spread_T1D, torch.inf)
    sound = [layer for layer, problem in enumerate(problems) if not problem]
    y_N1 = (labels.to(x_TND) * 2 - 1)[:, None]
    penalties = [strength * x_TND.shape[2] for strength in _PENALTIES]
    fitted = Ridge.fit(x_TND[sound], y_N1, penalties, groups_N=groups)
    correct_TN = ((y_N1 - fitted.loo_residuals)[..., 0] * y_N1[:, 0] > 0).double()
    ends = zip(*clustered_mean_interval(correct_TN, groups), strict=True)
    majority = max(float(labels.double().mean()), 1 - float(labels.double().mean()))
    found = [Estimate.of(float(mean), n, low=float(low), high=float(high), null=majority) for mean, low, high in ends]
    by_layer = dict(zip(sound, found, strict=True))
    return [by_layer.get(layer) or Estimate.undefined_because(problem, n) for layer, problem in enumerate(problems)]


def _entailment_rows(inputs: SelectionInputs) -> tuple[SelectedRows, Tensor] | None:
    """Rows with an entailment label and their labels (N,), of hard negatives where there are any."""
    for name in ("entailment/hard", "entailment/random"):

        def wanted(row: ProbeRow, name: str = name) -> bool:
            return name in row.labels and inputs.keep(row)

        chosen = select_rows(inputs.reading, inputs.probe_set, "entailment/last", wanted)
        if chosen is not None:
            labels = torch.tensor([row.labels[name] for row in chosen.rows], device=inputs.device)
            return chosen.to(inputs.device), labels
    return None
