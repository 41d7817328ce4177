"""One short fit through the command line, in this process, and what it left behind."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.__main__ import main
from tests.helpers.data import Data


@dataclass
class Fitted:
    """A fit that is over.

    Args:
        status: Its exit status.
        output: What it wrote to stdout and stderr.
        folder: The current folder of the command line.
    """

    status: int
    output: str
    folder: Path
    run: Path = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.folder / "runs/x"

    @property
    def error(self) -> str:
        """The message that ended it; empty if none did."""
        return self.output[self.output.index("error: ") :] if "error: " in self.output else ""

    @property
    def rows(self) -> list[dict[str, str]]:
        """metrics.csv."""
        return read_table(self.run / "metrics.csv")

    @property
    def decisions(self) -> str:
        """All automatic decisions, one a line."""
        return "\n".join(f"{d['name']}: {d['value']} ({d['reason']})" for d in self.read("decisions.json"))

    def read(self, name: str) -> Any:
        """A JSON file of the run."""
        return json.loads((self.run / name).read_text())

    def checkpoint(self, name: str = "last") -> dict[str, Any]:
        """A checkpoint in the run's folder."""
        loaded: dict[str, Any] = torch.load(self.run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        return loaded

    @property
    def step(self) -> int:
        """Optimizer steps in last.ckpt."""
        return int(self.checkpoint()["global_step"])


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


Fits = Callable[..., Fitted]
"""Runs ``fit`` with further options in an empty folder."""


def short_fits(
    model: Path, data: Data, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Fits:
    """Fits of two steps on the connector of a tiny model, which validate nothing and ask nothing.

    Args:
        model: The model's folder.
        data: train (12 rows) and val.
        folder: Becomes the current folder.
        capfd: What is written is read from it.
        monkeypatch: Undoes the change of folder.
    """
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LIGHTNING_MM_RUN", raising=False)
    common = {
        **{"model.backbone.path": model, "model.tuning": "ConnectorOnly", "model.optimizer.lr": "0.01"},
        **{"data.train": data["train"], "data.val": data["val"], "data.num_workers": 0, "data.batch_size": 2},
        **{"trainer.accelerator": "cpu", "trainer.max_steps": 2, "trainer.log_every_n_steps": 1},
        **{"trainer.limit_val_batches": 0, "evaluation.before": "false", "evaluation.after": "false"},
        **{"run.wandb": "off", "run.name": "x", "model.cache.mode": "off"},
    }

    def fit(*more: str, verb: str = "fit") -> Fitted:
        capfd.readouterr()
        status = main([verb, *(f"--{name}={value}" for name, value in common.items()), *more])
        written = capfd.readouterr()
        return Fitted(status, written.out + written.err, folder)

    return fit
