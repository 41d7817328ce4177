"""A step that is not finite: named with its rows and module, saved before, passed over if asked, and replayed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.training.callbacks import run_recorder
from lightning_mm.training.callbacks.checkpoints import LastCheckpoint
from lightning_mm.training.callbacks.run_recorder import RunRecorder
from lightning_mm.training.checkpoint_file import read_checkpoint
from lightning_mm.training.module import MMModule
from tests.helpers.data import Family
from tests.helpers.overflow import overflowing_model, rows_with_sign
from tests.helpers.training import DROPOUT, train

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*:UserWarning")


@pytest.fixture(scope="module")
def model(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return overflowing_model(family("gemma3"), tmp_path_factory.mktemp("overflow") / "model")


@pytest.fixture
def fit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MMModule]:
    """A fit with dropout on 12 rows, of which row 5 overflows, in batches of two; it has a folder, without a report."""
    monkeypatch.setattr(run_recorder, "write_report", lambda _: None)
    rows = rows_with_sign(tmp_path / "rows", 12, [5])
    decision_log().clear()

    def fitted(name: str, *callbacks: Callback, **options: Any) -> MMModule:
        kept = [*callbacks, LastCheckpoint(), RunRecorder(root=tmp_path / "runs", name=name)]
        given = {"max_steps": 5, "tuning": DROPOUT, "gradient_clip_val": 1.0, **options}
        return train(model, {"train": rows}, tmp_path, callbacks=kept, **given)[0]

    return fitted


class Each(Callback):
    """Keeps loss and weights after every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if len(self.losses) < trainer.global_step:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.weights.append({name: p.detach().clone() for name, p in pl_module.trainable.items()})


def equal(one: dict[str, Tensor], two: Any) -> bool:
    return all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize(("accumulate", "step", "place"), [(1, 2, "its batch"), (2, 1, "micro-batch 2 of 2")])
def test_it_stops_says_where_and_a_resume_comes_to_the_same(
    accumulate: int, step: int, place: str, fit: Callable[..., MMModule], tmp_path: Path
) -> None:
    """The whole run that passes over the step is the reference: the stopped and resumed one equals it bit for bit."""
    options = {"accumulate_grad_batches": accumulate, "max_steps": 3}
    whole = Each()
    expected = fit("whole", whole, skip_nonfinite=1, **options)
    with pytest.raises(UserError) as stopped:
        fit("stopped", **options)
    run = tmp_path / "runs/stopped"
    said = str(stopped.value)
    assert f"The loss of step {step} is not finite." in said
    assert f"In {place} the first is the output of model.language_model.embed_tokens (Gemma3" in said
    assert "rows train.json:1[5];" in said
    assert f"lightning-mm replay {run}/nonfinite/step-{step}.json" in said
    saved = read_checkpoint(run / "checkpoints/last.ckpt")
    assert saved["global_step"] == step - 1
    if step > 1:
        assert equal(saved["state_dict"], whole.weights[step - 2])

    with pytest.raises(UserError) as again:
        fit("again", ckpt_path=run / "checkpoints/last.ckpt", **options)
    assert (again.value.what, again.value.why.partition(";")[0]) == (
        stopped.value.what,
        stopped.value.why.partition(";")[0],
    )
    resumed = fit("passed", ckpt_path=tmp_path / "runs/again/checkpoints/last.ckpt", skip_nonfinite=1, **options)
    assert equal(dict(expected.trainable), resumed.trainable)
