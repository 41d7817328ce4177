"""The verb export as a user meets it: dtype, upload, step, a folder that is taken, a base that has moved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_mm.__main__ import main
from tests.helpers.cli import QUICK
from tests.helpers.data import Family, make_rows
from tests.helpers.hub import Hub, hub

__all__ = ["hub"]


@pytest.fixture(scope="module")
def run(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of four steps that kept its second one too."""
    root = tmp_path_factory.mktemp("exported")
    base = shutil.copytree(family("llava"), root / "base")
    (root / "train.json").write_text(json.dumps(make_rows(root, 8, seed=0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LIGHTNING_MM_RUN", raising=False)
        options = ["--model.backbone.path", str(base), "--model.tuning", "LoRAOnMiddle", "--model.optimizer.lr", "0.05"]
        options += ["--data.train", str(root / "train.json"), "--data.num_workers", "0", "--data.batch_size", "2"]
        options += ["--trainer.accelerator", "cpu", *QUICK]
        fit = ["fit", *options, "--run.wandb", "off", "--run.root", str(root / "runs"), "--run.name", "lora"]
        assert main([*fit, "--trainer.max_steps", "2"]) == 0
        last = root / "runs/lora/checkpoints/last.ckpt"
        last.rename(last.with_name("second.ckpt"))
        resumed = ["--ckpt_path", str(last.with_name("second.ckpt")), "--trainer.max_steps", "4"]
        assert main([*fit, "--run.name", "whole", *resumed]) == 0
        shutil.copy(last.with_name("second.ckpt"), root / "runs/whole/checkpoints")
    return root / "runs/whole"


def test_a_folder_is_uploaded_in_the_dtype_that_was_asked_for(
    run: Path, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ["--out", str(out), "--dtype", "bfloat16", "--push_to_hub", "me/mine", "--private", "false"]
    assert main(["export", str(run), "--prove", "false", *asked]) == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert hub.repos == {"me/mine": False}
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert '"me/mine"' in hub.files["README.md"].decode()
    said = capfd.readouterr().err
    assert "exporting step 4 of run whole (last.ckpt)" in said
    assert "hf_secret" not in said


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--dtype", "float8"], "float8"),
        (["--push_to_hub", "mine"], "no owner"),
        (["--checkpoint", "third"], "third.ckpt"),
        (["--format", "gguf"], "gguf"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    options: list[str], why: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "out"), *options]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert why in said
    assert not (tmp_path / "out").exists()


def test_a_refused_upload_leaves_the_folder(
    run: Path, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.refuses = True
    arguments = ["export", str(run), "--out", str(tmp_path / "out"), "--prove", "false", "--push_to_hub", "me/mine"]
    assert main(arguments) == 2
    assert (tmp_path / "out/model.safetensors").is_file()
    assert f"hf upload me/mine {tmp_path / 'out'}" in capfd.readouterr().err
    assert main(arguments) == 2
    assert "--out" in capfd.readouterr().err, "the folder is taken now"


def test_an_earlier_step_is_warned_of_and_its_card_says_it(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for form in ("merged", "adapter"):
        out = tmp_path / form
        early = ["--checkpoint", "second", "--format", form, "--out", str(out), "--prove", "false"]
        assert main(["export", str(run), *early]) == 0
        said = capfd.readouterr().err
        assert "exporting step 2 of run whole (second.ckpt)" in said
        assert "step 2 of run whole is exported; the run went on to step 4" in said
        assert "- **Step**: 2\n" in (out / "README.md").read_text()


def test_a_base_that_has_moved_is_named(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = run.parent.parent / "base"
    away = base.rename(base.with_name("moved"))
    try:
        assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    finally:
        away.rename(base)
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert str(base) in said
    assert not (tmp_path / "out").exists()
