"""The progress bar and metrics.csv, in real Lightning runs of a small linear model."""

import io
import logging
import re

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from lightning_mm.core.csv_logger import ResumableCSVLogger
from lightning_mm.report.tables.curves import read_curves
from lightning_mm.training.callbacks import progress
from lightning_mm.training.callbacks.progress import ProgressBar, describe

# lightning 2.6.6 calls an API of torch that torch 2.13 deprecates: not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Linear(pl.LightningModule):
    """Logs under our keys."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.late = False

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss)
        self.log("train/supervised_tokens_per_second", 640.0)
        if self.late and self.global_step >= 3:
            self.log("train/late", float(self.global_step))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/exact_match", 0.5)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def loader(size=24):
    return DataLoader(TensorDataset(torch.randn(size, 2)), batch_size=4)


def trainer(tmp_path, callbacks, logger=False, **options):
    plain = {"accelerator": "cpu", "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 2}
    return pl.Trainer(default_root_dir=tmp_path, callbacks=callbacks, logger=logger, **plain | options)


@pytest.fixture(autouse=True)
def _quiet_advice():
    # Lightning advises more workers; this loader needs none.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning.pytorch.trainer.connectors.data_connector._worker_check", lambda *a, **k: None)
        yield


def test_without_a_terminal_there_is_one_plain_line_per_interval(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lightning_mm")
    screen = io.StringIO()
    bar = ProgressBar(Console(file=screen))
    fit = trainer(tmp_path, [bar], max_epochs=2, accumulate_grad_batches=2)
    fit.fit(Linear(), loader(), loader(8))
    lines = [r.getMessage() for r in caplog.records if r.name == "lightning_mm"]
    assert [re.match(r"step (\d)/6  loss \d\.\d{4}  +640 tok/s  +0:00:\d\d left", line)[1] for line in lines] == list(
        "246"
    )
    assert screen.getvalue() == ""
    assert all(line.isprintable() for line in lines)
    assert "exact match  50.0 %" in lines[-1]
    fit.test(Linear(), loader(8), verbose=False)
    fit.validate(Linear(), loader(8), verbose=False)
    assert screen.getvalue() == ""


def test_on_a_terminal_one_bar_runs_to_the_end(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lightning_mm")
    screen = io.StringIO()
    bar = ProgressBar(Console(file=screen, force_terminal=True, width=100))
    fit = trainer(tmp_path, [bar], max_epochs=2)
    fit.fit(Linear(), loader(), loader(8))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "12/12" in shown
    assert "640 tok/s" in shown
    assert shown.count("\n") <= 2 * shown.count("\r") + 2  # redrawn in place, not scrolled
    assert not [r for r in caplog.records if r.name == "lightning_mm"]
    fit.test(Linear(), loader(8), verbose=False)
    assert "testing" in screen.getvalue()


def test_a_run_without_an_end_says_so(tmp_path, caplog):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 4

    caplog.set_level(logging.INFO, "lightning_mm")
    trainer(tmp_path, [ProgressBar(Console(file=io.StringIO())), Stop()], max_epochs=-1).fit(
        Linear(), loader(), loader(8)
    )
    lines = [r.getMessage() for r in caplog.records if r.name == "lightning_mm"]
    assert all("/?" in line and "? left" in line for line in lines)
    assert lines


def test_the_bar_is_closed_when_the_run_fails(tmp_path):
    class Failing(Linear):
        def training_step(self, batch, batch_idx):
            raise ValueError("broken")

    bar = ProgressBar(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(ValueError, match="broken"):
        trainer(tmp_path, [bar], max_epochs=1).fit(Failing(), loader(), loader(8))
    assert bar._bar is None


def test_lines_stand_under_each_other():
    lines = [describe({"train/loss": loss}, left) for loss, left in [(1.0, 5.0), (0.1234567, 3599.6), (2.0, None)]]
    lines.append(describe({}, 0.0))
    assert len({len(line) for line in lines}) == 1
    assert "1:00:00 left" in lines[1]


def test_metrics_are_appended_at_once_and_columns_may_come_late(tmp_path):
    path = tmp_path / "run" / "metrics.csv"
    model = Linear()
    model.late = True
    fit = trainer(tmp_path, [], ResumableCSVLogger(path, ["train/loss"]), max_epochs=1, enable_progress_bar=False)
    fit.fit(model, loader(), loader(8))
    curves = read_curves(path)
    assert [step for step, _ in curves["train/loss"]] == [1, 3, 5]
    assert curves["train/late"] == [(3, 3), (5, 5)]
    assert curves["val/exact_match"] == [(5, 0.5)]


def test_a_second_start_keeps_what_the_first_wrote(tmp_path):
    path = tmp_path / "metrics.csv"
    first = ResumableCSVLogger(path)
    for step in range(4):
        first.log_metrics({"train/loss": 1.0 + step}, step)
    path.write_text(path.read_text() + "4,,0.1")  # killed in the middle of a line
    second = ResumableCSVLogger(path)
    second.log_metrics({"train/loss": torch.tensor(9.0)}, 3)
    second.log_metrics({"val/loss": float("nan")}, 4)
    curves = read_curves(path)
    assert curves["train/loss"] == [(0, 1), (1, 2), (2, 3), (3, 9)]
    assert len(curves["val/loss"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_values_keep_the_precision_of_float32(tmp_path):
    value = torch.tensor(1 / 3)
    log = ResumableCSVLogger(tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": value}, 0)
    ((_, read),) = read_curves(tmp_path / "metrics.csv")["train/loss"]
    assert torch.tensor(read) == value  # nine digits determine a float32


def test_the_time_left_does_not_count_validation(monkeypatch):
    now = iter([0.0, 10.0, 500.0, 510.0])  # 10 s of training, 490 s of validation, 10 s of training
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    clock = progress._Clock()
    clock.pause()
    clock.resume()
    assert clock.left(done=4, remaining=8) == pytest.approx(40.0)
