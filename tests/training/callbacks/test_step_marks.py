"""Marks along a fit: the seconds of every optimizer step, and a checkpoint of one of them."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_mm.core.errors import UserError
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.training.callbacks.step_marks import CheckpointAt, StepSeconds

# lightning 2.6.6 calls an API of torch that torch 2.13 deprecates: not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Counting(pl.LightningModule):
    """Its weight is the number of optimizer steps done."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        return -self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_timed_and_one_is_saved(accumulate: int, tmp_path: Path) -> None:
    marks = StepSeconds(), CheckpointAt(3, "third")
    for mark in marks:
        mark.run = RunDirectory(tmp_path)
    trainer = pl.Trainer(
        max_steps=5,
        accumulate_grad_batches=accumulate,
        callbacks=list(marks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Counting(), DataLoader(TensorDataset(torch.zeros(24, 1)), batch_size=1))
    seconds = json.loads((tmp_path / "step_seconds.json").read_text())
    assert len(seconds) == 4  # the first of five has no beginning
    assert all(each > 0 for each in seconds)
    saved = torch.load(tmp_path / "checkpoints/third.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert saved["state_dict"]["weight"].tolist() == [3.0]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name != "third.ckpt"]


def test_a_step_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="is 0"):
        CheckpointAt(0, "never")
