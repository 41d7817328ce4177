"""Averages of weights: over what trains alone, equal to the formula, and resumed to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.data import Data, Family
from tests.helpers.fits import short_fits

DECAY, END = 0.75, 6
EVERY = "{class_path: ModelCheckpoint, init_args: {filename: 'at-{step}', every_n_train_steps: 1, save_top_k: -1}}"
OPTIONS = (
    f"--trainer.callbacks+={{class_path: EMAWeightAveraging, init_args: {{decay: {DECAY}}}}}",
    *("--model.optimizer.schedule=constant", "--model.optimizer.warmup=0"),
)


def test_an_average_is_saved_and_gone_on_from(
    family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fit = short_fits(family("llava"), data, tmp_path, capfd, monkeypatch)

    def run(name: str, *more: str) -> None:
        fitted = fit(*OPTIONS, f"--run.name={name}", *more)
        assert fitted.status == 0, fitted.output

    def saved(file: str) -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(tmp_path / "runs" / file, weights_only=True)
        return checkpoint

    run("whole", f"--trainer.max_steps={END}", f"--trainer.callbacks+={EVERY}")
    run("first", "--trainer.max_steps=3")
    run("rest", f"--trainer.max_steps={END}", "--ckpt_path=runs/first/checkpoints/last.ckpt")

    whole, rest = saved("whole/checkpoints/last.ckpt"), saved("rest/checkpoints/last.ckpt")
    assert all("projector" in name for name in whole["state_dict"])
    for part in ("state_dict", "current_model_state"):
        assert whole[part].keys() == rest[part].keys() == whole["state_dict"].keys()
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, rest[part][name]), (part, name)

    average: dict[str, torch.Tensor] = {}
    for step in range(1, END + 1):
        weights = saved(f"whole/checkpoints/at-step={step}.ckpt")["current_model_state"]
        for name, weight in weights.items():
            average[name] = weight if step == 1 else DECAY * average[name] + (1 - DECAY) * weight
    for name, expected in average.items():
        torch.testing.assert_close(whole["state_dict"][name], expected)
        assert not torch.equal(whole["current_model_state"][name], expected)
