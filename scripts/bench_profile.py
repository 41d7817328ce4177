"""Where a training step's time goes: products, attention, and all that is neither, for three ways to train.

    python scripts/bench_profile.py [--model nano/model] [--data nano/data/train.json] [--out benchmarks/profile.json]

Full tuning, layers 8-15, and layers 8-15 from a kept prefix take turns over the same batches, as the product runs them
(no padding, answers only, the tower cut). Every part's seconds are those that torch's profiler saw its operations take.
"""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import processor
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.execution.cache.collators import is_pixels
from lightning_mm.execution.cache.frozen_prefix import FrozenPrefix
from lightning_mm.execution.frozen_dtype import cast_frozen_weights
from lightning_mm.execution.vision_truncation import truncate_tower
from lightning_mm.models.loading import Backbone
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import Full, IntermediateOnly
from lightning_mm.tuning.optimizer import build_optimizer, parameter_groups

PARTS = ("forward", "backward", "optimizer")
FIRST = 8
ARMS = {"full": Full(), "layers 8-15": IntermediateOnly(layers="8-15")}
CACHED = "layers 8-15, prefix kept"
Split = dict[str, float]


def kind(operation: str) -> str:
    """What an operation counts as."""
    name = operation.removeprefix("aten::")
    if name in ("mm", "addmm", "convolution", "mkldnn_convolution", "_slow_conv2d_forward"):
        return "products"
    if name in ("bmm", "_softmax", "_softmax_backward_data") or "scaled_dot_product" in name:
        return "attention"
    return "rest"


@contextmanager
def profiled(split: Split, part: str) -> Iterator[None]:
    """Adds what its body's operations take, in seconds, by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        yield
    for event in seen.key_averages():
        key = f"{part}: {kind(event.key)}"
        split[key] = split.get(key, 0.0) + event.self_cpu_time_total / 1e6


class Way:
    """One way to train, ready to step."""

    def __init__(self, model: str, policy: Any, kept: bool, example: Batch, bf16: bool) -> None:
        self.module = MMModule(Backbone(path=model), policy)
        self.module.configure_model()
        if bf16:
            module = self.module
            cast_frozen_weights(module.mm, module.plan, "bf16-mixed", ExitStack(), module.compute.frozen_dtype)
        self.module.train()
        self.autocast: Callable[[], Any] = lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with self.autocast():
            truncate_tower(self.module.mm, example, ExitStack())
        groups = parameter_groups(self.module.mm, self.module.plan, self.module.optimizer)
        self.optimizer = build_optimizer(groups, self.module.optimizer)
        self.prefix = FrozenPrefix(self.module.mm, FIRST) if kept else None

    def step(self, batch: Batch) -> Split:
        """Seconds by part and kind."""
        split: Split = {}
        with self.autocast():
            inside: Any = nullcontext()
            if self.prefix is not None:
                inside = self.prefix.entering(self.prefix.states(batch))
                batch = replace(batch, inputs={n: v for n, v in batch.inputs.items() if not is_pixels(n, v)})
            with inside, profiled(split, "forward"):
                loss = self.module.objective(batch).nll
        with profiled(split, "backward"):
            loss.backward()
        with profiled(split, "optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return split


def measured(args: argparse.Namespace) -> dict[str, Split]:
    """Medians over the batches."""
    data = MMDataModule(train=str(args.data), batch_size=args.batch_size, num_workers=0, processor=str(args.model))
    data.setup("fit")
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(args.batches + 1)]
    bf16 = args.precision == "bf16-mixed"
    ways = {name: Way(str(args.model), policy, False, batches[0], bf16) for name, policy in ARMS.items()}
    ways[CACHED] = Way(str(args.model), ARMS["layers 8-15"], True, batches[0], bf16)
    found: dict[str, list[Split]] = {name: [] for name in ways}
    for number, batch in enumerate(batches):
        for name, way in ways.items():
            split = way.step(batch)
            found[name] += [split] if number else []  # the first one warms up
    return {name: {key: median(s[key] for s in splits) for key in splits[0]} for name, splits in found.items()}


def shown(result: dict[str, Split]) -> Table:
    """Seconds by part and kind, and each way's share of full tuning."""
    table = Table(title="seconds of a step")
    for column in ("", *result):
        table.add_column(column, justify="right" if column else "left")
    for key in next(iter(result.values())):
        table.add_row(key, *(f"{split.get(key, 0.0):.3f}" for split in result.values()))
    by_kind: dict[str, dict[str, float]] = {name: defaultdict(float) for name in result}
    for name, split in result.items():
        for key, seconds in split.items():
            by_kind[name][key.rpartition(" ")[2]] += seconds
    for each in ("products", "attention", "rest"):
        of_full = (f"{c[each]:.3f} ({c[each] / by_kind['full'][each]:.2f})" for c in by_kind.values())
        table.add_row(f"all {each} (of full)", *of_full)
    totals = {name: sum(split.values()) for name, split in result.items()}
    table.add_row("all (of full)", *(f"{t:.3f} ({t / totals['full']:.2f})" for t in totals.values()))
    return table


def main() -> None:
    """Measure, write down, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("nano/model"))
    parser.add_argument("--data", type=Path, default=Path("nano/data/train.json"))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/profile.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measured(args)
    made = {
        "machine": {"processor": processor(), "threads": args.threads, "torch": torch.__version__},
        "rows": args.batch_size,
        "precision": args.precision,
        "seconds": result,
    }
    args.out.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    Console().print(shown(result))


if __name__ == "__main__":
    main()
