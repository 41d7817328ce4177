"""How fast records go to disk and come back, beside plain copies of as many bytes in memory.

    python scripts/bench_store.py [--out benchmarks/store.json] [--folder DIR]

Records are hidden states of one sample: of the nano model (100 tokens of 576) and of an 8 B model (1000 of 4096).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_mm.execution.cache.store import RecordStore

SHAPES = {"nano": ((100, 576), 400), "8 B": ((1000, 4096), 12)}
ROUNDS = 5


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure(folder: Path, name: str, kept: Any) -> dict[str, float | str]:
    """Median milliseconds per record of putting, of the first get and of later ones, and of a copy in memory."""
    shape, num = SHAPES[name]
    hidden = [torch.randn(shape) for _ in range(num)]
    rounds = []
    for number in range(ROUNDS):
        identity = {"round": number, "shape": shape}

        def opened(identity: Any = identity) -> RecordStore:
            return RecordStore.open(folder, identity, limit_bytes=2**33, dtype=kept)

        with opened() as store:
            put = timed(lambda: [store.put(str(i), {"hidden": x}) for i, x in enumerate(hidden)] and store.flush())
            size = store.bytes / num
            error = store.stats.relative_error
        with opened() as store:
            first, later = (timed(lambda: [store.get(str(i)) for i in range(num)]) for _ in range(2))
        rounds.append((put, first, later, timed(lambda: [x.clone() for x in hidden])))
    put, first, later, copy = (1e3 * statistics.median(each) / num for each in zip(*rounds, strict=True))
    told = {"put_ms": put, "first_get_ms": first, "later_get_ms": later, "copy_ms": copy, "kB": size / 1e3}
    rounded = {field: float(f"{value:.3g}") for field, value in told.items()}
    return {"record": name, "kept": kept, **rounded, "relative_error": float(f"{error:.2g}")}


def main() -> None:
    """Measure all and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="On the disk that is to be measured; a temporary one.")
    options = parser.parse_args()
    rows = []
    for name in SHAPES:
        for kept in ("float32", "bfloat16", "int8"):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                rows.append(measure(Path(folder), name, kept))
            print("  ".join(f"{field} {value}" for field, value in rows[-1].items()))
    if options.out:
        told = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__, "rows": rows}
        options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
