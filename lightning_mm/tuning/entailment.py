"""Whether a layer tells which caption belongs to which picture, by a probe in closed form.

Data flow: entailment rows of a ``Material`` -> ``probes.ridge``, one group of pictures left out at a time -> accuracy
of every slice, and that of the same probe on random answers.

Shapes: T slices, N rows, D hidden size.
"""

import torch
from torch import Tensor

from lightning_mm.analysis.places import Selected, select
from lightning_mm.data.probe_sets import ProbeRow
from lightning_mm.estimate import Estimate, finite, undefined, values
from lightning_mm.geometry.gram import Bank
from lightning_mm.geometry.resampling import mean_interval
from lightning_mm.probes.ridge import Ridge
from lightning_mm.tuning.material import Material

_MIN_GROUPS = 10
_PENALTIES = (0.1, 1.0, 10.0, 100.0)
"""Ridge penalties over D, for features of variance 1."""

_ROUNDING = 1e-6
"""A feature that spreads by less than this share of its size is constant."""


def entailment(material: Material) -> list[Estimate]:
    """Accuracy of a closed-form probe that was never shown the picture it is asked about, every slice.

    Of wrong captions that differ by one noun where there are such, else of random ones.
    """
    asked = _entailment_rows(material)
    if asked is None:
        return []
    chosen, labels = asked
    return leave_group_out_accuracy(chosen.features, labels, chosen.groups)


def by_heart(material: Material, draws: int = 5, seed: int = 0) -> list[float]:
    """Accuracy of the same probe on random answers, one for each pair of true and shown caption, every slice."""
    asked = _entailment_rows(material)
    if asked is None:
        return []
    chosen, labels = asked
    true = {row.sample.images: row.span for row in material.probe_set.rows if row.labels.get("entailment/random") == 1}
    pairs = [(true.get(row.sample.images, ""), row.span) for row in chosen.rows]
    types = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(draws):
        answers = (torch.randperm(len(types), generator=generator) % 2).tolist()
        random = torch.tensor([answers[types[pair]] for pair in pairs], device=labels.device)
        drawn.append(values(leave_group_out_accuracy(chosen.features, random, chosen.groups)))
    return torch.tensor(drawn).mean(0).tolist()


def leave_group_out_accuracy(features: Tensor, labels: Tensor, groups: Tensor) -> list[Estimate]:
    """Accuracy of a ridge probe on groups that it has not seen, in closed form.

    The penalty that a group is judged by is the one that all other groups prefer. Mean and scale of the features are
    those of all rows, which have no labels to tell; a feature that varies by no more than rounding has no say.

    Args:
        features: (T, N, D).
        labels: (N,) 0 or 1.
        groups: (N,) ids of what is left out together.
    """
    n, problems = len(labels), Bank.of(features).problems
    if len(torch.unique(groups)) < _MIN_GROUPS or len(torch.unique(labels)) < 2 or all(problems):
        return [undefined(problem or "too few: groups or classes to leave one out", n) for problem in problems]
    mean_T1D = features.mean(1, keepdim=True)
    spread_T1D = features.std(1, keepdim=True)
    x_TND = (features - mean_T1D) / torch.where(spread_T1D > _ROUNDING * mean_T1D.abs(), spread_T1D, torch.inf)
    sound = [layer for layer, problem in enumerate(problems) if not problem]
    y_N1 = (labels.to(x_TND) * 2 - 1)[:, None]
    penalties = [strength * x_TND.shape[2] for strength in _PENALTIES]
    fitted = Ridge.fit(x_TND[sound], y_N1, penalties, groups_N=groups)
    right_TN = ((y_N1 - fitted.left_out)[..., 0] * y_N1[:, 0] > 0).double()
    ends = zip(*mean_interval(right_TN, groups), strict=True)
    majority = max(float(labels.double().mean()), 1 - float(labels.double().mean()))
    found = [finite(float(mean), n, low=float(low), high=float(high), null=majority) for mean, low, high in ends]
    by_layer = dict(zip(sound, found, strict=True))
    return [by_layer.get(layer) or undefined(problem, n) for layer, problem in enumerate(problems)]


def _entailment_rows(material: Material) -> tuple[Selected, Tensor] | None:
    for name in ("entailment/hard", "entailment/random"):

        def wanted(row: ProbeRow, name: str = name) -> bool:
            return name in row.labels and material.keep(row)

        chosen = select(material.reading, material.probe_set, "entailment/last", wanted)
        if chosen is not None:
            labels = torch.tensor([row.labels[name] for row in chosen.rows], device=material.device)
            return chosen.to(material.device), labels
    return None
