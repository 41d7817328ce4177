"""Whether a layer's state tells which caption belongs to which picture, by a closed-form linear probe.

Data flow: entailment rows of ``SelectionInputs`` -> ``probes.ridge``, one group of pictures left out at a time ->
accuracy of every slice, and how far it is above that on a control task and after the first block.

Shapes: T slices, N rows, D hidden size.
"""

import math

import torch
from torch import Tensor

from lightning_mm.analysis.select_rows import SelectedRows, select_rows
from lightning_mm.core.estimate import Estimate
from lightning_mm.data.probe_sets.probe_set import ProbeRow
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.resampling import clustered_mean_interval
from lightning_mm.layer_selection.selection_inputs import SelectionInputs
from lightning_mm.probes.ridge import Ridge

_MIN_GROUPS = 10
_PENALTIES = (0.1, 1.0, 10.0, 100.0)
"""Ridge penalties over D, for features of variance 1."""

_CROSS_FITTED = math.sqrt(1 + 2 / math.pi)
"""Width of the interval of a cross-fitted accuracy over that with the probes held fixed, where there is no signal.

Each pair of groups contributes twice, once each way: right answers to two of n samples then correlate as the signs of
normal logits that share 1 / n of their variance, by (2 / pi) / n. With signal it is less, and the interval too wide.
"""

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


def entailment_gains(inputs: SelectionInputs, draws: int = 5, seed: int = 0) -> list[list[Estimate]]:
    """Accuracy above each rival, every slice: the same probe on a control task, and the probe after the first block.

    The control task gives a random answer to each pair of true and shown caption (Hewitt and Liang 2019,
    arXiv:1909.03368): what the probe learns of it, it has learned by heart. Where no pair repeats it is answered below
    chance, as a left-out answer is the rarer one among the rest; chance itself is another test. Both sides of a
    difference are estimates from the same pictures: its interval is that of the paired differences.

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
    by_heart = []
    for _ in range(draws):
        answers = (torch.randperm(len(types), generator=generator) % 2).tolist()
        random = torch.tensor([answers[types[pair]] for pair in pairs], device=labels.device)
        by_heart.append(_correct(chosen.features, random, chosen.groups)[0])
    correct_TN, problems = _correct(chosen.features, labels, chosen.groups)
    first_TN = correct_TN[1:2].expand_as(correct_TN)
    return [
        _means(correct_TN - rival_TN, chosen.groups, problems, null=0.0)
        for rival_TN in (torch.stack(by_heart).mean(0), first_TN)
    ]


def leave_group_out_accuracy(features: Tensor, labels: Tensor, groups: Tensor) -> list[Estimate]:
    """Accuracy of a ridge probe on groups that it was not fitted on, in closed form.

    The penalty that a group is judged by is the one that all other groups prefer. Mean and scale of the features are
    those of all rows, which have no labels to leak; a feature that varies by no more than rounding is left out.

    Args:
        features: (T, N, D).
        labels: (N,) 0 or 1.
        groups: (N,) ids of what is left out together.
    """
    correct_TN, problems = _correct(features, labels, groups)
    majority = max(float(labels.double().mean()), 1 - float(labels.double().mean()))
    return _means(correct_TN, groups, problems, null=majority)


def _correct(features: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, list[str]]:
    """(T, N) 1 where the probe of all other groups is right, and per slice why it is not defined; NaN there."""
    problems = list(Representations.of(features).problems)
    correct_TN = features.new_full(features.shape[:2], math.nan, dtype=torch.float64)
    if len(torch.unique(groups)) < _MIN_GROUPS or len(torch.unique(labels)) < 2:
        return correct_TN, [problem or "too few: groups or classes to leave one out" for problem in problems]
    sound = [layer for layer, problem in enumerate(problems) if not problem]
    if not sound:
        return correct_TN, problems
    mean_T1D = features.mean(1, keepdim=True)
    spread_T1D = features.std(1, keepdim=True)
    x_TND = (features - mean_T1D) / torch.where(spread_T1D > _ROUNDING * mean_T1D.abs(), spread_T1D, torch.inf)
    y_N1 = (labels.to(x_TND) * 2 - 1)[:, None]
    penalties = [strength * x_TND.shape[2] for strength in _PENALTIES]
    fitted = Ridge.fit(x_TND[sound], y_N1, penalties, groups_N=groups)
    correct_TN[sound] = ((y_N1 - fitted.loo_residuals)[..., 0] * y_N1[:, 0] > 0).double()
    return correct_TN, problems


def _means(terms_TN: Tensor, groups: Tensor, problems: list[str], null: float) -> list[Estimate]:
    """Means over the samples with intervals over groups, widened for what the probes are fitted on."""
    n, found = terms_TN.shape[1], []
    for problem, mean, low, high in zip(problems, *clustered_mean_interval(terms_TN, groups), strict=True):
        if problem or math.isnan(float(mean)):
            found.append(Estimate.undefined_because(problem or "the first block allows no probe", n))
            continue
        ends = [float(mean + _CROSS_FITTED * (end - mean)) for end in (low, high)]
        found.append(Estimate.of(float(mean), n, low=ends[0], high=ends[1], null=null))
    return found


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
