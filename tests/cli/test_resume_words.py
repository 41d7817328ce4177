"""``--ckpt_path last``, ``best`` and ``auto`` mean a checkpoint of the newest run of that name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from lightning_mm.cli.resume import continue_metrics, find_checkpoint
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_json
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.training.callbacks.run_recorder import RunRecorder
from lightning_mm.training.unfinished import AfterStep
from tests.helpers.cli import Fit, table
from tests.helpers.data import Data


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


QUIET = ("--evaluation.before", "false", "--evaluation.after", "false")


def test_auto_starts_and_then_goes_on_in_its_folder(fit: Fit, tmp_path: Path) -> None:
    """The same command again and again, as a job that a cluster starts again; another name makes a copy."""
    command = ["--run.name", "job", "--ckpt_path", "auto", *QUIET]
    runs = tmp_path / "runs"
    for steps in (2, 3, 4):
        assert fit(*command, "--trainer.max_steps", str(steps)) == 0
        assert not list((runs / "job").rglob("*.tmp"))
        (runs / "job/checkpoints/.last.ckpt.7-ab.tmp").write_text("half of a file, by a killed run")
    assert os.listdir(runs) == ["job"]
    assert torch.load(runs / "job/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert trained_steps(runs / "job") == [0, 1, 2, 3]
    copy = ["--run.name", "copy", "--ckpt_path", str(runs / "job"), "--trainer.max_steps", "5", *QUIET]
    assert fit(*copy) == 0
    assert (trained_steps(runs / "job"), trained_steps(runs / "copy")) == ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert fit("-c", str(runs / "job/config.yaml"), "--ckpt_path", str(runs / "job/checkpoints/last.ckpt")) == 0
    assert sorted(os.listdir(runs)) == ["copy", "job"]


def test_a_run_killed_before_its_first_checkpoint_begins_anew_in_its_folder(fit: Fit, tmp_path: Path) -> None:
    command = ["--run.name", "job", "--ckpt_path", "auto", "--trainer.max_steps", "2", *QUIET]
    assert fit(*command) == 0
    job = tmp_path / "runs/job"
    rmtree(job / "checkpoints")
    (job / "report.html").unlink()
    (job / "left.txt").write_text("by the killed run")
    assert fit(*command) == 0
    assert os.listdir(tmp_path / "runs") == ["job"]
    assert trained_steps(job) == [0, 1]
    assert not (job / "left.txt").exists()
    rmtree(job / "checkpoints")
    assert fit(*command) == 0, "it came to its end without a checkpoint: what it has found stays"
    assert sorted(os.listdir(tmp_path / "runs")) == ["job", "job-2"]
    assert trained_steps(job) == [0, 1]


HOLD = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print(1, flush=True)
input()
"""


def test_a_folder_in_use_is_left_alone(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--run.name", "job", "--ckpt_path", "auto", *QUIET, "--trainer.max_steps"]
    assert fit(*command, "1") == 0
    job = tmp_path / "runs/job"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        assert fit(*command, "2") != 0
        assert "is in use" in capsys.readouterr().err
        (job / "checkpoints/last.ckpt").unlink()
        (job / "report.html").unlink()
        assert fit(*command, "2") == 0, "it may be at its first steps"
        other.communicate("\n")
    assert trained_steps(job) == [0]
    assert trained_steps(tmp_path / "runs/job-2") == [0, 1]


def trained_steps(run: Path) -> list[int]:
    return [int(row["step"]) for row in table(run / "metrics.csv") if row["train/loss"]]


@pytest.mark.parametrize(
    ("killed_in", "every"),
    [("on_train_batch_end", 3), ("on_validation_batch_end", 3), ("on_validation_batch_end", 2), ("on_train_end", 3)],
)
def test_a_killed_run_that_goes_on_leaves_what_an_uninterrupted_one_does(
    killed_in: str, every: int, fit: Fit, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed (what it wrote by then is all there is) in step 3, in its validation, in the second one, which
    is that of the last step, or in the evaluation at the end.
    """
    rows = json.loads(data["train"].read_text())
    rows[1]["conversations"][0]["value"] += " word" * 3000
    data["train"].write_text(json.dumps(rows))
    options = [
        "--trainer.max_steps",
        "4",
        "--run.save_every",
        "1",
        "--trainer.val_check_interval",
        str(every),
        *ONE_BAD_ROW,
    ]
    assert fit(*options, "--run.name", "whole") == 0
    runs, dead = tmp_path / "runs", tmp_path / "dead"
    hook = getattr(RunRecorder, killed_in)

    def kill(self: RunRecorder, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step >= 3 and not dead.exists():
            copytree(runs / "job", dead)
        hook(self, trainer, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RunRecorder, killed_in, kill)
        assert fit(*options, "--run.name", "job") == 0
    rmtree(runs / "job")
    dead.rename(runs / "job")
    assert fit(*options, "--run.name", "job", "--ckpt_path", "auto") == 0
    for file in ("generations.jsonl", "evaluation.json", "samples.json", "ledger.jsonl"):
        assert (runs / "job" / file).read_text() == (runs / "whole" / file).read_text(), file
    assert learned(runs / "job") == learned(runs / "whole")
    for name in ("last", "best"):
        first, second = (
            torch.load(runs / run / f"checkpoints/{name}.ckpt", weights_only=True) for run in ("job", "whole")
        )
        assert all(torch.equal(first["state_dict"][key], value) for key, value in second["state_dict"].items()), name
        assert score_of(first) == score_of(second), name


def score_of(checkpoint: dict[str, Any]) -> float | None:
    """The score of the last validation that the checkpoint knows of."""
    states = [state for name, state in checkpoint["callbacks"].items() if name.startswith("BestCheckpoint")]
    return None if states[0]["current_score"] is None else float(states[0]["current_score"])


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (AfterStep(), ["0 train", "0 val", "1 train", "1 val", "2 look"]),
        (AfterStep(validate=True), ["0 train", "0 val", "1 train", "2 look"]),
        (AfterStep(last=True), ["0 train", "0 val", "1 train", "1 val"]),
        (AfterStep(validate=True, last=True), ["0 train", "0 val", "1 train"]),
    ],
)
def test_what_comes_again_is_taken_back(left: AfterStep, kept: list[str], tmp_path: Path) -> None:
    """Of what a run has logged up to step 2: its validation, and the last look of a run that was to end there."""
    run = RunDirectory(tmp_path)
    columns = {"train": "train/loss", "val": "val/loss", "look": "inside/gap"}
    lines = ["step,train/loss,val/loss,inside/gap", "0,1.7,1.6,", "1,1.5,,", "1,,1.2,", "2,,,0.5", "2,1.1,,"]
    run.metrics.write_text("\n".join(lines) + "\n")
    continue_metrics(run, run, 2, left)
    rows = table(run.metrics)
    assert [f"{row['step']} {name}" for row in rows for name, column in columns.items() if row[column]] == kept


def test_a_value_of_null_is_written_and_read(fit: Fit, tmp_path: Path) -> None:
    """Left out, it would come back as its default: a validation every epoch, a gradient that is clipped."""
    nulls = ["--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "3", "--data.probes", "null"]
    assert fit(*nulls, "--trainer.gradient_clip_val", "null", "--run.name", "first", *QUIET) == 0
    first = tmp_path / "runs/first/config.yaml"
    assert fit("-c", str(first), "--run.name", "second") == 0
    written = [yaml.safe_load((tmp_path / f"runs/{name}/config.yaml").read_text()) for name in ("first", "second")]
    assert [each["run"].pop("name") for each in written] == ["first", "second"]
    assert written[0] == written[1]
    trainer = written[1]["trainer"]
    assert [trainer[name] for name in ("check_val_every_n_epoch", "gradient_clip_val")] == [None, None]


ONE_BAD_ROW = ("--data.max_length", "400", "--data.max_bad_fraction", "0.5", "--data.num_workers", "0")


def learned(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock has measured."""
    timed = ("seconds", "per_second", "wait", "memory", "mfu", "tokens", "cost")
    rows = [
        {k: v for k, v in row.items() if v and not any(t in k for t in timed)} for row in table(run / "metrics.csv")
    ]
    return [row for row in rows if row.keys() - {"step", "epoch"}]


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
