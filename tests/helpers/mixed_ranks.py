"""Ranks that train on mixed and on streamed sources: ``python -m tests.helpers.mixed_ranks OUT MODEL``.

Data flow: ``launch`` starts a process per rank -> fits of each kind -> ``OUT/<kind>-<rank>.json``, which rows each rank
was given in the whole run and in the two parts of the killed one, and whether the weights at the end are equal.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_mm.data.batch import Batch
from tests.helpers.ranks import launch_ranks
from tests.helpers.training import DROPOUT, train

KINDS: dict[str, dict[str, Any]] = {
    "mixed": {"temperature": 2.0},
    "streamed": {"streaming": True, "shuffle_buffer": 3},
    "shared": {"share_images": True, "rows_per_image": 2, "temperature": 2.0},
}
"""Options of the data module."""
STEPS, STOP = 9, 3


def sources(folder: Path) -> list[dict[str, Any]]:
    """Two sources, the first of more weight."""
    return [{"path": str(folder / "a.json"), "weight": 2.0}, {"path": str(folder / "b.json")}]


class RowsSeen(Callback):
    """Keeps the ids of the rows of every training batch."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def on_train_batch_start(self, trainer, pl_module, batch: Batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        self.batches.append([f"{sample.source}/{sample.id}" for sample in batch.samples])


class StopAfter(Callback):
    """Saves after an optimizer step on all ranks and ends the run."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def run(model: Path, out: Path, options: Mapping[str, Any], callbacks: list[Callback], **more: Any) -> Any:
    """One fit."""
    module, _ = train(
        model, {"train": sources(out)}, out, tuning=DROPOUT, callbacks=callbacks, data_options=options,
        max_steps=STEPS, **more,
    )  # fmt: skip
    return module


def launch(out: Path, model: Path, ranks: int = 2) -> None:
    """Run this module on some ranks; errors as of ``launch_ranks``."""
    launch_ranks("tests.helpers.mixed_ranks", [out, model], ranks)


def main(out: Path, model: Path) -> None:
    """Every kind of data, whole and killed."""
    for kind, options in KINDS.items():
        ranks = {"devices": 2, "strategy": "ddp"}
        whole, first, second = RowsSeen(), RowsSeen(), RowsSeen()
        checkpoint = out / f"{kind}.ckpt"
        expected = run(model, out, options, [whole], **ranks)
        weights = {name: tensor.detach().clone() for name, tensor in expected.trainable.items()}
        run(model, out, options, [first, StopAfter(STOP, checkpoint)], num_workers=2, **ranks)
        resumed = run(model, out, options, [second], ckpt_path=checkpoint, **ranks)
        equal = all(torch.equal(weights[name], tensor) for name, tensor in resumed.trainable.items())
        found = {"whole": whole.batches, "first": first.batches, "second": second.batches, "equal": equal}
        (out / f"{kind}-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
