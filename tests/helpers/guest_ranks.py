"""Ranks that train a stranger's model with and without looks inside: ``python -m tests.helpers.guest_ranks OUT MODEL``.

Data flow: tiny model, pictures to probe with -> Lightning's DDP with loaders of unequal length, transformers' Trainer
-> OUT/<loop>-<looks or alone>-<rank>.pt: losses and weights; what the callbacks wrote, beside it.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_mm.callbacks import GeometryCallback, Schedule
from lightning_mm.callbacks.hf import InspectionCallback
from lightning_mm.models.processor import optional_video_processor
from tests.helpers import strangers
from tests.helpers.data import make_probe_rows
from tests.helpers.ranks import launch_ranks

LOOPS = ("lightning", "transformers")
LOOKS = Schedule(every=2, end=False, budget=None)


def launch(out: Path, model: Path, ranks: int = 2) -> None:
    """Run this module on some ranks; errors as of ``launch_ranks``."""
    make_probe_rows(out / "probes", 25)  # not the same number for every rank
    launch_ranks("tests.helpers.guest_ranks", [out, model], ranks)


def _callbacks(out: Path, processor: Any) -> list[Any]:
    probes = out / "probes" / "probes-0.json"
    return [GeometryCallback(LOOKS, ["cka"], processor=processor, probes=probes)]


def _train(loop: str, folder: Path, model: Path, callbacks: list[Any]) -> tuple[list[Any], Any]:
    if loop == "transformers":
        inspection = [InspectionCallback(callbacks)] if callbacks else []
        trainer = strangers.train_with_transformers(model, folder, inspection, ddp_backend="gloo")
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.model
    shorter = 2 * int(os.environ["RANK"])  # the second rank runs out of rows a step before the first
    module, _ = strangers.fit(
        model, folder, callbacks, steps=4, count=8 - shorter, strategy="ddp_find_unused_parameters_true", devices=2,
        use_distributed_sampler=False,
    )  # fmt: skip
    return module.losses, module


def main(out: Path, model: Path) -> None:
    """Every loop, alone and looked into."""
    with optional_video_processor():
        _, processor = strangers.load(model)
    for loop in LOOPS:
        for kind in ("alone", "looks"):
            callbacks = _callbacks(out, processor) if kind == "looks" else []
            losses, trained = _train(loop, out / f"{loop}-{kind}", model, callbacks)
            torch.save((losses, strangers.weights(trained)), out / f"{loop}-{kind}-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
