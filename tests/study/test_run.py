"""A whole study on a tiny model: killed in its middle and gone on with, it gives what an undisturbed one gives."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mm.core.errors import UserError
from lightning_mm.study.folder import Job, StudyFolder, read_layers, read_table
from lightning_mm.study.run import _held, run_study
from tests.helpers.cli import run_cli
from tests.helpers.data import Family
from tests.helpers.study import make_study

UNTIMED = ("seconds_per_step", "seconds_of_steps", "timed_steps", "measuring_seconds", "machine")


@pytest.fixture
def options(family: Family, tmp_path: Path) -> dict[str, Any]:
    return make_study(tmp_path / "data", family("llava"))


def result(folder: StudyFolder, arm: str, seed: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(folder.result(Job(arm, seed)).read_text())
    return found


def killed_in_the_middle(file: Path, out: Path) -> None:
    """Start a study and kill it, without a word, as soon as an arm has written its first checkpoint."""
    process = run_cli(["study", "-c", str(file), "--out", str(out), "--seeds", "0", "--only", "middle"], file.parent)
    mark = out / "work/seed0/middle/fit/checkpoints/last.ckpt"
    until = time.monotonic() + 200
    while not mark.is_file():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.timeout(900)
def test_a_study_that_is_killed_and_gone_on_with_gives_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(options))
    whole = run_study(options, tmp_path / "whole", seeds=[0])
    run_study(options, tmp_path / "whole", seeds=[1], only=["middle"])
    killed_in_the_middle(tmp_path / "mine.yaml", tmp_path / "killed")
    killed = StudyFolder(tmp_path / "killed")
    assert killed.is_complete(Job("stage1", 0))
    assert not killed.is_complete(Job("middle", 0))
    run_study(options, killed.path, seeds=[0], only=["middle"])

    for arm in ("stage1", "middle"):
        one, two = (result(folder, arm) for folder in (whole, killed))
        assert {k: v for k, v in one.items() if k not in UNTIMED} == {k: v for k, v in two.items() if k not in UNTIMED}
        for name in ("answers.csv.gz", "layers.csv.gz"):
            files = [folder.results(Job(arm, 0)) / name for folder in (whole, killed)]
            assert files[0].read_bytes() == files[1].read_bytes(), (arm, name)
    check_arms(whole)
    check_files(whole)
    began = time.monotonic()
    run_study(options, whole.path, seeds=[0])
    assert time.monotonic() - began < 5, "what is complete is not done again"


def check_arms(folder: StudyFolder) -> None:
    """Arms have trained what they say, from one model, on another order in each seed."""
    assert [result(folder, arm)["layers"] for arm in ("connector", "middle", "full")] == [[], [1], [0, 1, 2, 3]]
    middle, full = result(folder, "middle"), result(folder, "full")
    assert middle["equal_step"] is None
    assert 1 <= full["equal_step"] < 6
    assert full["equal_step"] == int(6 * middle["flops_per_step"] / full["flops_per_step"])
    assert middle["seconds_per_step"] > 0
    texts = {str(result(folder, arm)["text"]["end"]) for arm in ("connector", "middle", "full")}
    assert len(texts) == 3  # the connector alone leaves the text as it was
    assert result(folder, "connector")["text"] == result(folder, "stage1")["text"]
    assert set(full["text"]) == {"end", "equal_cost"}
    assert result(folder, "middle", 1)["text"] != middle["text"]
    assert result(folder, "middle", 1)["flops_per_step"] == middle["flops_per_step"]


def check_files(folder: StudyFolder) -> None:
    """Every question is answered in every way, layers are read where asked, and nothing large is left of arms."""
    asked = [row for row in read_table(folder.questions) if row["test"] == "test"]
    rows = list(read_table(folder.results(Job("full", 0)) / "answers.csv.gz"))
    for moment, shown in (("end", "own"), ("end", "other"), ("end", "gray"), ("equal_cost", "own")):
        told = [row for row in rows if (row["moment"], row["shown"], row["test"]) == (moment, shown, "test")]
        assert [row["question"] for row in told] == [row["question"] for row in asked]
    assert {row["exact"] for row in rows} <= {"0", "1"}
    layers = read_layers(folder.results(Job("middle", 0)) / "layers.csv.gz")
    drift = {row.layer: row.value for row in layers if row.measure == "drift_weights"}
    assert [layer for layer, value in drift.items() if value] == [1]
    assert {"overlap", "gap", "objects"} <= {row.measure for row in layers}
    assert not (folder.results(Job("full", 0)) / "layers.csv.gz").exists()
    assert not list(folder.work.glob("seed*/middle/fit*/checkpoints"))


def test_who_holds_an_arm_keeps_others_away(tmp_path: Path) -> None:
    folder, job = StudyFolder(tmp_path), Job("middle", 0)
    with _held(folder, job) as mine:
        assert mine
        code = (
            "import sys; from pathlib import Path; from lightning_mm.study.folder import *; "
            "from lightning_mm.study.run import _held\n"
            "with _held(StudyFolder(Path(sys.argv[1])), Job('middle', 0)) as mine: print(mine)"
        )
        other = subprocess.run(
            ["python", "-c", code, str(tmp_path)], env=os.environ, capture_output=True, text=True, check=True
        )
        assert other.stdout.strip() == "False"
    with _held(folder, job) as again:
        assert again


def test_a_fit_that_fails_is_told_with_its_log(options: dict[str, Any], tmp_path: Path) -> None:
    options["options"]["data.train"] = str(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="fit has failed") as failed:
        run_study(options, tmp_path / "out", seeds=[0])
    assert "nothing.json" in failed.value.why
    assert (tmp_path / "out/work/seed0/stage1/fit.log").is_file()
