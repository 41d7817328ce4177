"""What trackers get: the configuration as hyperparameters, accuracies by type, and the scores of every verb."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import wandb
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_mm import IntermediateOnly, MMDataModule, MMModule
from lightning_mm.__main__ import main
from lightning_mm.report.wandb import OnlineLogger
from tests.helpers.data import Data, Family
from tests.helpers.wandb_files import history, records

pytestmark = pytest.mark.filterwarnings(
    "ignore:Starting from v1.9.0, `tensorboardX`", "ignore:You are trying to `self.log"
)
MOMENTS = ("before", "after", "no_image", "majority")


class Tracker(Logger):
    """A logger of anyone's, which knows nothing of this package."""

    name, version = "tracker", "0"

    def __init__(self) -> None:
        super().__init__()
        self.params: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        self.params |= params if isinstance(params, dict) else vars(params)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_MM_RUN", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return tmp_path


def test_every_logger_gets_configuration_and_accuracies(family: Family, data: Data, here: Path) -> None:
    """Also one layer's number is text, as several are, so that runs can be grouped by it."""
    tracker, table, online = Tracker(), CSVLogger(here, "csv"), OnlineLogger(here / "w", mode="offline", project="mine")
    loggers: list[Logger] = [tracker, table, online]
    L.seed_everything(7, verbose=False)
    module = MMModule(family("llava"), IntermediateOnly("2"), lr=3e-4)
    files = MMDataModule(**{split: str(path) for split, path in data.items()}, batch_size=2, num_workers=0)
    trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=loggers, log_every_n_steps=1)
    trainer.fit(module, datamodule=files)
    online.close()
    wandb.teardown()

    (folder,) = (here / "runs").iterdir()
    settings = json.loads((folder / "hyperparameters.json").read_text())
    assert settings.items() <= tracker.params.items()
    expected = {
        **{"policy": "IntermediateOnly", "layers_trained": "2", "num_layers_trained": 1, "num_layers": 4, "seed": 7},
        **{"model.optimizer.lr": 3e-4, "model.class": "LlavaForConditionalGeneration", "data.batch_size": 2},
        **{"data.train": str(data["train"]), "trainer.max_steps": 2, "versions.torch": torch.__version__},
    }
    assert expected.items() <= settings.items()
    written = yaml.safe_load((Path(table.log_dir) / "hparams.yaml").read_text())
    assert settings.items() <= written.items()
    found = records(here / "w")
    config = {u.key: json.loads(u.value_json) for r in found if r.HasField("config") for u in r.config.update}
    assert (config["layers_trained"], config["model"]["optimizer"]["lr"], config["data"]["batch_size"]) == (
        "2",
        3e-4,
        2,
    )
    assert {r.run.project for r in found if r.HasField("run")} == {"mine"}

    evaluated = json.loads((folder / "evaluation.json").read_text())["rows"]
    assert len(evaluated) > 2
    logged = {key: float(value) for row in history(found) for key, value in row.items() if key.startswith("evaluation")}
    for row in evaluated:
        for moment in MOMENTS:
            key = f"evaluation/{moment}" + ("" if row["type"] == "all" else f"/{row['type']}")
            assert tracker.metrics[key] == logged[key] == pytest.approx(row[moment])
    assert "train/loss" in tracker.metrics


def test_verbs_that_score_are_tracked_too(
    family: Family, data: Data, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the project of the environment, or of --run.project, with the step of the checkpoint that was scored."""
    files = [part for split, path in data.items() for part in (f"--data.{split}", str(path))]
    model = ["--model.backbone.path", str(family("llava")), "--model.tuning", "ConnectorOnly", *files]
    brief = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--data.num_workers", "0"]
    brief += ["--evaluation.before", "false", "--evaluation.after", "false"]
    assert main(["fit", *model, *brief, "--run.wandb", "off", "--run.name", "scored"]) == 0
    monkeypatch.setenv("WANDB_PROJECT", "standing")
    checkpoint = "runs/scored/checkpoints/last.ckpt"
    for verb, project, keys in (
        ("validate", "standing", ("val/exact_match", "val/exact_match/")),
        ("test", "asked", ("test/no_image", "test/no_image/", "test/majority/")),
    ):
        asked = ["--run.project", project] if project == "asked" else []
        options = ["-c", "runs/scored/config.yaml", "--ckpt_path", checkpoint, "--run.name", verb, *asked]
        assert main([verb, *options, "--run.wandb", "offline"]) == 0
        wandb.teardown()
        found = records(here / "runs" / verb)
        assert {r.run.project for r in found if r.HasField("run")} == {project}
        config = {u.key: json.loads(u.value_json) for r in found if r.HasField("config") for u in r.config.update}
        assert config["checkpoint"] == {"step": 2}
        assert config["policy"] == "ConnectorOnly"
        logged = [key for row in history(found) for key in row]
        for key in keys:
            assert any(name.startswith(key) for name in logged), key
