"""Vectors by place: two places of one picture belong together, whatever group the picture is in."""

from pathlib import Path

import torch

from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.analysis.select_rows import select_pairs
from lightning_mm.data.probe_sets.probe_set import ProbeRow, ProbeSet, Role
from lightning_mm.data.sample import Sample, Turn


def probe_row(name: str, role: Role, group: str) -> ProbeRow:
    images = () if role == "text" else (Path(f"/{name}.png"),)
    return ProbeRow(f"{name}:{role}", group, role, Sample(name, (Turn("user", "A cat?"),), images), "cat", {})


def test_pictures_of_one_group_are_paired_each_with_its_own_caption() -> None:
    """Six frames of two clips, captions read in another order, the last of them not read."""
    names = [f"{clip}-{frame}" for clip in "ab" for frame in range(3)]
    roles: tuple[Role, Role] = ("picture", "text")
    rows = [probe_row(name, role, f"group {name[0]}") for role in roles for name in names]
    texts = names[-2::-1]
    reading = HiddenStates(
        0,
        {
            "picture/last": torch.arange(6.0).reshape(1, 6, 1),
            "text/last": torch.tensor([float(names.index(name)) for name in texts]).reshape(1, 5, 1),
        },
        {
            "picture/last": tuple((f"{name}:picture", 0) for name in names),
            "text/last": tuple((f"{name}:text", 0) for name in texts),
        },
    )
    found = select_pairs(reading, ProbeSet(tuple(rows), {}, 0, "t"), "picture/last", "text/last")
    assert found is not None
    pictures, captions = found
    assert [row.subject for row in pictures.rows] == [row.subject for row in captions.rows] == names[:-1]
    assert torch.equal(pictures.features, captions.features)
    assert torch.equal(pictures.groups, captions.groups)
    assert pictures.groups.tolist() == [0, 0, 0, 1, 1]
