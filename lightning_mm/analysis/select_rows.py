"""The vectors of a reading that an analysis asks for, with the labels and the pictures they belong to.

Data flow: ``Reading`` + ``ProbeSet`` -> ``Selected`` features of one place, or of two places picture by picture.

Shapes: T slices, N vectors, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mm.analysis.hidden_states import Reading
from lightning_mm.data.probe_sets.probe_set import ProbeRow, ProbeSet


@dataclass(frozen=True, eq=False)
class Selected:
    """Vectors of one place.

    Args:
        features: (T, N, D).
        rows: The probe row of each.
        objects: Which of the row's objects each stands for.
        groups: (N,) a number for what each shares with those that depend on it: its picture, or its file's group.
    """

    features: Tensor
    rows: tuple[ProbeRow, ...]
    objects: tuple[int, ...]
    groups: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> "Selected":
        return Selected(self.features.to(device), self.rows, self.objects, self.groups.to(device))


Keep = Callable[[ProbeRow], bool]


def _every(row: ProbeRow) -> bool:
    return True


def select(reading: Reading, probe_set: ProbeSet, place: str, keep: Keep = _every) -> Selected | None:
    """The vectors of a place whose rows are wanted; None where there are none."""
    if place not in reading.features:
        return None
    by_id = {row.id: row for row in probe_set.rows}
    chosen = [i for i, (row_id, _) in enumerate(reading.addresses[place]) if keep(by_id[row_id])]
    if not chosen:
        return None
    addresses = [reading.addresses[place][i] for i in chosen]
    rows = tuple(by_id[row_id] for row_id, _ in addresses)
    numbers = {group: number for number, group in enumerate(sorted({row.group for row in probe_set.rows}))}
    groups = torch.tensor([numbers[row.group] for row in rows])
    return Selected(reading.features[place][:, chosen], rows, tuple(number for _, number in addresses), groups)


def paired(
    reading: Reading, probe_set: ProbeSet, one: str, other: str, keep: Keep = _every
) -> tuple[Selected, Selected] | None:
    """Two places, one vector of each per picture that has both, in the same order; None where no picture has both."""
    a, b = select(reading, probe_set, one, keep), select(reading, probe_set, other, keep)
    if a is None or b is None:
        return None
    first_a, first_b = _first(a), _first(b)
    common = sorted(first_a.keys() & first_b.keys())
    if not common:
        return None
    return _taken(a, [first_a[picture] for picture in common]), _taken(b, [first_b[picture] for picture in common])


def _first(selected: Selected) -> dict[str, int]:
    return {row.subject: i for i, row in reversed(list(enumerate(selected.rows)))}


def _taken(selected: Selected, chosen: list[int]) -> Selected:
    return Selected(
        selected.features[:, chosen],
        tuple(selected.rows[i] for i in chosen),
        tuple(selected.objects[i] for i in chosen),
        selected.groups[chosen],
    )
