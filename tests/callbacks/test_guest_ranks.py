"""Callbacks in runs of several processes that are not ours: training bit-identical, one rank writes, none waits."""

import json
from pathlib import Path

import torch

from tests.helpers.data import Family
from tests.helpers.guest_ranks import LOOPS, launch
from tests.helpers.inspection import rows_of


def test_ranks_train_bit_identically_and_one_writes(family: Family, tmp_path: Path) -> None:
    launch(tmp_path, family("llava"))
    for loop in LOOPS:
        for rank in (0, 1):
            alone, looks = (torch.load(tmp_path / f"{loop}-{kind}-{rank}.pt") for kind in ("alone", "looks"))
            assert looks[0] == alone[0], (loop, rank)
            assert len(alone[0]) >= 3
            assert looks[1].keys() == alone[1].keys()
            assert not [name for name, value in alone[1].items() if not torch.equal(value, looks[1][name])]
        assert [path.name for path in (tmp_path / f"{loop}-looks").iterdir()] == ["inspection"]
        folder = tmp_path / f"{loop}-looks" / "inspection"
        assert (folder / "report.html").is_file()
        assert {row.step for row in rows_of(folder)} == {0, 2}
        looked = json.loads((folder / "inspections.json").read_text())
        assert not [problem for look in looked for problem in look["problems"] if "failed" in problem]
        # Every row of both ranks' shares was read, each once.
        assert {row.n for row in rows_of(folder) if row.measure == "cka" and row.value is not None} == {25}
