"""Ranks of which one comes to a step that is not finite: ``python -m tests.helpers.nonfinite_ranks OUT MODEL TRAIN``.

Data flow: ``launch`` starts a process per rank -> a fit that passes over the step, and one that stops at it and goes on
-> ``OUT/<rank>.json``: what each rank decided and was told, and whether the weights at the end are equal.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.core.decisions import DecisionLog
from lightning_mm.core.errors import UserError
from lightning_mm.training.callbacks import run_recorder
from lightning_mm.training.callbacks.checkpoints import LastCheckpoint
from lightning_mm.training.callbacks.run_recorder import RunRecorder
from lightning_mm.training.checkpoint_file import read_checkpoint
from lightning_mm.training.module import MMModule
from tests.helpers.ranks import launch_ranks
from tests.helpers.training import DROPOUT, train


def launch(model: Path, rows: Path, out: Path) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    launch_ranks("tests.helpers.nonfinite_ranks", [out, model, rows])
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def fitted(name: str, **options: Any) -> tuple[MMModule, list[str]]:
    """The module of a fit of this rank, and its decisions on steps that are not finite."""
    out, model, rows = map(Path, sys.argv[1:])
    with DecisionLog().opened() as decided:
        kept = [LastCheckpoint(), RunRecorder(root=out / "runs", name=name)]
        module, _ = train(
            model, {"train": rows}, out, tuning=DROPOUT, callbacks=kept, max_steps=4, devices=2, strategy="ddp",
            **options,
        )  # fmt: skip
    return module, [str(each) for each in decided if each.name == "model.skip_nonfinite"]


def main(out: Path) -> None:
    """One rank."""
    expected, said = fitted("passed", skip_nonfinite=1)
    weights = {name: tensor.detach().clone() for name, tensor in expected.trainable.items()}
    with pytest.raises(UserError) as stopped:
        fitted("stopped")
    checkpoint = out / "runs/stopped/checkpoints/last.ckpt"
    resumed, _ = fitted("resumed", skip_nonfinite=1, ckpt_path=checkpoint)
    equal = all(torch.equal(weights[name], tensor) for name, tensor in resumed.trainable.items())
    saved = read_checkpoint(checkpoint)
    found = {"said": said, "stopped": str(stopped.value), "equal": equal, "step": saved["global_step"]}
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_recorder, "write_report", lambda _: None)
        main(Path(sys.argv[1]))
