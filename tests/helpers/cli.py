"""The command line as tests call it: in this process or in one of its own."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lightning_mm.__main__ import main

ROOT = Path(__file__).parents[2]
"""The root of the repository."""
CONFIGS = sorted(ROOT.glob("configs/tuning/*.yaml"))
"""The shipped fragment of each tuning policy."""
QUICK = ("--evaluation.before", "false", "--evaluation.after", "false", "--trainer.limit_val_batches", "0")
"""Options of a fit that evaluates nothing."""
Fit = Callable[..., int]
"""The fixture ``fit``: runs a verb (default ``fit``) with further options, returns the exit status."""


def run_cli(arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start ``lightning-mm`` in a process of its own, in ``folder``; stderr is mixed into stdout."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "lightning_mm", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def inspect(folder: Path, *more: str) -> int:
    """Run ``inspect`` on 24 images, with run directories under ``folder``; returns the exit status."""
    return main(["inspect", *more, "--root", str(folder / "runs"), "--images", "24", "--auto.resamples", "4"])


def table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
