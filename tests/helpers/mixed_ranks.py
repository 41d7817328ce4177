"""Ranks that train on mixed and on streamed sources: ``python -m tests.helpers.mixed_ranks OUT MODEL``.

Data flow: ``launch`` starts a process per rank -> fits of each kind -> ``OUT/<kind>-<rank>.json``, which rows each rank
was given in the whole run and in the two parts of the killed one, and whether the weights at the end are equal.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_mm.data.batch import Batch
from tests.helpers.training import DROPOUT, train

KINDS: dict[str, dict[str, Any]] = {
    "mixed": {"temperature": 2.0},
    "streamed": {"streaming": True, "shuffle_buffer": 3},
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
    """Run this module on some ranks, and wait for them.

    Raises:
        AssertionError: One of them failed; what it printed is the message.
        subprocess.TimeoutExpired: They wait for each other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.mixed_ranks", str(out), str(model)]
    running = []
    for rank in range(ranks):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running.append(subprocess.Popen(command, env=own, text=True, **pipes))  # type: ignore[call-overload]
    try:
        for process in running:
            told, _ = process.communicate(timeout=240)
            assert process.returncode == 0, told
    finally:
        for process in running:
            process.kill()


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
