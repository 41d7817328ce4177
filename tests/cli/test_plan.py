"""``plan``: the config of a fit, told in tables and JSON, without weights and without traces."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from lightning_mm.__main__ import main
from lightning_mm.execution.prepare import Compute
from lightning_mm.models.loading import Backbone
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import IntermediateOnly
from tests.helpers.cli import CONFIGS, ROOT, Fit
from tests.helpers.data import Family, batch_of


def planned(fit: Fit, folder: Path, *more: str) -> dict[str, Any]:
    assert fit("--device", "h200", "--json", str(folder / "plan.json"), *more, verb="plan") == 0
    told: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return told


def test_all_policies_side_by_side(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(fit, tmp_path, "--model.tuning", "IntermediateOnly", "--model.tuning.layers", "1-2")
    names = [policy["policy"].partition("(")[0] for policy in told["policies"]]
    assert names[:3] == ["IntermediateOnly", "Full", "IntermediateOnly"]
    assert {"LoRAOnMiddle", "ConnectorOnly", "LateLayers", "UniformSparse"} <= set(names)
    own, full = told["policies"][:2]
    assert own["flops"]["floor"] < full["flops"]["floor"]
    assert own["memory"]["total"] < full["memory"]["total"]
    assert own["flops"]["cached"] < own["flops"]["run"]
    assert full["flops"]["run"] > full["flops"]["cached"] > 0.9 * full["flops"]["run"], "only the tower is saved"
    assert told["samples"] == 12
    printed = capsys.readouterr().out
    for word in ("layers below", "weight gradients", "optimizer", "H200"):
        assert word in printed
    assert not (tmp_path / "runs").exists()


def test_lengths_can_be_given(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that are alike have no padding, so that the run is its floor."""
    lengths = ("--text_tokens", "90", "--supervised", "9", "--batch_size", "3", "--compare", "false")
    told = planned(fit, tmp_path, "--image_tokens", "16", *lengths)
    shape = told["shape"]
    assert (shape["rows"], shape["image_tokens"], shape["text_tokens"], shape["supervised"]) == (3, 16, 90, 9)
    assert shape["padding"] == 0
    assert told["policies"][0]["flops"]["floor"] == pytest.approx(told["policies"][0]["flops"]["run"])
    assert "the processor makes no picture" not in capsys.readouterr().err
    planned(fit, tmp_path, "--image_tokens", "4", *lengths)
    assert "16 image tokens" in capsys.readouterr().err


def test_lengths_are_those_of_the_data(fit: Fit, tmp_path: Path, family: Family, data: dict[str, Path]) -> None:
    """Twelve rows in one batch, counted by torch with its padding: the run's figure without packing."""
    options = ("--data.batch_size", "12", "--model.compute.packing", "false", "--model.tuning", "IntermediateOnly")
    told = planned(fit, tmp_path, *options, "--model.tuning.layers", "1-2")
    folder = family("llava")
    batch = batch_of(folder, data, 12)
    module = MMModule(
        Backbone(path=str(folder), attention="eager"), IntermediateOnly(layers="1-2"), compute=Compute(packing=False)
    )
    module.unread = ()
    module.configure_model()
    with FlopCounterMode(display=False) as counter:
        module.training_step(batch, 0).backward()
    # The real step here still computes the block of the tower that nothing reads.
    assert told["policies"][0]["flops"]["run"] == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert told["policies"][0]["flops"]["floor"] < told["policies"][0]["flops"]["run"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_policy_file_can_be_planned(config: Path, fit: Fit, tmp_path: Path) -> None:
    told = planned(fit, tmp_path, "-c", str(config), "--compare", "false")
    assert len(told["policies"]) == 1


def test_a_config_for_gpus_needs_none(fit: Fit, tmp_path: Path) -> None:
    told = planned(fit, tmp_path, "-c", str(ROOT / "configs/trainer/gpu.yaml"), "--trainer.devices", "4")
    assert told["policies"][0]["traffic"] > 0


def test_the_config_of_a_run_can_be_planned(fit: Fit, tmp_path: Path) -> None:
    assert fit("--run.name", "done") == 0
    assert main(["plan", "-c", str(tmp_path / "runs/done/config.yaml"), "--device", "cpu", "--compare", "false"]) == 0


def test_what_cannot_be_planned_is_said(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--device", "abacus", verb="plan") == 2
    assert "--device abacus is not known" in capsys.readouterr().err
    assert main(["plan", "--model.backbone.path", str(tmp_path)]) == 2
    assert "--data.train" in capsys.readouterr().err
    assert fit("--model.tuning", "PerRegion", verb="plan") == 2
    assert "trains nothing" in capsys.readouterr().err


def test_layers_auto_has_a_stand_in(fit: Fit, tmp_path: Path) -> None:
    told = planned(fit, tmp_path, "--model.tuning", "IntermediateOnly", "--model.tuning.layers", "auto")
    assert told["policies"][0]["trained"] > 0


def test_it_is_quick(fit: Fit, tmp_path: Path) -> None:
    began = time.process_time()
    planned(fit, tmp_path, "--model.tuning", "IntermediateOnly")
    assert time.process_time() - began < 10
