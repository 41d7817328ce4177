"""``python -m lightning_mm.testing`` writes a model and data that every part of the package reads."""

from pathlib import Path

import pytest

from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.testing.__main__ import main


def test_folder_to_try_verbs_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiny"
    assert main([str(out), "--layers", "2", "--rows", "6"]) == 0
    assert f"--model.backbone.path {out}/model" in capsys.readouterr().out
    data = MMDataModule(
        processor=str(out / "model"),
        train=str(out / "train.json"),
        val=str(out / "val.json"),
        probes=str(out / "probes.json"),
        num_workers=0,
    )
    assert [len(data.samples(split)) for split in ("train", "val")] == [6, 3]
    assert len(data.probe_set().images) == 48
    assert data.example_batch().has_images


def test_taken_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/file").write_text("")
    assert main([str(tmp_path)]) == 2
    assert "is taken" in capsys.readouterr().err
