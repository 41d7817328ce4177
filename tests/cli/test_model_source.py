"""What ``inspect`` is given: paths that name nothing, models that cannot be compared, one probe set for both sides."""

import csv
import json
from pathlib import Path

import pytest
import torch

from lightning_mm.__main__ import main
from lightning_mm.cli.resume import continue_metrics
from lightning_mm.core.errors import UserError
from lightning_mm.core.layer_table import read_layers
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.testing.tiny import build_tiny
from lightning_mm.training.checkpoint_file import KEY
from lightning_mm.verbs import model_source
from lightning_mm.verbs.inspected_model import ReadingOptions, own_data, read_probe_set
from lightning_mm.verbs.model_source import model_label
from tests.helpers.cli import QUICK, Fit, inspect
from tests.helpers.data import Family, make_probe_rows


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("runs/tuend",), "is no model folder or hub name, no run, and no checkpoint"),
        (("./nowhere/at/all",), "is no model folder or hub name, no run, and no checkpoint"),
        (("stray.ckpt",), "stray.ckpt"),
        (("runs/empty",), "holds no config.json"),
        (("MODEL", "--data", "DATA"), "There is nothing to probe with."),
        (("MODEL", "--probes", "PROBES", "--images", "1"), "images is 1"),
        (("MODEL", "--against", "runs/tuend", "--probes", "PROBES"), "runs/tuend is no model folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    more: tuple[str, ...],
    told: str,
    family: Family,
    data: dict[str, Path],
    probes: Path,
    tmp_path: Path,
    monkeypatch,
    capsys,
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_source, "load_model", lambda backbone: pytest.fail("a model was loaded"))
    (tmp_path / "runs/empty").mkdir(parents=True)
    torch.save({KEY: {}}, tmp_path / "stray.ckpt")
    names = {"MODEL": str(family("llava")), "DATA": str(data["train"]), "PROBES": str(probes)}
    assert main(["inspect", *(names.get(word, word) for word in more)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "data.probes FILE" not in error, "that is an option of fit"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["empty"]


@pytest.mark.parametrize("shape", [{"layers": 6}, {"hidden": 64}])
def test_models_of_another_shape_are_refused(
    shape: dict[str, int], family: Family, probes: Path, tmp_path: Path, capsys
) -> None:  # type: ignore[no-untyped-def]
    other = build_tiny("llava", tmp_path / "other", **shape)
    assert inspect(tmp_path, str(family("llava")), "--against", str(other), "--probes", str(probes)) == 2
    told = capsys.readouterr().err
    assert "cannot be compared" in told
    assert "4 blocks of width 32" in told


def test_pictures_beside_the_annotations(family: Family, data: dict[str, Path], tmp_path: Path) -> None:
    """COCO's layout: annotations/x.json speaks of pictures in val2017/."""
    file = make_probe_rows(tmp_path / "val2017", 8)
    moved = tmp_path / "annotations" / "x.json"
    moved.parent.mkdir()
    file.rename(moved)
    given = ReadingOptions(probes=moved, image_root=tmp_path / "val2017")
    assert len(read_probe_set(own_data(None, given), given).images) == 8
    alone = ReadingOptions(probes=moved)
    with pytest.raises(UserError, match=r"missing image|None of"):
        read_probe_set(own_data(None, alone), alone)


def test_whose_pictures_and_how_many(family: Family, data: dict[str, Path], tmp_path: Path) -> None:
    """A file of the command line lies beside its pictures, whatever folder the run had; the run's own number holds."""
    own = MMDataModule(processor=str(family("llava")), image_root=str(data["train"].parent), probe_images=6)
    file = make_probe_rows(tmp_path / "elsewhere", 9)
    assert len(read_probe_set(own, ReadingOptions(probes=file)).images) == 6
    assert len(read_probe_set(own, ReadingOptions(probes=file, images=9)).images) == 9
    fresh = own_data(None, ReadingOptions())
    assert (fresh.probe_images, fresh.max_length) == (256, 2048)
    assert own_data(None, ReadingOptions(max_length=99)).max_length == 99


def test_a_run_of_adapters_is_compared_with_its_base_by_its_own_probes(
    fit: Fit, family: Family, data: dict[str, Path], probes: Path, tmp_path: Path
) -> None:
    """Either way round. One caption is too long to be read: counted, in report, ledger and problems."""
    rows = json.loads(probes.read_text())
    rows[0]["caption"] = "a tiny square " * 300
    probes.write_text(json.dumps(rows))
    policy = ("--model.tuning", "LoRAOnMiddle", "--model.tuning.layers", "1-2", "--model.optimizer.lr", "0.05")
    assert fit(*QUICK, *policy, "--data.probes", str(probes), "--run.name", "tuned") == 0
    common = ("--measures", "[overlap]", "--max_length", "400", "--auto.batches", "2", "--text_only", "false")
    base = str(family("llava"))
    assert inspect(tmp_path, base, "--against", "runs/tuned", "--data", str(data["train"]), *common) == 0
    run = tmp_path / "runs/inspect-llava-tuned"
    criteria = json.loads((run / "selection.json").read_text())["criteria"]
    assert {"drift", "transplant", "rgn", "snr", "fisher"} <= criteria.keys()
    drifted = {
        r.layer: r.value for r in read_layers(run / "layers.csv")[0] if (r.measure, r.site) == ("drift_cosine", "image")
    }
    assert [drifted[layer] == 1 for layer in (-1, 0, 1, 2, 3)] == [True, True, False, False, False]
    assert "too long" in (run / "ledger.jsonl").read_text()
    told = json.loads((run / "inspections.json").read_text())
    assert all("too long" in " ".join(row["problems"]) for row in told)
    assert "too long" in (run / "report.html").read_text()
    assert inspect(tmp_path, "runs/tuned", "--against", base, *common, "--auto.criteria", "[rgn]") == 0
    backwards = json.loads((tmp_path / "runs/inspect-tuned-llava/selection.json").read_text())
    assert all(value is not None for value in backwards["criteria"]["rgn"])


def test_two_callbacks_of_a_kind_are_refused_in_our_words(fit: Fit, capsys) -> None:  # type: ignore[no-untyped-def]
    assert fit(*QUICK, "--trainer.callbacks", "[GeometryCallback, GeometryCallback]") == 2
    assert "trainer.callbacks names GeometryCallback 2 times" in capsys.readouterr().err


def test_a_look_at_the_step_of_the_checkpoint_is_kept(tmp_path: Path) -> None:
    earlier, later = (RunDirectory.create(tmp_path, name) for name in ("earlier", "later"))
    earlier.metrics.write_text(
        "step,epoch,train/loss,inspect/seconds,inside/overlap/last/peak\n"
        "3,0,0.5,,\n3,,,1.5,0.25\n4,,,2.5,0.75\n4,1,0.25,,\n5,,,3.5,1\n"
    )
    continue_metrics(earlier, later, 4)
    with later.metrics.open() as file:
        kept = [tuple(row.values()) for row in csv.DictReader(file)]
    assert kept == [("3", "0", "0.5", "", ""), ("3", "", "", "1.5", "0.25"), ("4", "", "", "2.5", "0.75")]


def test_here_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert (model_label("."), model_label(".."), model_label("/")) == ("model", tmp_path.name, "/")
