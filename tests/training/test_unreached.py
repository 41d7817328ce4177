"""What no row reaches stays as it is, bit for bit, weight decay and momentum included; and the run says so."""

import json
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mm.core.decisions import DecisionLog
from lightning_mm.tuning import Full
from lightning_mm.tuning.optimizer import OptimizerSettings
from tests.helpers.data import Data, Family, make_rows
from tests.helpers.training import train

DECAYING = OptimizerSettings(lr=1e-2, weight_decay=0.5, schedule="constant", warmup=0)


class Connector(Callback):
    """Keeps which optimizer steps had a picture, and which of them moved the connector."""

    def __init__(self) -> None:
        self.pictures: list[bool] = []
        self.moved: list[bool] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.start = self.weights = self._read(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = self._read(pl_module)
        self.pictures.append(batch.has_images)
        self.moved.append(any(not torch.equal(now[name], weight) for name, weight in self.weights.items()))
        self.weights = now

    def _read(self, module: Any) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in module.trainable.items() if "projector" in name}


def text_only(data: Data, pictures: int) -> None:
    """Leave only the first ``pictures`` rows of the training data a picture."""
    rows = make_rows(data["train"].parent, 8)
    for row in rows[pictures:]:
        del row["image"]
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>\n", "")
    data["train"].write_text(json.dumps(rows))


@pytest.mark.parametrize(("pictures", "said"), [(0, "never got a gradient"), (4, "")])
def test_the_connector_moves_only_in_steps_with_a_picture(
    pictures: int, said: str, family: Family, data: Data, tmp_path: Any
) -> None:
    text_only(data, pictures)
    seen = Connector()
    with DecisionLog().opened() as log:
        train(
            family("llava"),
            data,
            tmp_path,
            tuning=Full(),
            optimizer=DECAYING,
            callbacks=[seen],
            batch_size=1,
            max_steps=8,
        )
    assert sum(seen.pictures) == pictures
    assert seen.moved == seen.pictures
    lines = [str(decision) for decision in log if decision.name == "model.tuning"]
    assert any("connector" in line and "no row" in line for line in lines) == (pictures == 0), lines
    assert any(said and said in line for line in lines) == bool(said), lines
