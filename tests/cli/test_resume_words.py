"""``--ckpt_path last``, ``best`` and ``auto`` mean a checkpoint of the newest run of that name."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.cli.resume import find_checkpoint
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_json
from tests.helpers.cli import Fit, table


def run(root: Path, folder: str, created: str, *files: str) -> Path:
    checkpoints = root / folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    write_json(root / folder / "run.json", {"created": created})
    for file in files:
        (checkpoints / file).touch()
    return checkpoints


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run(tmp_path, "mid", "2026-01-01T10:00:00", "last.ckpt", "best.ckpt")
    run(tmp_path, "mid-2", "2026-01-02T10:00:00", "last.ckpt")
    run(tmp_path, "mid-3", "2026-01-03T10:00:00")
    run(tmp_path, "middle", "2026-01-04T10:00:00", "last.ckpt", "best.ckpt")
    run(tmp_path, "mid-late", "2026-01-05T10:00:00", "last.ckpt")
    return tmp_path


@pytest.mark.parametrize(
    ("word", "expected"),
    [("last", "mid-2/checkpoints/last"), ("auto", "mid-2/checkpoints/last"), ("best", "mid/checkpoints/best")],
)
def test_it_is_the_newest_run_of_the_name_that_has_one(word: str, expected: str, runs: Path) -> None:
    assert find_checkpoint(word, runs, "mid") == runs / f"{expected}.ckpt"


def test_none_is_a_new_run_for_auto_only(runs: Path) -> None:
    assert find_checkpoint("auto", runs, "other") is None
    assert find_checkpoint("auto", runs / "no folder", "mid") is None
    with pytest.raises(UserError, match=r"no last\.ckpt of a run named other"):
        find_checkpoint("last", runs, "other")
    with pytest.raises(UserError, match=r"There is no checkpoint lst.*\n?.*last"):
        find_checkpoint("lst", runs, "mid")


def test_paths_stay_paths(runs: Path) -> None:
    assert find_checkpoint(str(runs / "mid"), runs, "mid") == runs / "mid/checkpoints/last.ckpt"
    assert find_checkpoint("some.ckpt", runs, "mid") == Path("some.ckpt")


def test_auto_starts_and_then_goes_on(fit: Fit, tmp_path: Path) -> None:
    """The same command twice, as a job that a cluster starts again: new, then from where it was."""
    command = [
        "--run.name",
        "job",
        "--ckpt_path",
        "auto",
        "--evaluation.before",
        "false",
        "--evaluation.after",
        "false",
    ]
    assert fit(*command, "--trainer.max_steps", "2") == 0
    assert fit(*command, "--trainer.max_steps", "3") == 0
    assert sorted(os.listdir(tmp_path / "runs")) == ["job", "job-2"]
    assert torch.load(tmp_path / "runs/job-2/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    steps = [int(row["step"]) for row in table(tmp_path / "runs/job-2/metrics.csv") if row["train/loss"]]
    assert steps == [0, 1, 2]


def test_a_run_resumed_at_its_end_has_a_checkpoint(fit: Fit, tmp_path: Path) -> None:
    """It trains no step; one that goes on from it is, bit for bit, one that goes on from the run before it.

    In the middle of an epoch, with dropout and a schedule that does not depend on the length of the run.
    """
    command = ["--evaluation.before", "false", "--evaluation.after", "false", "--model.tuning", "LoRAOnMiddle"]
    command += ["--model.tuning.lora.dropout", "0.3", "--model.optimizer.schedule", "constant"]
    command += ["--model.optimizer.warmup", "0"]

    def run(name: str, steps: int, *more: str) -> dict[str, Any]:
        assert fit(*command, "--run.name", name, "--trainer.max_steps", str(steps), *more) == 0
        saved: dict[str, Any] = torch.load(tmp_path / f"runs/{name}/checkpoints/last.ckpt", weights_only=True)
        assert saved["global_step"] == steps
        return saved["state_dict"]

    def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
        return all(torch.equal(first[name], value) for name, value in second.items())

    ended = run("ended", 2)
    assert same(run("again", 2, "--ckpt_path", str(tmp_path / "runs/ended")), ended)
    expected = run("on", 4, "--ckpt_path", str(tmp_path / "runs/ended"))
    assert not same(expected, ended)
    assert same(run("on-from-again", 4, "--ckpt_path", str(tmp_path / "runs/again")), expected)
