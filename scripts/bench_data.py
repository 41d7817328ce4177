"""How many samples a second the data pipeline makes, against what the model takes, and where its time goes.

    python scripts/bench_data.py MODEL TRAIN [--out benchmarks/data.json]

Data flow: a model + its training file, with the pictures as they are and as photographs of 640 x 480 -> the loader
alone with 0, 1 and 2 workers, by turns; one process's CPU time per sample by part; forward, backward and AdamW step of
layers 8-15 on the same batches -> benchmarks/data.json.
"""

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import processor as processor_name
from PIL import Image

from lightning_mm.data import images
from lightning_mm.data.batch import Batch
from lightning_mm.data.chat import ChatRenderer
from lightning_mm.data.collator import Collator
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models import encoding, processor
from lightning_mm.models.loading import Backbone
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import IntermediateOnly

BATCH, SHARE = 8, 480
ORDERS: dict[str, dict[str, Any]] = {
    "batch_size 8": {"batch_size": BATCH},
    "batch_size 8, group_by_length": {"batch_size": BATCH, "group_by_length": True},
    "max_tokens 1120": {"max_tokens": 1120},
}


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="Of the model, timed.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/data.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sets = {"as they are": args.train, "photographs of 640 x 480": photographs(args.train, Path(folder))}
        pipeline = {name: measured(args.model, path, args.rounds) for name, path in sets.items()}
    torch.set_num_threads(os.cpu_count() or 1)
    taken = model_takes(args.model, args.train, args.steps)
    best = {name: max(told["samples_per_second"].values()) for name, told in pipeline.items()}
    told = {
        "machine": {"processor": processor_name(), "cores": os.cpu_count()},
        "torch": torch.__version__,
        "pipeline": pipeline,
        "model_samples_per_second": taken,
        "times_what_the_model_takes": {name: round(rate / taken, 1) for name, rate in best.items()},
        "orders": {name: order(args.model, args.train, options) for name, options in ORDERS.items()},
    }
    print(json.dumps(told, indent=2))
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(told, indent=2) + "\n")


def photographs(train: Path, folder: Path) -> Path:
    """The first rows of a file, their pictures enlarged with some noise and saved as a camera would."""
    rows = json.loads(train.read_text())[:SHARE]
    generator = torch.Generator().manual_seed(0)
    for number, row in enumerate(rows):
        if "image" not in row:
            continue
        picture = Image.open(train.parent / row["image"]).convert("RGB").resize((640, 480))
        noise = torch.randint(0, 40, (480, 640, 3), generator=generator, dtype=torch.uint8)
        noisy = Image.blend(picture, Image.fromarray(noise.numpy()), 0.3)
        row["image"] = f"{number}.jpg"
        noisy.save(folder / row["image"], quality=90)
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def measured(model: str, train: Path, rounds: int) -> dict[str, Any]:
    """Rates by number of workers, taken by turns, and the seconds of one process by part."""
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for workers in (0, 1, 2):
            rates[f"{workers} workers"].append(rate(opened(model, train, num_workers=workers, batch_size=BATCH)))
    return {
        "samples_per_second": {name: round(median(values), 1) for name, values in rates.items()},
        "all": {name: [round(value, 1) for value in values] for name, values in rates.items()},
        "milliseconds_per_sample": profile(opened(model, train, num_workers=0, batch_size=BATCH)),
    }


def opened(model: str, train: Path, **options: Any) -> MMDataModule:
    return MMDataModule(train=str(train), processor=model, max_length=512, max_bad_fraction=1.0, **options)


def rate(data: MMDataModule) -> float:
    """Samples a second, the workers' start and the first batches left out."""
    batches: Iterator[Batch] = iter(data.train_dataloader())
    for _ in range(4):
        next(batches)
    began, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch)
        if count >= SHARE - 5 * BATCH:
            break
    return count / (time.perf_counter() - began)


def profile(data: MMDataModule) -> dict[str, float]:
    """Milliseconds of CPU time of each part, without those of the parts inside it."""
    parts = {
        "decode": (images, "load"),
        "template": (ChatRenderer, "render"),
        "tokenize": (encoding.RecordingTokenizer, "__call__"),
        "processor": (processor.ModelProcessor, "encode"),
        "collate": (Collator, "__call__"),
    }
    spent: dict[str, float] = defaultdict(float)
    loader, count = data.train_dataloader(), 0
    with timed(parts, spent):
        for batch in loader:
            count += len(batch)
            if count >= SHARE // 2:
                break
    return {name: round(1e3 * spent[name] / count, 3) for name in parts}


@contextmanager
def timed(parts: dict[str, tuple[Any, str]], spent: dict[str, float]) -> Iterator[None]:
    """While active, calls are timed; what a part spends in another one counts for that one only."""
    inside: list[float] = [0.0]

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def watch(*args: Any, **options: Any) -> Any:
            inside.append(0.0)
            began = time.process_time()
            try:
                return call(*args, **options)
            finally:
                took = time.process_time() - began
                spent[name] += took - inside.pop()
                inside[-1] += took

        return watch

    before = {name: getattr(owner, attribute) for name, (owner, attribute) in parts.items()}
    for name, (owner, attribute) in parts.items():
        setattr(owner, attribute, watched(name, before[name]))
    try:
        yield
    finally:
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, before[name])


def model_takes(model: str, train: Path, steps: int) -> float:
    """Samples a second of forward, backward and optimizer step, layers 8-15, the first step left out."""
    module = MMModule(Backbone(path=model), IntermediateOnly(layers="8-15"))
    module.configure_model()
    optimizer = torch.optim.AdamW(module.trainable.values(), lr=0.0)
    batches = iter(opened(model, train, num_workers=0, batch_size=BATCH).train_dataloader())
    rates = []
    for batch in [next(batches) for _ in range(steps + 1)]:
        began = time.perf_counter()
        objective = module.objective(batch)
        (objective.nll / objective.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append(len(batch) / (time.perf_counter() - began))
    return round(median(rates[1:]), 2)


def order(model: str, train: Path, options: dict[str, Any]) -> dict[str, float]:
    """What an order costs before the first batch, and how much of its batches is padding."""
    data = opened(model, train, num_workers=0, **options)
    data.samples("train")
    assert data.processing
    began = time.perf_counter()
    loader = data.train_dataloader()
    seconds = time.perf_counter() - began
    real = positions = rows = 0
    for count, batch in enumerate(loader):
        real, positions = real + int((batch.regions != 0).sum()), positions + batch.regions.numel()
        rows += len(batch)
        if count == 30:
            break
    return {
        "seconds_to_plan": round(seconds, 2),
        "padding": round(1 - real / positions, 4),
        "samples_per_batch": round(rows / 31, 2),
    }


if __name__ == "__main__":
    main()
