"""Fixtures of the report's tests: a run that was looked into, and no login at W&B."""

import os

import pytest
import wandb

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.run_directory import RunDirectory
from tests.helpers.inspected_run import choose, look_into, rows_of, write_census


@pytest.fixture
def looked(tmp_path):
    """A run with a census that was looked into six times."""
    return look_into(write_census(RunDirectory.create(tmp_path, "looked")))


@pytest.fixture(name="choose")
def _choose():
    return choose


@pytest.fixture(name="look_into")
def _look_into():
    return look_into


@pytest.fixture(name="write_census")
def _write_census():
    return write_census


@pytest.fixture(name="rows_of")
def _rows_of():
    return rows_of


@pytest.fixture
def nobody_is_logged_in(monkeypatch, tmp_path):
    """No login, no setting of this machine, and no decision of another test."""
    for name in [name for name in os.environ if name.startswith("WANDB") or name == "NETRC"]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))
    decision_log().clear()
    wandb.teardown()  # W&B keeps the settings it read first
    yield
    wandb.teardown()
