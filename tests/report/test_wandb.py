"""W&B as a guest: real offline runs are written and read back, and no fault of W&B reaches the run."""

import socket
import time

import pytest
import torch
import wandb
from PIL import Image

from lightning_mm.core.decisions import decision_log
from lightning_mm.report import wandb as wandb_logger
from lightning_mm.report.wandb import OnlineLogger
from tests.helpers.wandb_files import history, records, warnings_of

pytestmark = pytest.mark.usefixtures("nobody_is_logged_in")


def test_an_offline_run_holds_what_was_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "layers")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "1.png")
    logger = OnlineLogger(tmp_path, mode="offline", run_id="abcd1234", name="middle")
    logger.log_hyperparams({"policy": "Full", "model.optimizer.lr": 2e-4})
    for step, loss in [(0, 3.0), (10, 1.0), (20, 2.0)]:
        logger.log_metrics({"train/loss": loss, "val/exact_match/a.b": torch.tensor(step / 20)}, step)
    logger.summarise(census={"digest": "d1"}, decisions=[{"name": "a", "value": "b", "reason": "c"}])
    rows = [{"id": "1", "images": ["1.png"], "question": "q", "truth": "t", "after": "t", "correct_after": True}]
    logger.log_samples([*rows, {"id": "2", "images": ["gone.png"], "question": "q", "truth": "t"}])
    logger.close()
    wandb.teardown()  # waits for W&B's process, as the end of the interpreter does

    found = records(tmp_path)
    logged = [row for row in history(found) if "train/loss" in row]
    assert [float(row["train/loss"]) for row in logged] == [3.0, 1.0, 2.0]
    assert [float(row["val/exact_match/a.b"]) for row in logged] == [0.0, 0.5, 1.0]
    assert [int(row["trainer/global_step"]) for row in logged] == [0, 10, 20]
    metrics = {record.metric.name: record.metric.summary for record in found if record.HasField("metric")}
    assert metrics["train/loss"].min
    assert metrics["val/exact_match/a\\.b"].max
    (run,) = [record.run for record in found if record.HasField("run")]
    assert (run.run_id, run.display_name, run.project) == ("abcd1234", "middle", "layers")
    config = {u.key: u.value_json for record in found if record.HasField("config") for u in record.config.update}
    config |= {u.key: u.value_json for u in run.config.update}
    assert config["policy"] == '"Full"'
    assert "0.0002" in config["model"]
    assert any(key.startswith("samples") for row in history(found) for key in row)
    summary = "".join(str(record.summary) for record in found if record.HasField("summary"))
    assert "d1" in summary
    assert warnings_of(caplog) == []


def test_a_look_that_found_nothing_yet_leaves_it_on(tmp_path, caplog):
    logger = OnlineLogger(tmp_path, mode="offline")
    logger.log_layers([])
    assert logger.mode == "offline"
    assert warnings_of(caplog) == []
    logger.close()


def test_after_close_nothing_is_done(tmp_path, caplog):
    logger = OnlineLogger(tmp_path, mode="offline")
    logger.close()
    logger.log_metrics({"train/loss": 1.0}, 1)
    assert logger.experiment is None
    assert not (tmp_path / "wandb").exists()
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    "fault", [wandb.errors.CommError("down"), OSError("disk full"), KeyError(), RuntimeError("x\ny")]
)
def test_a_failing_start_is_one_warning_and_then_silence(tmp_path, caplog, monkeypatch, fault):
    def broken(*args, **kwargs):
        raise fault

    monkeypatch.setattr(wandb, "init", broken)
    logger = OnlineLogger(tmp_path, mode="offline")
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0}, step)
    logger.summarise(census={})
    logger.log_samples([{"id": "1"}])
    logger.close()
    (said,) = warnings_of(caplog)
    assert type(fault).__name__ in said
    assert "\n" not in said
    assert logger.mode == "off"


def test_a_fault_while_logging_is_one_warning_and_then_silence(tmp_path, caplog, monkeypatch):
    logger = OnlineLogger(tmp_path, mode="offline")
    logger.log_metrics({"train/loss": 3.0}, 0)
    calls = []

    def broken(*args, **kwargs):
        calls.append(args)
        raise ConnectionResetError("the service went away")

    run = logger.experiment
    monkeypatch.setattr(type(run), "log", broken)
    for step in range(1, 4):
        logger.log_metrics({"train/loss": 1.0}, step)
    logger.close()
    monkeypatch.undo()
    assert len(calls) == 1
    assert len(warnings_of(caplog)) == 1
    run.finish()


def test_a_broken_picture_costs_the_table_not_the_run(tmp_path, caplog):
    (tmp_path / "1.png").write_text("no picture")
    logger = OnlineLogger(tmp_path, mode="offline")
    logger.log_samples([{"id": "1", "images": ["1.png"], "question": "q", "truth": "t"}])
    logger.close()
    assert len(warnings_of(caplog)) <= 1


def test_without_a_login_auto_is_offline_and_says_why(tmp_path):
    assert OnlineLogger(tmp_path).mode == "offline"
    assert OnlineLogger(tmp_path, mode="online").mode == "offline"
    assert [(d.name, d.value) for d in decision_log()] == [("wandb.mode", "offline")]
    assert all("wandb login" in d.reason for d in decision_log())


@pytest.mark.parametrize("where", ["variable", "netrc", "NETRC", "settings"])
def test_with_a_login_auto_is_online(tmp_path, monkeypatch, where):
    key = "k" * 40
    if where == "variable":
        monkeypatch.setenv("WANDB_API_KEY", key)
    elif where == "settings":
        (tmp_path / "home" / "settings").write_text(f"[default]\napi_key = {key}\n")
    else:
        path = tmp_path / "home" / (".netrc" if where == "netrc" else "elsewhere")
        path.write_text(f"machine api.wandb.ai login user password {key}\n")
        path.chmod(0o600)
        if where == "NETRC":
            monkeypatch.setenv("NETRC", str(path))
    assert OnlineLogger(tmp_path).mode == "online"
    assert key not in "".join(map(str, decision_log()))


def test_a_login_elsewhere_is_none(tmp_path):
    (tmp_path / "home" / ".netrc").write_text("machine example.org login user password x\n")
    (tmp_path / "home" / "_netrc").write_text("not a netrc file {")
    assert OnlineLogger(tmp_path).mode == "offline"


@pytest.mark.parametrize(("value", "mode"), [("disabled", "off"), ("offline", "offline"), ("dryrun", "offline")])
def test_the_users_standing_setting_is_honoured(tmp_path, monkeypatch, value, mode):
    monkeypatch.setenv("WANDB_MODE", value)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert OnlineLogger(tmp_path).mode == mode
    assert any(value in d.reason for d in decision_log())


def test_without_wandb_it_is_off_and_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_logger, "find_spec", lambda name: None)
    logger = OnlineLogger(tmp_path)
    logger.log_metrics({"train/loss": 1.0}, 0)
    assert logger.mode == "off"
    assert [(d.name, d.value, d.reason) for d in decision_log()] == [
        ("wandb.mode", "off", "wandb is not installed (pip install wandb)")
    ]
    assert warnings_of(caplog) == []


def test_a_server_that_never_answers_costs_seconds(tmp_path, monkeypatch, caplog):
    """A real start against a socket that accepts and stays silent."""
    monkeypatch.setattr(wandb_logger, "_START_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        wandb.teardown()
        logger = OnlineLogger(tmp_path, mode="online", run_id="abcd1234")
        begun = time.monotonic()
        logger.log_metrics({"train/loss": 1.0}, 0)
    assert (
        time.monotonic() - begun < 30
    )  # W&B's own limit is 90 s; ours is 1 s here, the rest is slack for a busy machine
    assert logger.mode == "off"
    assert len(warnings_of(caplog)) == 1


def test_other_ranks_do_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_logger.rank_zero_only, "rank", 1)
    logger = OnlineLogger(tmp_path, mode="offline")
    logger.log_metrics({"train/loss": 1.0}, 0)
    logger.close()
    assert logger.experiment is None
    assert not (tmp_path / "wandb").exists()
