"""A step that is not finite: named with its rows and module, saved before, passed over if asked, and replayed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mm.__main__ import main
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json
from lightning_mm.data.collator import Collator
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.data.written_rows import IMAGE_ROOT
from lightning_mm.training import nonfinite
from lightning_mm.training.callbacks import run_recorder
from lightning_mm.training.callbacks.checkpoints import LastCheckpoint
from lightning_mm.training.callbacks.run_recorder import RunRecorder
from lightning_mm.training.checkpoint_file import read_checkpoint
from lightning_mm.training.module import MMModule
from lightning_mm.verbs.replay import replay
from tests.helpers import nonfinite_ranks
from tests.helpers.data import Family, batch_of
from tests.helpers.overflow import SIGN, overflowing_model, rows_with_sign
from tests.helpers.training import DROPOUT, MIDDLE, BareModule, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*callbacks used to create the checkpoint.*:UserWarning", "ignore:You defined a `validation_step` but"
)


@pytest.fixture(scope="module")
def model(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return overflowing_model(family("gemma3"), tmp_path_factory.mktemp("overflow") / "model")


@pytest.fixture
def fit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MMModule]:
    """A fit with dropout on 12 rows, of which row 5 overflows, in batches of two; it has a folder, without a report."""
    monkeypatch.setattr(run_recorder, "write_report", lambda _: None)

    def fitted(name: str, *callbacks: Callback, bad: int = 5, **options: Any) -> MMModule:
        rows = rows_with_sign(tmp_path / "rows", 12, [bad])
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


def test_a_step_that_is_passed_over_changes_no_weight_and_is_said(fit: Callable[..., MMModule], tmp_path: Path) -> None:
    each = Each()
    fit("passed", each, skip_nonfinite=1)
    assert [math.isnan(loss) for loss in each.losses] == [False, True, False, False, False]
    assert [equal(*pair) for pair in zip(each.weights, each.weights[1:], strict=False)] == [True, False, False, False]
    decisions = read_json(tmp_path / "runs/passed/decisions.json")
    (said,) = (each for each in decisions if each["name"] == "model.skip_nonfinite")
    assert said["value"] == "step 2 is passed over, 1 of at most 1"
    assert said["reason"].startswith("its loss is not finite: in its batch the first is the output of model.")
    assert "rows train.json:1[5];" in said["reason"]
    assert read_checkpoint(tmp_path / "runs/passed/checkpoints/last.ckpt")["lightning_mm"]["skipped_steps"] == 1


def test_looking_for_the_source_draws_nothing(
    fit: Callable[..., MMModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps after one that is passed over draw their dropout as they do where nothing is looked for.

    Row 1 is in the first of two micro-batches, so that what is run again is not the whole step.
    """
    options = {"bad": 1, "accumulate_grad_batches": 2, "max_steps": 2, "skip_nonfinite": 1}
    looked, blind = Each(), Each()
    fit("looked", looked, **options)
    monkeypatch.setattr(nonfinite, "_examine", lambda *_: nonfinite.RankFindings())
    fit("blind", blind, **options)
    assert [math.isnan(loss) for loss in looked.losses] == [True, False]
    assert equal(looked.weights[-1], blind.weights[-1])


def test_one_step_more_than_allowed_stops_the_run(fit: Callable[..., MMModule], tmp_path: Path) -> None:
    """Twelve rows in batches of two: the second epoch comes to the row again."""
    with pytest.raises(UserError, match=r"1 steps were passed over before") as caught:
        fit("twice", skip_nonfinite=1, max_steps=20)
    step = int(caught.value.what.split()[4])
    assert 6 < step <= 12
    assert sorted(path.name for path in (tmp_path / "runs/twice/nonfinite").iterdir()) == [
        f"step-{number}.json" for number in sorted((2, step), key=str)
    ]


def test_the_rows_are_replayed_from_the_checkpoint(
    fit: Callable[..., MMModule], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mended, they have the loss that the module itself gives them. 1e-6: the order of the rows differs."""
    with pytest.raises(UserError):
        fit("stopped", tuning=MIDDLE)
    file = tmp_path / "runs/stopped/nonfinite/step-2.json"
    before = {path: path.stat().st_mtime_ns for path in file.parents[1].rglob("*")}
    assert main(["replay", str(file)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("Step 2 in 32-true: loss not finite: in its batch the first is the output of")
    assert "model.language_model.embed_tokens" in said
    assert f"rows {file.name}:rows[" in said
    assert {path: path.stat().st_mtime_ns for path in file.parents[1].rglob("*")} == before

    file.write_text(file.read_text().replace(f" {SIGN}", ""))
    found = replay(file)
    assert (found.cause, found.step, found.checkpoint_step) == (None, 2, 1)
    module = MMModule.load_from_checkpoint(tmp_path / "runs/stopped/checkpoints/last.ckpt")
    batch = Collator(module.processing)(read_conversations(file, IMAGE_ROOT).samples)
    expected = module.objective(batch)
    assert found.loss == pytest.approx(expected.nll.item() / expected.num_tokens, abs=1e-6)
    assert replay(file, precision="bf16-mixed").loss != found.loss


def test_a_batch_of_ones_own_loader_is_named_and_leaves_no_file(model: Path, tmp_path: Path) -> None:
    batch = batch_of(model, {"train": rows_with_sign(tmp_path / "rows", 2, [1])}, 2)
    recorder = RunRecorder(root=tmp_path / "runs", name="own")
    module = BareModule(str(model), MIDDLE)
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        callbacks=[recorder],
        default_root_dir=tmp_path,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    with pytest.raises(UserError, match="the first is the output of model") as caught:
        trainer.fit(module, train_dataloaders=DataLoader([batch], batch_size=None))
    assert "rows train.json:1[1];" in caught.value.why
    assert not (recorder.run.path / "nonfinite").exists()


def test_a_negative_number_of_steps_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match=r"model\.skip_nonfinite: -1 is negative"):
        MMModule(str(model), skip_nonfinite=-1)


def test_all_ranks_decide_alike_where_one_has_the_row(model: Path, tmp_path: Path) -> None:
    """And a run that stopped goes on bit for bit, which needs the random generators of both."""
    first, second = nonfinite_ranks.launch(model, rows_with_sign(tmp_path / "rows", 12, [5]), tmp_path)
    assert first == second
    (said,) = first["said"]
    assert f"step {first['step'] + 1} is passed over" in said
    assert "in rank " in said
    assert "rows train.json:1[5];" in said
    assert f"The loss of step {first['step'] + 1} is not finite." in first["stopped"]
    assert first["equal"]
