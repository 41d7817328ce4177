"""The training benchmark's own arithmetic, and that what it starts is a run of the product."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_mm.__main__ import main
from lightning_mm.data.datamodule import MMDataModule
from tests.helpers.data import Family

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from bench_rivals import arms, results, running, table  # noqa: E402
from bench_rivals.rows import write_rows  # noqa: E402
from bench_rivals.stopwatch import VARIABLE  # noqa: E402


def a_run(seconds: float, losses: list[float], ids: int = 1) -> dict[str, Any]:
    batches = [{"ids": ids, "targets": 2, "pixels": 3} for _ in losses]
    measured = {"seconds_per_step": seconds, "cpu_seconds_per_step": seconds, "peak_bytes": 2_000_000_000}
    return {
        **measured,
        "startup_seconds": 5.0,
        "startup_cpu_seconds": 4.0,
        "warm_up_seconds": 1.0,
        "steps": [],
        "losses": losses,
        "batches": batches,
    }


OURS = arms.Arm("ours", "ours", "ours", "8-15")
THEIRS = arms.Arm("theirs", "theirs", "trl", "8-15")
ALSO = arms.Arm("theirs.worker", "theirs", "trl", "8-15")


def test_results_are_medians_and_what_differs_is_named() -> None:
    runs = {
        "ours": [a_run(s, [2.0, 1.0]) for s in (1.0, 9.0, 2.0)],
        "theirs": [a_run(3.0, [2.0, 1.5], ids=7)] * 3,
        "theirs.worker": [a_run(4.0, [2.0, 1.0])] * 3,
    }
    told = results.compared([OURS, THEIRS, ALSO], runs)
    assert told["ours"]["seconds_per_step"] == {"median": 2.0, "all": [1.0, 9.0, 2.0]}
    assert told["theirs"]["batches_differ_in"] == ["ids"]
    assert told["theirs"]["largest_difference_of_loss"] == 0.5
    assert told["theirs.worker"]["batches_differ_in"] == []
    assert told["theirs.worker"]["largest_difference_of_loss"] == 0.0


def test_the_table_is_put_between_its_markers_and_shows_the_fastest_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "BASIS", "ours")
    runs = {"ours": [a_run(2.0, [1.0])], "theirs": [a_run(5.0, [1.0])], "theirs.worker": [a_run(3.0, [1.0])]}
    told = {
        **results.machine(),
        **{"rounds": 1, "steps": 1, "batch_size": 8, "precision": "32-true", "threads": 2},
        "arms": results.compared([OURS, THEIRS, ALSO], runs),
    }
    points = arms.growth({65: 112})
    grown = {"axes": results.grown(points, {point.conditions: [a_run(4.0, [1.0])] for point in points})}
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.write_table({"rivals": told, "growth": grown}, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n")
    assert text.endswith(f"{table.END}\nafter\n")
    assert "old" not in text
    assert "| theirs | 3.00 | 1.50 | 2.0 GB | 5.0 s |" in text
    assert "5.00" not in text
    assert (
        "layers 8/16/30: 0.500 / 0.500 / 0.500; image tokens 65: 0.500; batch 2/4/8: 2.000 / 1.000 / 0.500"
        in " ".join(text.split())
    )
    readme.write_text("no markers\n")
    with pytest.raises(SystemExit, match="has no lines"):
        table.write_table({"rivals": told, "growth": grown}, readme)


def test_arms_and_points_have_names_of_their_own() -> None:
    points = arms.growth({17: 56, 65: 112})
    keys = [arm.key for arm in (*arms.ARMS, *(point.arm for point in points))]
    assert len(set(keys)) == len(keys)
    assert arms.BASIS in keys
    same = {point.conditions for point in points if point.arm.key in ("growth.layers.8", "growth.batch.8")}
    assert len(same) == 1, "what two axes share is run once"


@pytest.fixture
def setting(family: Family, rows: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> running.Setting:
    data = tmp_path / "train.json"
    data.write_text(json.dumps(rows(tmp_path, 6)))
    places = {"model": family("llava"), "data": data, "rows": tmp_path / "rows.json", "work": tmp_path}
    return running.Setting(**places, rivals=Path("python"), batch_size=2, warm_up=1, timed=2)


def test_an_arm_of_ours_is_a_run_of_the_product(
    setting: running.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "measured.json"
    job = {"out": str(out), "launched": time.time(), "warm_up": 1, "timed": 2, "batches": True}
    monkeypatch.setenv(VARIABLE, json.dumps(job))
    monkeypatch.delenv("LIGHTNING_MM_RUN", raising=False)
    kept = next(arm for arm in arms.ARMS if arm.warm)
    assert main(running.ours(setting, replace(kept, train="1-2"), steps=3)[3:]) == 0
    told = json.loads(out.read_text())
    assert len(told["losses"]) == len(told["batches"]) == 3
    assert len(told["steps"]) == 2
    assert told["seconds_per_step"] > 0
    assert told["startup_seconds"] > 0
    assert told["peak_bytes"] > 0
    assert (tmp_path / "cache").is_dir()


def test_the_rivals_read_the_rows_of_the_products_batches(setting: running.Setting) -> None:
    assert write_rows(setting.model, setting.data, setting.rows) == 6
    read = json.loads(setting.rows.read_text())
    module = MMDataModule(train=str(setting.data), processor=str(setting.model), batch_size=2, num_workers=0)
    module.setup("fit")
    samples = [sample for batch in module.train_dataloader() for sample in batch.samples]
    for row, sample in zip(read, samples, strict=True):
        assert [m["content"] for m in row["messages"][1:]] == [turn.text for turn in sample.turns[1:]]
        assert row["images"] == [str(path) for path in sample.images]
        assert "<image>" not in row["messages"][0]["content"]
