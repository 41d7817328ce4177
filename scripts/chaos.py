"""Kill runs, let them go on, and compare every file with that of a run that nobody killed.

    python scripts/chaos.py                          # 200 trials, benchmarks/chaos.json
    python scripts/chaos.py --trials 20 --seed 7     # others

A trial draws options of ``fit`` and one or two kills: SIGKILL to the whole process group, at the n-th time that the run
opens a file to write, renames, removes or makes one, or after a time of the run's length. Every run is a process of its
own with the real command line; after a kill the same line goes on with ``--ckpt_path auto``.

Data flow: seed -> ``draw`` -> ``Trial`` -> ``chaos_runs`` (processes, then ``differences`` from an uninterrupted run of
the same options, made once) -> one line each, and the JSON.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # no threads before a fork
sys.path.insert(0, str(Path(__file__).parent))

from chaos_runs import Finished, Kill, differences, run_fit
from machine import processor

from lightning_mm.testing.tiny import build_tiny
from lightning_mm.testing.tiny_data import build_tiny_data

_CALLBACKS = """
trainer:
  callbacks+:
    - class_path: GeometryCallback
      init_args: {measures: [overlap, gap], schedule: {every: 2, budget: null}}
    - class_path: DriftCallback
      init_args: {schedule: {every: 3, budget: null}}
"""
"""Looks at fixed steps: by default a clock says which of them are worth their time."""
_MOST_STARTS = 4
"""Starts of a trial, after which it must have come to its end."""


@dataclass(frozen=True)
class Options:
    """What a trial varies.

    Args:
        workers: Of the loader.
        accumulate: Micro-batches of a step.
        precision: ``trainer.precision``.
        tuning: The policy; adapters have dropout.
        cache: Frozen activations: 'off', 'cold' (an empty folder) or 'warm' (filled by another run).
        tokens: Whether batches are made by a token budget.
        other_disk: Whether temporary files lie on another file system.
    """

    workers: int
    accumulate: int
    precision: str
    tuning: str
    cache: str
    tokens: bool
    other_disk: bool

    def arguments(self) -> list[str]:
        """Options of ``fit``."""
        batch = ("--data.max_tokens", "400") if self.tokens else ("--data.batch_size", "2")
        lora = ("--model.tuning.lora.dropout", "0.2") if self.tuning == "LoRAOnMiddle" else ()
        return [
            *("--data.num_workers", str(self.workers), *batch, "--model.tuning", self.tuning, *lora),
            *("--trainer.accumulate_grad_batches", str(self.accumulate), "--trainer.precision", self.precision),
            *("--model.cache.mode", "off" if self.cache == "off" else "on"),
        ]


@dataclass(frozen=True)
class Trial:
    """One run that is killed once or twice.

    Args:
        number: Of the trial.
        options: What is run.
        moments: For each kill, 'event' or 'time', and where in the run as a share of it.
    """

    number: int
    options: Options
    moments: tuple[tuple[str, float], ...]


def draw(number: int, seed: int) -> Trial:
    """The trial of a number; the same for the same seed."""
    rng = random.Random(f"{seed}:{number}")
    tuning = rng.choice(["IntermediateOnly", "LoRAOnMiddle", "ConnectorOnly"])
    options = Options(
        workers=rng.choice([0, 0, 2]),
        accumulate=rng.choice([1, 3]),
        precision=rng.choice(["32-true", "bf16-mixed"]),
        tuning=tuning,
        cache="off" if tuning == "ConnectorOnly" else rng.choice(["off", "cold", "warm"]),
        tokens=rng.random() < 0.3,
        other_disk=rng.random() < 0.3,
    )
    kills = rng.choice([1, 1, 2])
    return Trial(number, options, tuple((rng.choice(["event", "event", "time"]), rng.random()) for _ in range(kills)))


class Laboratory:
    """Model, data and uninterrupted runs, made once.

    Args:
        folder: Where all of it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model, data = build_tiny("llava", folder / "model"), build_tiny_data(folder / "data", rows=10, probes=24)
        callbacks = folder / "callbacks.yaml"
        callbacks.write_text(_CALLBACKS)
        self._common = [
            *("fit", "--model.backbone.path", str(model), "--run.wandb", "off", "--model.max_new_tokens", "3"),
            *("--data.train", str(data / "train.json"), "--data.val", str(data / "val.json")),
            *("--data.test", str(data / "val.json"), "--data.probes", str(data / "probes.json")),
            *("--trainer.accelerator", "cpu", "--trainer.max_steps", "6", "--trainer.log_every_n_steps", "1"),
            *("--trainer.val_check_interval", "3", "--trainer.check_val_every_n_epoch", "null"),
            *("--run.save_every", "2", "--run.name", "job", "--ckpt_path", "auto"),
            *("-c", str(callbacks)),
        ]
        self._whole: dict[Options, tuple[Path, Finished]] = {}

    def whole(self, options: Options) -> tuple[Path, Finished]:
        """Folder and outcome of the uninterrupted run of these options."""
        if options not in self._whole:
            folder = self.folder / f"whole-{len(self._whole)}"
            if options.cache == "warm":
                self._start(options, self.folder / f"warm-{len(self._whole)}", None)
                shutil.copytree(self.folder / f"warm-{len(self._whole)}" / "cache", folder / "cache")
            done = self._start(options, folder, None)
            assert done.status == 0, done.log.read_text()[-3000:]
            self._whole[options] = folder, done
        return self._whole[options]

    def _start(self, options: Options, folder: Path, kill: Kill | None) -> Finished:
        return run_fit([*self._common, *options.arguments()], folder, kill, other_disk=options.other_disk)

    def try_it(self, trial: Trial) -> dict[str, Any]:
        """Kill, let go on until the end, compare."""
        reference, uninterrupted = self.whole(trial.options)
        folder = self.folder / f"trial-{trial.number}"
        if trial.options.cache == "warm":
            number = int(reference.name.partition("-")[2])
            shutil.copytree(self.folder / f"warm-{number}" / "cache", folder / "cache")
        kills, status, starts = [_kill(*each, uninterrupted) for each in trial.moments], -1, 0
        while status != 0 and starts < _MOST_STARTS:
            done = self._start(trial.options, folder, kills.pop(0) if kills else None)
            status, starts = done.status, starts + 1
        found = (
            differences(reference / "runs/job", folder / "runs/job") if status == 0 else [done.log.read_text()[-800:]]
        )
        more = sorted(path.name for path in (folder / "runs").iterdir() if path.name != "job")
        found += [f"another folder: {name}" for name in more]
        if not found:
            shutil.rmtree(folder)
        return {"trial": asdict(trial), "starts": starts, "differences": found}


def _kill(kind: str, share: float, uninterrupted: Finished) -> Kill:
    if kind == "time":
        return Kill(after=share * uninterrupted.seconds)
    return Kill(event=1 + int(share * uninterrupted.events))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Where runs lie; kept if given.")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        laboratory = Laboratory(given.folder or Path(temporary))
        rows, began = [], time.perf_counter()
        for number in range(given.trials):
            rows.append(laboratory.try_it(draw(number, given.seed)))
            last = rows[-1]
            print(
                f"{number}: {last['starts']} starts, {'equal' if not last['differences'] else last['differences']}",
                flush=True,
            )
    equal = sum(not row["differences"] for row in rows)
    print(f"{equal} of {len(rows)} equal in every file, {time.perf_counter() - began:.0f} s")
    if given.json:
        kinds = Counter(kind for row in rows for kind, _ in row["trial"]["moments"])
        content = {
            "machine": processor(),
            "seed": given.seed,
            "trials": len(rows),
            "equal": equal,
            "kills": dict(kinds),
        }
        given.json.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n")
    sys.exit(equal != len(rows))


if __name__ == "__main__":
    main()
