"""The verb plan: what a run will cost, before it starts and without weights, compared with every other policy.

Data flow: the options of ``fit`` -> model and data as configured, nothing loaded -> a few real batches (or one of given
lengths) -> a ``CostEstimate`` for each policy -> tables, and a JSON file.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image
from rich.console import Console
from rich.table import Table

from lightning_mm.cli.fit import TrainingCLI
from lightning_mm.cli.parser import Parser
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, TokenRegion
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.layer_selection.select import auto_layers_option, with_layers
from lightning_mm.planning.cost_estimate import CostEstimate, MetaModel, RunSettings, estimate_cost
from lightning_mm.planning.devices import DEVICES, Device, find_device
from lightning_mm.planning.memory import StepMemory
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import (
    ConnectorOnly,
    EarlyLayers,
    Full,
    IntermediateOnly,
    LateLayers,
    LoRAOnMiddle,
    RandomLayers,
    TuningPolicy,
    UniformSparse,
)
from lightning_mm.tuning.layers import count_layers
from lightning_mm.verbs.config_classes import refuse_foreign_classes


def print_plan(
    console: Console,
    found: Sequence[CostEstimate],
    lengths: dict[str, float],
    on: Device,
    *,
    steps: int,
    samples: int,
) -> None:
    """Print all tables.

    Args:
        console: Console to print to.
        found: Estimates, that of the run's own policy first.
        lengths: Mean lengths per row, as ``_lengths`` returns them.
        on: Device that seconds are predicted for.
        steps: Number of micro-batches of the run; 0: not known.
        samples: Number of training samples; 0: not known.
    """
    console.print(
        f"A step: {lengths['rows']:.3g} rows of {lengths['image_tokens']:.0f} image and"
        f" {lengths['text_tokens']:.0f} text tokens on average, {lengths['supervised']:.0f} supervised,"
        f" {lengths['padding']:.0%} padding."
        f" Times: on {on.name}, assumed to reach {on.utilization:.0%} of {_flops(on.bf16)}/s (bfloat16)"
        f" or {_flops(on.fp32)}/s (float32)."
    )
    console.print(_speed(found))
    console.print(_bytes(found, samples))
    own = found[0]
    console.print(_parts(own))
    console.print(_memory(own, on))
    if own.uncached_because:
        console.print(f"No cache: {own.uncached_because}")
    if steps:
        cached = "" if own.cached_seconds is None else f"; {_time(steps * own.cached_seconds)} from a full cache"
        console.print(f"The run: {steps} steps, {_time(steps * own.seconds)}{cached}.")


def _speed(found: Sequence[CostEstimate]) -> Table:
    """Operations and time of all policies."""
    full = next((one for one in found if one.plan.policy.startswith("Full(")), found[0])
    columns = ("trained", "FLOPs", "of full", "floor", "step", "cached")
    table = _table("A step of the run, and of other policies", "policy", columns)
    for one in found:
        table.add_row(
            one.plan.policy,
            f"{one.census.trainable / one.census.total:.1%}",
            _flops(one.run),
            f"{one.run / full.run:.0%}",
            f"{one.flops.floor / one.run:.0%}",
            _time(one.seconds),
            "-" if one.cached_seconds is None else _time(one.cached_seconds),
        )
    table.caption = "floor: the share of the FLOPs that the policy needs; cached: with the frozen prefix kept on disk"
    return table


def _bytes(found: Sequence[CostEstimate], samples: int) -> Table:
    """Memory, disk and network traffic of all policies."""
    columns = ("memory", "checkpoint", "sent a step", "cache" if samples else "cache of a row")
    table = _table("Bytes", "policy", columns)
    for one in found:
        table.add_row(
            one.plan.policy,
            size(one.memory.total),
            size(one.checkpoint),
            size(one.traffic) if one.traffic else "-",
            size(one.record * max(1, samples)) if one.cached is not None else "-",
        )
    return table


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _parts(one: CostEstimate) -> Table:
    """Least FLOPs of the run's own policy, by part of the model."""
    columns = ("forward", "input gradients", "weight gradients", "share")
    table = _table(f"Least FLOPs of a step: {one.plan.policy}", "part", columns)
    for name, part in one.flops.parts(one.plan).items():
        cells = (part.forward, part.input_gradients, part.weight_gradients)
        table.add_row(name, *(_flops(cell) if cell else "-" for cell in cells), f"{part.total / one.flops.floor:.1%}")
    return table


def _memory(one: CostEstimate, on: Device) -> Table:
    table = _table("Memory at the peak of a step, and parameters", "cause", ("size",))
    for field in fields(StepMemory):
        table.add_row(field.name, size(getattr(one.memory, field.name)))
    fits = f" of {size(on.memory)}" if on.memory else ""
    table.add_row(
        "sum", size(one.memory.total) + fits, style="bold" if one.memory.total <= (on.memory or 1e99) else "red"
    )
    for row in one.census.rows:
        table.add_row(row.region, f"{row.parameters / 1e6:.1f} M, {row.trainable / 1e6:.1f} M trained")
    return table


def size(count: float) -> str:
    """A number of bytes with its unit.

    Example:
        >>> size(3 * 2**20), size(1.5 * 2**30)
        ('3.0 MiB', '1.50 GiB')
    """
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _flops(count: float) -> str:
    for name, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= unit:
            return f"{count / unit:.3g} {name}FLOP"
    return f"{count:.0f} FLOP"


def _time(seconds: float) -> str:
    for limit, unit, name in ((1e-3, 1e-6, "us"), (1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 3600:.1f} h"


POLICIES: tuple[TuningPolicy, ...] = (
    Full(),
    IntermediateOnly(),
    LoRAOnMiddle(),
    ConnectorOnly(),
    EarlyLayers(),
    LateLayers(),
    UniformSparse(),
    RandomLayers(),
)
_BATCHES = 8


def plan(arguments: list[str]) -> int:
    """Tell what a run will cost; returns the exit status."""
    refuse_foreign_classes(arguments)
    cli = PlanningCLI(
        MMModule,
        MMDataModule,
        parser_class=Parser,
        auto_configure_optimizers=False,
        save_config_callback=None,
        seed_everything_default=0,
        load_from_checkpoint_support=False,
        run=False,
        args=arguments[1:],
    )
    config, module = cli.config, cli.config_init.model
    with batches_of(config, module, cli.config_init.data) as batches, _uncompiled():
        setting, on = _setting(config, module), find_device(config.device, _in_bf16(config, module))
        largest = max(batches, key=lambda batch: (batch.has_images, batch.regions.numel()))
        blueprint = MetaModel(module.backbone, largest, module.compute.packing)
        own = _fixed(module.tuning, blueprint.layout.num_layers)
        found: list[CostEstimate] = []
        for policy in (own, *(POLICIES if config.compare else ())):
            try:
                one = estimate_cost(blueprint, policy, batches, setting, on)
            except UserError as error:
                if policy is own:
                    raise
                log_decision("plan", f"without {policy.describe()}", error.what)
                continue
            if not any((one.plan.full, one.plan.adapted) == (each.plan.full, each.plan.adapted) for each in found):
                found.append(one)
    lengths = _lengths(batches)
    steps = int(config.trainer.max_steps) * setting.accumulate if config.trainer.max_steps > 0 else 0
    samples = _samples(cli.config_init.data)
    print_plan(Console(), found, lengths, on, steps=steps, samples=samples)
    if config.json:
        facts = {"device": on.name, "utilisation": on.utilization, "shape": lengths, "samples": samples, "steps": steps}
        Path(config.json).write_text(json.dumps({**facts, "policies": [one.to_dict() for one in found]}, indent=1))
    return 0


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Context without torch's compiler, which bitsandbytes would start when PEFT imports it (about a second)."""
    held = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE") if held is None else os.environ.update(TORCHDYNAMO_DISABLE=held)


class PlanningCLI(TrainingCLI):
    """The command line of ``fit`` with the options of ``plan``; no trainer is made and nothing is run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        listed = ", ".join(DEVICES)
        parser.add_argument("--device", type=str, default="measured", help=f"{listed}, cpu, or measured here.")
        parser.add_argument("--json", type=str | None, default=None, help="File to write everything to.")
        parser.add_argument("--compare", type=bool, default=True, help="Tell of the other policies too.")
        parser.add_argument("--image_tokens", type=int | None, default=None, help="Of a row, in place of data.train.")
        parser.add_argument("--text_tokens", type=int | None, default=None, help="The same; answers are text too.")
        parser.add_argument("--supervised", type=int | None, default=None, help="The same: tokens of the answers.")
        parser.add_argument("--batch_size", type=int | None, default=None, help="In place of data.batch_size.")

    def before_instantiate_classes(self) -> None:
        """Do nothing: no run directory is made."""

    def instantiate_classes(self) -> None:
        parts = Namespace(model=self.config.model, data=self.config.data)
        self.config_init = self.parser.instantiate_classes(parts)


@contextmanager
def batches_of(config: Namespace, module: MMModule, data: MMDataModule) -> Iterator[list[Batch]]:
    """Context with the run's first micro-batches, or with one of the given lengths."""
    data.num_workers = 0
    if config.batch_size is not None:
        data.batch_size = config.batch_size
    given = {name: config[name] for name in ("image_tokens", "text_tokens", "supervised")}
    if all(value is None for value in given.values()):
        if data.paths["train"] is None:
            raise UserError(
                "The lengths of rows are not known.",
                "Neither data.train nor lengths are given.",
                "Give --data.train FILE, or --image_tokens, --text_tokens and --supervised.",
            )
        yield list(islice(iter(data.train_dataloader()), _BATCHES))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = _Rows(module, data.batch_size, Path(folder))
        text, supervised = given["text_tokens"] or 64, given["supervised"] or 16
        yield [rows.of(given["image_tokens"], text, supervised)]


class _Rows:
    """Makes batches of rows of given lengths with the model's own processor.

    Args:
        module: Module whose backbone names the model.
        rows: Number of equal rows in a batch.
        folder: Folder that the rows are written to.
    """

    def __init__(self, module: MMModule, rows: int, folder: Path) -> None:
        self.module, self.rows, self.folder = module, rows, folder

    def of(self, image_tokens: int | None, text_tokens: int, supervised: int) -> Batch:
        """A batch of these lengths in tokens; models with a fixed image size keep their number of image tokens."""
        side, words, answer = 336, 8, 1
        for _ in range(3):
            batch = self._made(0 if image_tokens == 0 else side, words, answer)
            held = _lengths([batch])
            if image_tokens and held["image_tokens"]:
                side = max(28, round(side * (image_tokens / held["image_tokens"]) ** 0.5))
            answer = max(1, answer + supervised - round(held["supervised"]))
            words = max(1, words + text_tokens - supervised - round(held["text_tokens"] - held["supervised"]))
        if image_tokens and round(held["image_tokens"]) != image_tokens:
            log_decision(
                "plan", f"{held['image_tokens']:.0f} image tokens", f"the processor makes no picture of {image_tokens}"
            )
        return self._made(0 if image_tokens == 0 else side, words, answer)

    def _made(self, side: int, words: int, answer: int) -> Batch:
        row: dict[str, Any] = {"id": "row"}
        if side:
            Image.new("RGB", (side, side), "grey").save(self.folder / "picture.png")
            row["image"] = "picture.png"
        mark = "<image>\n" if side else ""
        turns = (("human", mark + " a" * words), ("gpt", "a" + " a" * (answer - 1)))
        row["conversations"] = [{"from": who, "value": text} for who, text in turns]
        file = self.folder / "rows.json"
        file.write_text(json.dumps([row] * self.rows))
        backbone = self.module.backbone
        options: dict[str, Any] = {"processor": backbone.path, "revision": backbone.revision, "max_length": None}
        data = MMDataModule(train=str(file), batch_size=self.rows, num_workers=0, **options)
        return next(iter(data.train_dataloader()))


def _setting(config: Namespace, module: MMModule) -> RunSettings:
    devices = config.trainer.devices
    ranks = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
    return RunSettings(
        compute=module.compute,
        bf16=config.trainer.precision == "bf16-mixed",
        checkpointing=module.activation_checkpointing,
        optimizer=module.optimizer.name,
        ranks=ranks * int(config.trainer.num_nodes),
        accumulate=int(config.trainer.accumulate_grad_batches),
    )


def _in_bf16(config: Namespace, module: MMModule) -> bool:
    return config.trainer.precision == "bf16-mixed" or module.backbone.dtype == "bfloat16"


def _fixed(policy: TuningPolicy, num_layers: int) -> TuningPolicy:
    """The policy with ``layers: auto`` replaced by the default range: choosing layers needs weights."""
    if not auto_layers_option(policy):
        return policy
    count = count_layers("25%-50%", num_layers)
    first = num_layers // 4
    log_decision("model.tuning.layers", "25%-50%", "auto is chosen by reading the model, and plan has no weights")
    return with_layers(policy, tuple(range(first, first + count)))


def _lengths(batches: list[Batch]) -> dict[str, float]:
    """Mean tokens per row by region, rows per micro-batch, and fraction of padding."""
    rows = sum(len(batch) for batch in batches)
    image = sum(int((batch.regions == TokenRegion.IMAGE).sum()) for batch in batches)
    tokens = sum(len(batch.real) for batch in batches)
    return {
        "rows": rows / len(batches),
        "image_tokens": image / rows,
        "text_tokens": (tokens - image) / rows,
        "supervised": sum(batch.num_supervised for batch in batches) / rows,
        "padding": 1 - tokens / sum(batch.regions.numel() for batch in batches),
    }


def _samples(data: MMDataModule) -> int:
    return len(data.samples("train")) if data.paths["train"] is not None else 0
