"""What rows that share pictures save: FLOPs and seconds of the same questions, asked in three ways, in one run.

    python scripts/bench_shared_images.py [--model nano/model] [--data nano/data/train.json]

``alone``: each question a row of its own; ``turns``: the questions of a picture as turns of one conversation, each of
which sees those before; ``shared``: rows of their own, with ``data.share_images``. On the given model: steps that take
turns, medians. On the shape of LLaVA-1.5-7B with 576 image tokens and five questions a picture: FLOPs by ``plan``.

Data flow: rows with one question each -> the same as turns -> batches of the same questions -> ``TrainingStep`` ->
benchmarks/shared_images.json.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from machine import processor as processor_name
from PIL import Image

from lightning_mm import ConnectorOnly, IntermediateOnly, MMDataModule, plan
from lightning_mm.data.batch import Batch
from lightning_mm.execution.prepare import Compute
from lightning_mm.execution.step import TrainingStep
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone
from lightning_mm.testing.shapes import build_shape
from lightning_mm.tuning.apply import prepare_model
from lightning_mm.tuning.policy import TuningPolicy

Rows = list[dict[str, Any]]
WAYS = ("alone", "turns", "shared")
POLICIES: dict[str, TuningPolicy] = {
    "connector": ConnectorOnly(),
    "middle": IntermediateOnly("25%-50%"),
    "middle and connector": IntermediateOnly("25%-50%", connector="full"),
}


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("nano/model"))
    parser.add_argument("--data", type=Path, default=Path("nano/data/train.json"))
    parser.add_argument("--pictures", type=int, default=6, help="In a step.")
    parser.add_argument("--questions", type=int, default=5, help="Most of a picture.")
    parser.add_argument("--rounds", type=int, default=6, help="Steps of each way.")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="bf16-mixed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/shared_images.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = of_whole_pictures(
            json.loads(args.data.read_text()), args.data.parent, args.pictures * args.rounds, args.questions
        )
        found = {
            "machine": {"processor": processor_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "torch": torch.__version__,
            "precision": args.precision,
            "model": {name: measured(args, rows, policy, Path(folder), name) for name, policy in POLICIES.items()},
            "llava-1.5-7b": seven_b(Path(folder) / "7b", args.questions),
        }
    print(json.dumps(found, indent=2))
    args.out.write_text(json.dumps(found, indent=2) + "\n")


def of_whole_pictures(rows: Rows, root: Path, pictures: int, questions: int) -> Rows:
    """Rows of some pictures, at most so many of each, with absolute paths."""
    by_picture: dict[str, Rows] = defaultdict(list)
    for row in rows:
        by_picture[row["image"]].append({**row, "image": str((root / row["image"]).resolve())})
    chosen = random.Random(0).sample(sorted(by_picture), pictures)
    return [row for name in chosen for row in by_picture[name][:questions]]


def as_turns(rows: Rows) -> Rows:
    """The questions of each picture as turns of one conversation."""
    by_picture: dict[str, Rows] = defaultdict(list)
    for row in rows:
        by_picture[row["image"]].append(row)
    made = []
    for several in by_picture.values():
        turns = several[0]["conversations"][:]
        for row in several[1:]:
            question, answer = row["conversations"]
            turns += [{**question, "value": question["value"].replace("<image>\n", "")}, answer]
        made.append({"id": several[0]["id"], "image": several[0]["image"], "conversations": turns})
    return made


def data_module(way: str, rows: Rows, folder: Path, **options: Any) -> MMDataModule:
    """The rows as one of the three ways has them."""
    file = folder / f"{way}.json"
    file.write_text(json.dumps(as_turns(rows) if way == "turns" else rows))
    shared = {"share_images": True} if way == "shared" else {}
    return MMDataModule(train=str(file), image_root="/", num_workers=0, max_length=None, **shared, **options)


def measured(args: argparse.Namespace, rows: Rows, policy: TuningPolicy, folder: Path, name: str) -> dict[str, Any]:
    """Seconds and tokens of a step in each way, the ways taking turns, and FLOPs as ``plan`` counts them."""
    mm, tuning = prepare_model(Backbone(str(args.model)), policy, None)
    batches: dict[str, list[Batch]] = {}
    flops: dict[str, float] = {}
    for way in WAYS:
        per_step = args.pictures if way != "alone" else args.pictures * args.questions
        data = data_module(way, rows, folder, processor=str(args.model), batch_size=per_step)
        data.setup("fit")
        batches[way] = list(islice(data.train_dataloader(), args.rounds))
        estimate = plan(str(args.model), policy, data, precision=args.precision, compare=False).estimates[0]
        flops[way] = estimate.run / questions_of(batches[way][:8])
    handle = MultimodalModel.of(mm.model, data.processing)
    step = TrainingStep(handle, tuning, Compute(), False, args.precision)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(min(map(len, batches.values()))):
        for way in WAYS:
            seconds[way].append(seconds_of(step, batches[way][number], args.precision))
    step.close()
    print(name, {way: round(statistics.median(seconds[way]), 2) for way in WAYS})
    return {way: described(batches[way], seconds[way], flops[way]) for way in WAYS}


def questions_of(batches: list[Batch]) -> float:
    """Questions of a batch, on average."""
    return sum(len(sample.answers) for batch in batches for sample in batch.samples) / len(batches)


def seconds_of(step: TrainingStep, batch: Batch, precision: str) -> float:
    """Of forward and backward, per question."""
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        loss = step.objective(batch).nll
    loss.backward()
    for parameter in step.mm.model.parameters():
        parameter.grad = None
    return (time.perf_counter() - began) / questions_of([batch])


def described(batches: list[Batch], seconds: list[float], flops: float) -> dict[str, Any]:
    """Per question: tokens that are computed, FLOPs, seconds."""
    tokens = sum(len(batch.real) for batch in batches) / (questions_of(batches) * len(batches))
    return {
        "tokens_per_question": round(tokens, 1),
        "gflop_per_question": round(flops / 1e9, 2),
        "seconds_per_question": round(statistics.median(seconds[1:]), 4),
        "steps": len(seconds),
    }


def seven_b(folder: Path, questions: int) -> dict[str, Any]:
    """FLOPs of a question by ``plan``: VQA rows with short questions, one picture for several of them."""
    model = build_shape("llava-1.5-7b", folder)
    words = random.Random(0)
    rows: Rows = []
    for picture in range(4):
        Image.new("RGB", (336, 336), (picture * 50, 90, 120)).save(folder / f"{picture}.png")
        for number in range(questions):
            text = " ".join(words.choice(["what", "is", "the", "color", "of", "a", "man"]) for _ in range(9))
            turns = [{"from": "human", "value": f"<image>\n{text}?"}, {"from": "gpt", "value": "two red ones"}]
            rows.append({"id": f"{picture}-{number}", "image": str(folder / f"{picture}.png"), "conversations": turns})
    found: dict[str, Any] = {}
    for name, policy in POLICIES.items():
        found[name] = {}
        for way in WAYS:
            per_step = 4 * questions if way == "alone" else 4
            data = data_module(way, rows, folder, processor=str(model), batch_size=per_step)
            estimate = plan(str(model), policy, data, precision="bf16-mixed", device="h100", compare=False).estimates[0]
            found[name][way] = {"tflop_per_question": round(estimate.run / len(rows) / 1e12, 3)}
    return found


if __name__ == "__main__":
    main()
