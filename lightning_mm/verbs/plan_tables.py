"""The tables of a plan: operations, bytes, parts and memory of every policy.

Data flow: ``CostEstimate``s, mean lengths, device -> tables and sentences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields

from rich.table import Table

from lightning_mm.planning.cost_estimate import CostEstimate
from lightning_mm.planning.devices import Device
from lightning_mm.planning.memory import StepMemory


def plan_tables(
    found: Sequence[CostEstimate], lengths: Mapping[str, float], on: Device, steps: int, samples: int
) -> list[Table | str]:
    """All tables and sentences, in order.

    Args:
        found: Estimates, that of the run's own policy first.
        lengths: Mean lengths per row, as ``PlanResult`` has them.
        on: Device that seconds are predicted for.
        steps: Number of micro-batches of the run; 0: not known.
        samples: Number of training samples; 0: not known.
    """
    own = found[0]
    shared = (
        f", {lengths['shared']:.0%} of the tokens shared by rows with the same picture" if lengths["shared"] else ""
    )
    shown: list[Table | str] = [
        f"A step: {lengths['rows']:.3g} rows of {lengths['image_tokens']:.0f} image and"
        f" {lengths['text_tokens']:.0f} text tokens on average, {lengths['supervised']:.0f} supervised,"
        f" {lengths['padding']:.0%} padding{shared}."
        f" Times: on {on.name}, assumed to reach {on.utilization:.0%} of {_flops(on.bf16)}/s (bfloat16)"
        f" or {_flops(on.fp32)}/s (float32).",
        _speed(found),
        _bytes(found, samples),
        _parts(own),
        _memory(own, on),
    ]
    if own.uncached_because:
        shown.append(f"No cache: {own.uncached_because}")
    if steps:
        cached = "" if own.cached_seconds is None else f"; {_time(steps * own.cached_seconds)} from a full cache"
        shown.append(f"The run: {steps} steps, {_time(steps * own.seconds)}{cached}.")
    return shown


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
    table = _table(f"FLOPs that a step of {one.plan.policy} needs at least, by part", "part", columns)
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
