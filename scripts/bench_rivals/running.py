"""One run of one arm in a process of its own.

Data flow: ``Setting`` + ``Arm`` -> command line -> process -> what its stopwatch wrote.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench_rivals.arms import Arm, tuning
from bench_rivals.stopwatch import VARIABLE

SCRIPTS = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).with_name("training_template.jinja")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class RunFailed(Exception):
    """A run ended with an error, or without a measurement."""


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison have in common.

    Args:
        model: Folder of the model.
        data: The product's training file.
        rows: The same rows in the product's order, as the rivals read them.
        work: Folder that the runs share.
        rivals: Python of the rivals' environment.
        batch_size: Rows per step of one process.
        warm_up: Steps that are not timed.
        timed: Steps that are.
        precision: '32-true' or 'bf16-mixed'.
        accelerator: 'cpu' or 'gpu'.
        ranks: Processes of the product.
        threads: Of all processes together.
    """

    model: Path
    data: Path
    rows: Path
    work: Path
    rivals: Path
    batch_size: int
    warm_up: int
    timed: int
    precision: str = "32-true"
    accelerator: str = "cpu"
    ranks: int = 1
    threads: int = os.cpu_count() or 1


def run(setting: Setting, arm: Arm, steps: int, batches: bool = False) -> dict[str, Any]:
    """Train for some steps.

    Args:
        setting: Of the comparison.
        arm: Who trains.
        steps: How many, warm-up and timed block included.
        batches: Whether to note what each batch holds.

    Raises:
        RunFailed: With the run's last lines.
    """
    out, log = setting.work / "measured.json", setting.work / f"{arm.key}.log"
    out.unlink(missing_ok=True)
    command = (ours if arm.who == "ours" else _theirs)(setting, arm, steps)
    job = {"out": str(out), "warm_up": setting.warm_up, "timed": setting.timed, "batches": batches}
    environment = {**os.environ, **dict.fromkeys(_THREADS, str(max(1, setting.threads // setting.ranks)))}
    environment["PYTHONPATH"] = os.pathsep.join((str(SCRIPTS), str(SCRIPTS.parent)))
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(setting.work / "compiled")
    environment[VARIABLE] = json.dumps({**job, "launched": time.time()})
    with log.open("w", encoding="utf-8") as told:
        done = subprocess.run(command, cwd=setting.work, env=environment, stdout=told, stderr=told)
    if done.returncode or not out.is_file():
        raise RunFailed(f"{arm.key} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    measured: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return measured


def warmed(setting: Setting, arm: Arm, steps: int) -> None:
    """Fill what the arm keeps on disk: one run over the same batches."""
    run(replace(setting, warm_up=1, timed=1), arm, steps)


def ours(setting: Setting, arm: Arm, steps: int) -> list[str]:
    """The command line of a run of the product."""
    options = {
        "--model.backbone.path": setting.model,
        "--model.optimizer.lr": "1e-4",
        "--model.optimizer.schedule": "constant",
        "--model.optimizer.warmup": 0,
        "--data.train": setting.data,
        "--data.batch_size": setting.batch_size,
        "--data.num_workers": 0,
        "--trainer.accelerator": setting.accelerator,
        "--trainer.devices": setting.ranks,
        "--trainer.strategy": "ddp" if setting.ranks > 1 else "auto",
        "--trainer.precision": setting.precision,
        "--trainer.max_steps": steps,
        "--evaluation.before": "false",
        "--evaluation.after": "false",
        "--run.root": setting.work / "runs",
        "--run.wandb": "off",
        "--trainer.callbacks+": "bench_rivals.timing.Timing",
    }
    common = [f"{name}={value}" for name, value in options.items()]
    special = [option.format(work=setting.work) for option in arm.options]
    return [sys.executable, "-m", "lightning_mm", "fit", *common, *tuning(arm.train), *special]


def _theirs(setting: Setting, arm: Arm, steps: int) -> list[str]:
    arguments = {
        "output_dir": str(setting.work / "runs" / arm.key),
        "per_device_train_batch_size": setting.batch_size,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "bf16": setting.precision == "bf16-mixed",
        "use_cpu": setting.accelerator == "cpu",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        **arm.args,
    }
    places = ["--model", setting.model, "--rows", setting.rows, "--template", TEMPLATE]
    choice = ["--trainer", arm.who, "--train", arm.train, *arm.flags, "--args", json.dumps(arguments)]
    return [str(setting.rivals), "-m", "bench_rivals.theirs", *map(str, places), *choice]
