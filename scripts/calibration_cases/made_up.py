"""Made-up hidden states with known dependence: of samples in groups, of neighboring layers, of pictures and captions.

Data flow: seed -> groups, clouds -> ``States``: ``HiddenStates`` and the ``ProbeSet`` that they seem to be read of.

Shapes: T slices, N samples, D features, G groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.data.probe_sets.probe_set import Label, ProbeRow, ProbeSet, Role
from lightning_mm.data.sample import Sample, Turn

WIDTH = 24
"""D."""

SHARED = 0.8
"""Share of the variance that the samples of a group have in common."""

ALIKE = 0.9
"""Correlation of neighboring layers."""

_SCALE_D = torch.arange(1, WIDTH + 1) ** -0.5
"""Standard deviations of the features: a spectrum that falls as those of hidden states do, if less steeply."""


@dataclass(frozen=True, eq=False)
class States:
    """What is measured.

    Args:
        states: The hidden states.
        probe_set: Their rows.
    """

    states: HiddenStates
    probe_set: ProbeSet


def groups_of(n: int, sizes: Sequence[int]) -> Tensor:
    """(N,) group ids: groups of these sizes in turn.

    Example:
        >>> groups_of(6, (1, 2)).tolist()
        [0, 1, 1, 2, 3, 3]
    """
    lengths = torch.tensor([sizes[i % len(sizes)] for i in range(n)])
    return torch.arange(n).repeat_interleave(lengths)[:n]


def cloud(groups_N: Tensor, layers: int, generator: torch.Generator) -> Tensor:
    """(T, N, D) Gaussian samples about a mean, alike in neighboring layers, with variance shared in groups."""
    num_groups = int(groups_N.max()) + 1
    share = SHARED if num_groups < len(groups_N) else 0.0
    common = smooth_noise((layers, num_groups, WIDTH), generator)[:, groups_N]
    own = smooth_noise((layers, len(groups_N), WIDTH), generator)
    return (share**0.5 * common + (1 - share) ** 0.5 * own + 1) * _SCALE_D


def smooth_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise whose first dimension is an autoregressive process (``ALIKE``)."""
    noise = torch.randn(shape, generator=generator)
    for layer in range(1, shape[0]):
        noise[layer] = ALIKE * noise[layer - 1] + (1 - ALIKE**2) ** 0.5 * noise[layer]
    return noise


def states_of(
    features: Mapping[str, Tensor],
    groups: Mapping[str, Tensor],
    labels: Mapping[str, Sequence[Mapping[str, Label]]],
    captions: Sequence[str] = (),
) -> States:
    """Hidden states at some positions.

    Args:
        features: Position (``role/site``) -> (T, N, D).
        groups: Role -> (N,) group ids.
        labels: Role -> the labels of each row.
        captions: Of entailment rows.
    """
    rows, index = [], {}
    for role, of_role in groups.items():
        ids = [f"{number:05}:{role}" for number in range(len(of_role))]
        spans = captions if role == "entailment" else [f"caption {number}" for number in range(len(of_role))]
        rows += [
            _row(row_id, f"group {group:05}", role, span, label)
            for row_id, group, span, label in zip(ids, of_role.tolist(), spans, labels[role], strict=True)
        ]
        for position in (name for name in features if name.partition("/")[0] == role):
            index[position] = tuple((row_id, 0) for row_id in ids)
    probe_set = ProbeSet(tuple(rows), {}, 0, "made up")
    return States(HiddenStates(0, dict(features), index, probe_set=probe_set), probe_set)


def _row(row_id: str, group: str, role: str, span: str, labels: Mapping[str, Label]) -> ProbeRow:
    kind: Role = role  # type: ignore[assignment]
    return ProbeRow(row_id, group, kind, Sample(row_id, (Turn("user", span),)), span, labels)
