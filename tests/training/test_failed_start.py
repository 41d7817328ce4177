"""A start that fails leaves no folder; what fails once batches are worked on leaves its folder, with a report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

from lightning_mm import ConnectorOnly, MMDataModule, MMModule
from lightning_mm.training.callbacks.evaluation import HeldOutEvaluation
from lightning_mm.training.callbacks.run_recorder import RunRecorder
from tests.helpers.data import Data, Family

pytestmark = pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")
Fit = Callable[..., L.Trainer]


class Failing(Callback):
    """Fails at a hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._fail)

    def _fail(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("broken")


@pytest.fixture
def fit(family: Family, data: Data, tmp_path: Path) -> Fit:
    def run(*callbacks: Callback) -> L.Trainer:
        module = MMModule(str(family("llava")), ConnectorOnly())
        files = MMDataModule(train=str(data["train"]), batch_size=2, num_workers=0)
        quiet = [HeldOutEvaluation(False, False), RunRecorder(root=tmp_path / "runs", name="x")]
        trainer = L.Trainer(max_steps=1, accelerator="cpu", callbacks=[*callbacks, *quiet], default_root_dir=tmp_path)
        trainer.fit(module, datamodule=files)
        return trainer

    return run


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_a_failed_start_leaves_no_folder(hook: str, fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        fit(Failing(hook))
    assert not list((tmp_path / "runs").glob("*"))


def test_a_run_that_fails_later_keeps_its_folder(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        fit(Failing("on_before_backward"))
    assert (tmp_path / "runs/x/report.html").is_file()
    assert (tmp_path / "runs/x/census.json").is_file()
