"""Kill it anywhere, resume exactly: the resumed run is the uninterrupted one, bit for bit, or it says why not."""

import json
from pathlib import Path

import pytest
import torch

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.models.loading import load_model
from lightning_mm.training.checkpoint_file import read_checkpoint
from lightning_mm.tuning import Full, IntermediateOnly
from lightning_mm.tuning.optimizer import OptimizerSettings
from tests.helpers.data import Data, Family, make_rows
from tests.helpers.training import DROPOUT, Losses, SaveAt, train


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (0, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("step", [2, 5])
def test_killed_and_resumed_equals_uninterrupted(
    workers: int, accumulate: int, step: int, family: Family, data: Data, tmp_path: Path
) -> None:
    """12 rows, batches of 2: step 2 is inside the first epoch; step 5 inside the first or, accumulating, the second."""
    options = {"num_workers": workers, "accumulate_grad_batches": accumulate, "max_steps": 8}
    whole, rest = Losses(), Losses()
    expected, _ = train(family("llava"), data, tmp_path, tuning=DROPOUT, callbacks=[whole], **options)
    checkpoint = tmp_path / "killed.ckpt"
    with pytest.raises(SystemExit):
        train(family("llava"), data, tmp_path, tuning=DROPOUT, callbacks=[SaveAt(step, checkpoint)], **options)
    torch.rand(7)  # whatever the new process did before
    resumed, _ = train(
        family("llava"), data, tmp_path, tuning=DROPOUT, callbacks=[rest], ckpt_path=checkpoint, **options
    )
    for name, parameter in expected.trainable.items():
        assert torch.equal(parameter, resumed.trainable[name]), name
    later = {s: loss for s, loss in whole.by_step.items() if s > step}
    assert {s: loss for s, loss in rest.by_step.items() if s > step} == later
    assert len(later) == 8 - step


def saved(family: Family, data: Data, folder: Path) -> Path:
    _, trainer = train(family("llava"), data, folder, tuning=IntermediateOnly(layers="1-2"), max_steps=2)
    trainer.save_checkpoint(folder / "two.ckpt")
    return folder / "two.ckpt"


def test_a_checkpoint_holds_what_trains_and_no_code(family: Family, data: Data, tmp_path: Path) -> None:
    checkpoint = torch.load(saved(family, data, tmp_path), weights_only=True)
    assert all(".layers.1." in name or ".layers.2." in name for name in checkpoint["state_dict"])
    assert {"census_digest", "base", "rng", "settings"} <= checkpoint["lightning_mm"].keys()
    assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["batches"] == 2


def test_another_policy_is_refused_by_both_names(family: Family, data: Data, tmp_path: Path) -> None:
    path = saved(family, data, tmp_path)
    with pytest.raises(UserError) as caught:
        train(family("llava"), data, tmp_path, tuning=Full(), ckpt_path=path, max_steps=4)
    assert "IntermediateOnly(layers='1-2')" in str(caught.value)
    assert "Full()" in str(caught.value)


def test_another_base_model_is_refused(family: Family, data: Data, tmp_path: Path) -> None:
    from lightning_mm.models.loading import Backbone

    path = saved(family, data, tmp_path)
    other = load_model(Backbone(path=str(family("llava"))))
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1
    from transformers import AutoProcessor

    other.save_pretrained(tmp_path / "other")
    AutoProcessor.from_pretrained(family("llava")).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another base model"):
        train(tmp_path / "other", data, tmp_path, tuning=IntermediateOnly(layers="1-2"), ckpt_path=path, max_steps=4)


def test_the_rate_asked_for_counts_and_is_said(family: Family, data: Data, tmp_path: Path) -> None:
    path = saved(family, data, tmp_path)
    decision_log().clear()
    settings = OptimizerSettings(lr=5e-4, schedule="constant", warmup=0)
    _, trainer = train(
        family("llava"),
        data,
        tmp_path,
        tuning=IntermediateOnly(layers="1-2"),
        optimizer=settings,
        ckpt_path=path,
        max_steps=4,
    )
    assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {5e-4}
    said = [str(decision) for decision in decision_log()]
    assert any("model.optimizer.lr: 0.0005" in line and "0.01" in line for line in said)


class Malicious:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.touch, (Path("was-run"),))


@pytest.mark.parametrize("damage", ["cut", "foreign", "code", "gone"])
def test_a_broken_checkpoint_is_one_clear_error(
    damage: str, family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(family, data, tmp_path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
    elif damage == "code":
        torch.save({"lightning_mm": Malicious()}, path)
    else:
        path.unlink()
    with pytest.raises(UserError, match="checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path / "was-run").exists()


def test_more_data_cannot_be_taken_up_in_the_middle_of_an_epoch(family: Family, data: Data, tmp_path: Path) -> None:
    path = saved(family, data, tmp_path)
    data["train"].write_text(json.dumps(make_rows(data["train"].parent, 14)))
    with pytest.raises(UserError, match="order of samples cannot be continued"):
        train(family("llava"), data, tmp_path, tuning=IntermediateOnly(layers="1-2"), ckpt_path=path, max_steps=4)
