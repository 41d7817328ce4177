"""The vectors of hidden states that an analysis needs, with the labels and pictures they belong to.

Data flow: ``HiddenStates`` + ``ProbeSet`` -> ``SelectedRows`` of one position, or of two positions paired by picture.

Shapes: T slices (embeddings and blocks), N vectors, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.data.probe_sets.probe_set import ProbeRow, ProbeSet

RowFilter = Callable[[ProbeRow], bool]
"""Whether a row is used."""


@dataclass(frozen=True, eq=False)
class SelectedRows:
    """Vectors of one position.

    Args:
        features: (T, N, D).
        rows: The probe row of each vector.
        objects: Which of the row's objects each vector stands for.
        groups: (N,) int ids, equal for vectors that depend on one another: those of one picture, or of one group of the
            probe file.
    """

    features: Tensor
    rows: tuple[ProbeRow, ...]
    objects: tuple[int, ...]
    groups: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> "SelectedRows":
        """A copy with the features on a device."""
        return SelectedRows(self.features.to(device), self.rows, self.objects, self.groups.to(device))

    def at(self, chosen: Sequence[int]) -> "SelectedRows":
        """The vectors with these indices, in this order."""
        return SelectedRows(
            self.features[:, chosen],
            tuple(self.rows[i] for i in chosen),
            tuple(self.objects[i] for i in chosen),
            self.groups[chosen],
        )


def select_rows(
    states: HiddenStates, probe_set: ProbeSet, position: str, keep: RowFilter = lambda row: True
) -> SelectedRows | None:
    """The vectors of one position.

    Args:
        states: Hidden states of the probe set.
        probe_set: The rows and their labels.
        position: ``role/site``, such as ``picture/last``.
        keep: Whether a row is used; all are by default.

    Returns:
        None where no row has this position.
    """
    if position not in states.features:
        return None
    by_id = {row.id: row for row in probe_set.rows}
    chosen = [i for i, (row_id, _) in enumerate(states.sample_index[position]) if keep(by_id[row_id])]
    if not chosen:
        return None
    samples = [states.sample_index[position][i] for i in chosen]
    rows = tuple(by_id[row_id] for row_id, _ in samples)
    numbers = {group: number for number, group in enumerate(sorted({row.group for row in probe_set.rows}))}
    groups = torch.tensor([numbers[row.group] for row in rows])
    return SelectedRows(states.features[position][:, chosen], rows, tuple(number for _, number in samples), groups)


def select_pairs(
    states: HiddenStates,
    probe_set: ProbeSet,
    one: str,
    other: str,
    keep: RowFilter = lambda row: True,
) -> tuple[SelectedRows, SelectedRows] | None:
    """Two positions with one vector of each per picture, in the same order.

    Args:
        states: Hidden states of the probe set.
        probe_set: The rows and their labels.
        one: First position, ``role/site``.
        other: Second position.
        keep: Whether a row is used; all are by default.

    Returns:
        None where no picture has both positions.
    """
    a, b = select_rows(states, probe_set, one, keep), select_rows(states, probe_set, other, keep)
    if a is None or b is None:
        return None
    # The first vector of each picture.
    first_a, first_b = ({row.subject: i for i, row in reversed(list(enumerate(side.rows)))} for side in (a, b))
    common = sorted(first_a.keys() & first_b.keys())
    if not common:
        return None
    return a.at([first_a[picture] for picture in common]), b.at([first_b[picture] for picture in common])
