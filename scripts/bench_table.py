"""What a large file costs before its first batch: time and memory, in the table on disk and as objects in memory.

    python scripts/bench_table.py [--rows 1000000] [--workers 2] [--out benchmarks/table.json]

Data flow: rows of text and rows with pictures in parquet, written here -> one process each: a table made (cold), the
same table again (warm), random rows, the first batch through a tiny model's processor with data workers, and the same
file as a list of objects -> benchmarks/table.json.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import processor as processor_name

WORDS = "the a cat dog sits on mat and looks at red blue house with three windows near river".split()  # noqa: SIM905
RANDOM_ROWS = 20_000


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="Of text, in JSONL.")
    parser.add_argument("--pictures", type=int, default=50_000, help="Rows with a picture, in parquet.")
    parser.add_argument("--workers", type=int, default=2, help="Processes that prepare batches.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/table.json"))
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "FILE", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASURES[args.measure[0]](*args.measure[1:], args.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        told = measured(Path(folder), args.rows, args.pictures, args.workers)
    told = {"machine": {"processor": processor_name(), "cores": os.cpu_count()}, "torch": torch.__version__, **told}
    print(json.dumps(told, indent=2))
    args.out.write_text(json.dumps(told, indent=2) + "\n")


def measured(folder: Path, rows: int, pictures: int, workers: int) -> dict[str, Any]:
    from lightning_mm.testing.tiny import build_tiny

    model = build_tiny("llava", folder / "model")
    text, table = write_text(folder / "text.jsonl", rows), write_pictures(folder / "pictures.parquet", pictures)

    def run(what: str, file: Path) -> dict[str, Any]:
        command = [sys.executable, __file__, "--workers", str(workers), "--measure", what, str(file), str(model)]
        return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

    return {
        "text": {
            "rows": rows,
            "file_MB": round(text.stat().st_size / 1e6),
            "cold": run("open", text),
            "warm": run("open", text),
            "first_batch_warm": run("first_batch", text),
            "objects": run("objects", text),
        },
        "pictures": {
            "rows": pictures,
            "file_MB": round(table.stat().st_size / 1e6),
            "cold": run("open", table),
            "warm": run("open", table),
            "first_batch_warm": run("first_batch", table),
        },
    }


def write_text(path: Path, number: int) -> Path:
    """Rows of LLaVA's form without pictures."""
    draw = random.Random(0)
    with path.open("w") as file:
        for index in range(number):
            question, answer = " ".join(draw.choices(WORDS, k=12)), " ".join(draw.choices(WORDS, k=8))
            said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": str(index), "conversations": said}) + "\n")
    return path


def write_pictures(path: Path, number: int) -> Path:
    """Rows of The Cauldron's form, each with a JPEG of its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = []
    for index in range(number):
        stream = io.BytesIO()
        Image.effect_noise((64, 48), 60 + index % 40).convert("RGB").save(stream, "JPEG")
        said = {"user": f"What is number {index}?", "assistant": f"Noise {index}.", "source": "made"}
        rows.append({"images": [{"bytes": stream.getvalue(), "path": f"{index}.jpg"}], "texts": [said]})
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    return path


def memory() -> dict[str, float]:
    """Peak resident memory of this process, and what of it is its own now (not pages of files), in MB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: round(int(status[key].split()[0]) / 1e3, 1)
        for name, key in (("peak_MB", "VmHWM"), ("own_MB", "RssAnon"), ("files_MB", "RssFile"))
    }


def open_table(file: str, model: str, workers: int) -> dict[str, Any]:
    from lightning_mm.data.datamodule import MMDataModule

    before, began = memory(), time.perf_counter()
    data = MMDataModule(train=file, num_workers=workers)
    rows = data.samples("train")
    seconds, drawn = time.perf_counter() - began, random.Random(0).choices(range(len(rows)), k=RANDOM_ROWS)
    began = time.perf_counter()
    for index in drawn:
        rows[index]
    each = (time.perf_counter() - began) / RANDOM_ROWS
    return {"seconds": round(seconds, 2), "random_row_us": round(1e6 * each, 1), "before": before, "after": memory()}


def first_batch(file: str, model: str, workers: int) -> dict[str, Any]:
    from lightning_mm.data.datamodule import MMDataModule

    data = MMDataModule(train=file, processor=model, num_workers=workers, batch_size=8)
    assert data.processing
    began = time.perf_counter()
    next(iter(data.train_dataloader()))
    return {"seconds": round(time.perf_counter() - began, 2), "after": memory()}


def objects(file: str, model: str, workers: int) -> dict[str, Any]:
    from lightning_mm.data.readers.conversations import read_conversations

    before, began = memory(), time.perf_counter()
    rows = read_conversations(file).samples
    return {"seconds": round(time.perf_counter() - began, 2), "rows": len(rows), "before": before, "after": memory()}


MEASURES: dict[str, Callable[[str, str, int], dict[str, Any]]] = {
    "open": open_table,
    "first_batch": first_batch,
    "objects": objects,
}

if __name__ == "__main__":
    main()
