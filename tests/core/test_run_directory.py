"""The run directory: distinct names, and faults before anything heavy."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.core.run_directory import RunDirectory


@pytest.fixture(autouse=True)
def _no_earlier_decisions():
    decision_log().clear()


def test_a_taken_name_gets_a_number_and_the_reason_is_said(tmp_path):
    made = [RunDirectory.create(tmp_path, "middle") for _ in range(3)]
    assert [run.name for run in made] == ["middle", "middle-2", "middle-3"]
    assert [(d.name, d.value) for d in decision_log()] == [("run.name", "middle-2"), ("run.name", "middle-3")]
    assert all("exists" in d.reason for d in decision_log())


def test_without_a_name_the_default_stands(tmp_path):
    assert RunDirectory.create(tmp_path / "deep" / "runs", default="intermediate-only").name == "intermediate-only"


def test_runs_that_start_together_share_nothing(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: RunDirectory.create(tmp_path, "same"), range(24)))
    assert len({run.path for run in made}) == 24
    assert len({run.id for run in made}) == 24


def test_processes_that_start_together_share_nothing(tmp_path):
    code = (
        "import sys; from lightning_mm.core.run_directory import RunDirectory\n"
        "for _ in range(50): print(RunDirectory.create(sys.argv[1], 'same').path)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [path for process in running for path in process.communicate()[0].split()]
    assert len(told) == len(set(told)) == 100


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "-x", ".hidden", "a b", "x" * 101, "a\n"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot name a run"):
        RunDirectory.create(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_root_that_is_a_file_is_the_users_fault(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunDirectory.create(tmp_path / "runs", "x")


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs a place that even root cannot write to: Linux's /proc"
)
def test_an_unwritable_root_is_the_users_fault():
    with pytest.raises(UserError, match="cannot be written"):
        RunDirectory.create("/proc", "x")


def test_a_resumed_run_keeps_its_id_and_a_foreign_folder_has_none(tmp_path):
    run = RunDirectory.create(tmp_path, "a")
    assert len(run.id) == 8
    assert RunDirectory.open(run.path).id == run.id
    (tmp_path / "foreign").mkdir()
    assert RunDirectory.open(tmp_path / "foreign").id == ""


def test_opening_nothing_names_the_neighbours(tmp_path):
    RunDirectory.create(tmp_path, "middle")
    with pytest.raises(UserError, match="middle"):
        RunDirectory.open(tmp_path / "midle")


def test_files_lie_where_the_contract_says(tmp_path):
    run = RunDirectory.create(tmp_path, "a")
    found = [run.config, run.census, run.decisions, run.metrics, run.ledger, run.samples, run.evaluation, run.report]
    names = "config.yaml census.json decisions.json metrics.csv ledger.jsonl samples.json evaluation.json report.html"
    assert [path.name for path in found] == names.split()
    assert {path.parent for path in [*found, run.pictures, run.checkpoints]} == {run.path}


def test_the_report_is_imported_without_torch_and_wandb():
    code = (
        "import sys, lightning_mm.report.html;"
        "print([m for m in ('torch', 'lightning', 'wandb', 'matplotlib', 'altair') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


def test_identity_is_plain_json(tmp_path):
    run = RunDirectory.create(tmp_path, "a")
    assert set(json.loads((run.path / "run.json").read_text())) == {"name", "id", "created", "begun", "kind"}
