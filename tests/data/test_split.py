"""Which rows of a split are in use: limits of its sources, the same wherever they are asked for."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.split import SplitOptions, open_sources, open_split, rows_unchecked

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
            return [sample.id for sample in rows_unchecked(open_sources(name, given, reading), reading)]
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


def of_onevision(rows: list[str], strategy: str) -> list[str]:
    """Rows as LLaVA-OneVision takes them by a sampling strategy (``random`` shuffles before it takes the first)."""
    kind, _, given = strategy.partition(":")
    number = math.ceil(int(given[:-1]) * len(rows) / 100) if given.endswith("%") else int(given)
    return rows[-number:] if kind == "end" else rows[:number]


@pytest.mark.parametrize("number", ["1", "7", "19", "500", "10%", "33%", "50%", "100%", "1%"])
def test_rows_are_sampled_as_onevision_does(number: str, ids: Ids) -> None:
    for kind in ("first", "end"):
        assert ids(sampling=f"{kind}:{number}") == of_onevision(USABLE, f"{kind}:{number}")
    drawn = ids(sampling=f"random:{number}")
    assert len(set(drawn)) == len(of_onevision(USABLE, f"first:{number}"))
    assert set(drawn) <= set(USABLE)
    assert drawn == sorted(drawn, key=int) == ids("val", sampling=f"random:{number}")
    if len(drawn) in range(3, 15):
        assert drawn not in (USABLE[: len(drawn)], USABLE[-len(drawn) :], ids(sampling=f"random:{number}", seed=1))


@pytest.mark.parametrize("repeat_time", [0.3, 0.5, 0.99, 0.06, 1e-5])
def test_a_share_of_rows_is_the_first_as_in_internvl(repeat_time: float, ids: Ids) -> None:
    assert ids(sampling=f"first:{repeat_time}") == (USABLE[: int(len(USABLE) * repeat_time)] or USABLE[:1])


def test_sampling_goes_before_first_and_limit(ids: Ids) -> None:
    assert ids(sampling="all") == USABLE
    assert ids(sampling="end:6", first=2) == USABLE[-6:][:2]
    assert set(ids(sampling="end:6", limit=2)) < set(USABLE[-6:])
    for wrong in ("last:3", "first", "first:0", "first:-3", "random:x%", "first:1.5", "first:0%", 5):
        with pytest.raises(UserError, match="sampling is"):
            ids(sampling=wrong)


def test_captions_and_answers_that_are_left_out_are_said(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "caption": ["a cat", "one cat", "a pet"]},
        {"image": "a.png", "caption": ["a dog"]},
        {"image": "a.png", "question": "What?", "answers": ["cat", "dog", "dog"]},
        {"image": "a.png", "question": "What?", "answers": [{"answer": "cat"}, {"answer": "cat"}]},
        {"image": "a.png", "question": "What?", "answers": {"start": [1, 2], "text": ["cat", "a cat"]}},
        {"image": "a.png", "question": "What?", "answers": "cat"},
    ]
    for name, some in (("captions", rows[:2]), ("answers", rows[2:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
    decision_log().clear()
    given = [str(tmp_path / "captions.json"), str(tmp_path / "answers.json")]
    split = open_split("train", given, SplitOptions(cache=tmp_path / "cache"), RejectedSamples())
    assert [sample.turns[1].text for sample in split.samples] == ["a cat", "a dog", "dog", "cat", "cat", "cat"]
    said = "\n".join(map(str, decision_log()))
    assert "left out, since one is learned: 2 other texts of 'caption'" in said
    assert "left out, since one is learned: 2 other texts of 'answers'" in said
    assert [table.ignored for table in split.tables] == [
        {"other texts of 'caption'": 2},
        {"other texts of 'answers'": 2},
    ]


def test_it_is_said(ids: Ids) -> None:
    decision_log().clear()
    ids("val", limit=2, weight=2.0)
    said = "\n".join(map(str, decision_log()))
    assert "data.val a: 2 of 20 rows" in said
    assert "limit 2, drawn with data.seed" in said
    assert "weight and repeats of a are not used" in said


def _rank_of_two(rank: int, folder: str) -> None:
    """Reads what a rank sees of a cache and of files of its own, as on machines without a common disk."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    os.chdir(Path(folder) / str(rank))
    for scene in ("checks", "cache", "rows"):
        options = SplitOptions(cache="full" if scene == "cache" else "cache")
        try:
            samples = open_split("train", f"{scene}.json", options, RejectedSamples(0.5)).samples
            found = [sample.id for sample in samples]
        except UserError as error:
            found = [error.what]
        Path(f"{scene}.found").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_ranks_hold_the_same_rows_or_none(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]
    rows = [{"id": str(number), "conversations": talk, "image": "a.png"} for number in range(3)]
    late = {"id": "late", "conversations": talk, "image": "late.png"}
    folders = [tmp_path / "0", tmp_path / "1"]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        Image.new("RGB", (20, 20)).save(folder / "a.png")
        for scene, content in (("checks", [*rows, late]), ("cache", rows), ("rows", rows[rank:])):
            (folder / f"{scene}.json").write_text(json.dumps(content))
    (folders[1] / "full").write_text("a file where a folder should be")
    options = SplitOptions(cache=folders[1] / "cache")
    assert len(open_split("train", str(folders[1] / "checks.json"), options, RejectedSamples(0.5)).samples) == 3
    for folder in folders:  # rank 1 knows from before that it is missing
        Image.new("RGB", (20, 20)).save(folder / "late.png")
    mp.spawn(_rank_of_two, args=(str(tmp_path),), nprocs=2)
    names = ("checks", "cache", "rows")
    found = [[json.loads((folder / f"{name}.found").read_text()) for name in names] for folder in folders]
    assert found[0] == found[1]
    assert found[0] == [
        ["0", "1", "2", "late"],
        ["The table of cache.json cannot be written."],
        ["Rank 1 reads other rows of data.train than rank 0."],
    ]
