"""One stopwatch for all who are compared: only torch and the standard library, so it runs in either environment.

Data flow: BENCH_JOB (what to measure, from ``bench.py``) -> a trainer tells when steps begin and end -> a JSON file.

A step lasts from the end of the one before to its own end, so that waiting for data and the trainer's own work count.
The first steps warm up; the steps of the timed block are the same batches in every run. Memory is the largest resident
size of this process within the timed block (on a GPU, the most that torch had allocated).
"""

import json
import os
import time
import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VARIABLE = "BENCH_JOB"


@dataclass
class Stopwatch:
    """Times the steps of this process.

    Args:
        out: File for what was measured.
        launched: When the process was started, by the clock of ``time.time``.
        warm_up: Steps before the timed block.
        timed: Steps of the timed block.
        batches: Whether to note what was in each batch.
    """

    out: str
    launched: float
    warm_up: int
    timed: int
    batches: bool = False
    startup: float | None = None
    startup_cpu: float = 0.0
    began: float = 0.0
    stamps: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    seen: list[dict[str, int]] = field(default_factory=list)
    losses: list[Any] = field(default_factory=list)
    peak: int = 0

    @classmethod
    def of_job(cls) -> "Stopwatch":
        """As the parent process asked."""
        return cls(**json.loads(os.environ[VARIABLE]))

    def begin(self) -> None:
        """A step begins; its batch is there."""
        if self.startup is None:
            self.startup, self.startup_cpu = time.time() - self.launched, time.process_time()
            self.began = time.perf_counter()

    def end(self, loss: Any) -> None:
        """A step is over, its weights are updated.

        Args:
            loss: Mean over the supervised tokens, a number or a tensor that is read after the run.
        """
        done = len(self.stamps) + 1
        if torch.cuda.is_initialized() and done in (self.warm_up, self.warm_up + self.timed):
            torch.cuda.synchronize()
        self.losses.append(loss)
        self.stamps.append(time.perf_counter())
        self.cpu.append(time.process_time())
        if done == self.warm_up:
            _forget_peak()
        elif done == self.warm_up + self.timed:
            self.peak = _peak()

    def look(self, inputs: dict[str, Any], targets: Tensor) -> None:
        """Note what the model is given: two runs with equal notes learn from the same tokens.

        Args:
            inputs: With ``input_ids`` and ``attention_mask`` (B, L), and pictures.
            targets: (S,) token ids to be predicted, row by row.
        """
        if not self.batches:
            return
        ids = inputs["input_ids"][inputs["attention_mask"].bool()]
        pixels = inputs.get("pixel_values")
        self.seen.append(
            {
                "tokens": ids.numel(),
                "supervised": targets.numel(),
                "ids": _checksum(ids),
                "targets": _checksum(targets),
                "pixels": 0 if pixels is None else _checksum(pixels),
                "padded_tokens": inputs["input_ids"].numel(),
            }
        )

    def write(self) -> None:
        """Put it all into the file."""
        first, last = self.warm_up - 1, self.warm_up + self.timed - 1
        block = self.stamps[first : last + 1]
        told = {
            "startup_seconds": round(self.startup or 0.0, 3),
            "startup_cpu_seconds": round(self.startup_cpu, 3),
            "warm_up_seconds": round(block[0] - self.began, 3),
            "seconds_per_step": round((block[-1] - block[0]) / self.timed, 4),
            "cpu_seconds_per_step": round((self.cpu[last] - self.cpu[first]) / self.timed, 4),
            "steps": [round(b - a, 4) for a, b in pairwise(block)],
            "peak_bytes": self.peak,
            "losses": [float(loss) for loss in self.losses],
            "batches": self.seen,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        Path(self.out).write_text(json.dumps(told), encoding="utf-8")


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes())


def _forget_peak() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="ascii")  # from here on, the kernel's mark of the largest size is this size


def _peak() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
