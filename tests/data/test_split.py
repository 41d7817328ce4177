"""Which rows of a split are in use: limits of its sources, the same wherever they are asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_mm.core.decisions import decision_log
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.split import SplitOptions, open_split, rows_unchecked

Ids = Callable[..., list[str]]


@pytest.fixture
def ids(tmp_path: Path) -> Ids:
    """Ids of the rows in use of a file with 20 rows, of which row 3 cannot be used."""
    talk = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]
    rows = [{"id": str(n), "conversations": talk if n != 3 else []} for n in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(rows))

    def read(name: str = "train", seed: int = 0, checked: bool = True, **options: Any) -> list[str]:
        given = [{"path": str(tmp_path / "a.json"), **options}]
        reading = SplitOptions(cache=tmp_path / "cache", seed=seed)
        if not checked:
            return [sample.id for sample in rows_unchecked(name, given, reading)]
        return [sample.id for sample in open_split(name, given, reading, RejectedSamples(0.5)).samples]

    return read


USABLE = [str(n) for n in range(20) if n != 3]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_limit_draws_rows_with_the_seed(split: str, ids: Ids) -> None:
    drawn = ids(split, limit=8)
    assert len(set(drawn)) == 8
    assert drawn == sorted(drawn, key=int), "in the order of the file"
    assert drawn not in (USABLE[:8], USABLE[-8:])
    assert drawn == ids(split, limit=8) == ids(split, limit=8, checked=False)
    assert drawn != ids(split, limit=8, seed=1)
    assert ids(split, limit=19) == ids(split, limit=500) == ids(split) == USABLE


def test_first_rows_are_the_first_that_can_be_used(ids: Ids) -> None:
    assert ids(first=5) == ["0", "1", "2", "4", "5"]
    assert ids(first=500) == USABLE
    both = ids(first=6, limit=2)
    assert len(both) == 2
    assert set(both) < set(USABLE[:6])


def test_it_is_said(ids: Ids) -> None:
    decision_log().clear()
    ids("val", limit=2, weight=2.0)
    said = "\n".join(map(str, decision_log()))
    assert "data.val a: 2 of 20 rows" in said
    assert "limit 2, drawn with data.seed" in said
    assert "weight and repeats of a are not used" in said
