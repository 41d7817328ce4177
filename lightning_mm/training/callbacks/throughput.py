"""Throughput of training over all ranks (tokens, samples, FLOPs per second), and where the wall time of a run goes.

Data flow: Batches -> ``BatchCounter``, wall clock -> ``TrainingClock`` -> at the trainer's logging interval one device
synchronization and one ``IntervalTotals`` per rank -> all-gather -> ``throughput_metrics``, logged by ``metric_names``.
"""

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mm.core import metric_names
from lightning_mm.core.decisions import log, log_decision
from lightning_mm.data.batch import Batch
from lightning_mm.data.dataloader import CheckedDataLoader
from lightning_mm.planning.devices import compute_dtype, measured_peak, synchronize
from lightning_mm.planning.flops import StepCost
from lightning_mm.training.callbacks.checkpoints import LastCheckpoint
from lightning_mm.training.callbacks.step_cost import BatchCounter
from lightning_mm.training.eval_context import data_of, live
from lightning_mm.training.run_length import total_steps


@dataclass(frozen=True)
class ElapsedTime:
    """Seconds up to a moment, by activity; only differences are meaningful.

    Args:
        wall: Wall time.
        waiting: Waiting for the next training batch; part of training.
        validation: From the start of a validation to the next training step without waiting for data; includes
            scores, ``best.ckpt`` and the report.
        inspection: Inspection callbacks.
        checkpoints: Writing ``last.ckpt``.
    """

    wall: float
    waiting: float
    validation: float
    inspection: float
    checkpoints: float

    @property
    def training(self) -> float:
        """Wall time without validation, inspections and checkpoints."""
        return self.wall - self.validation - self.inspection - self.checkpoints

    def since(self, earlier: "ElapsedTime") -> "ElapsedTime":
        """Seconds between ``earlier`` and this moment, by activity; none is negative."""
        pairs = zip(astuple(self), astuple(earlier), strict=True)
        return ElapsedTime(*(max(0.0, late - early) for late, early in pairs))

    def __str__(self) -> str:
        parts = {"validation": self.validation, "looks inside": self.inspection, "checkpoints": self.checkpoints}
        aside = "".join(f", {name} {seconds:.1f} s" for name, seconds in parts.items() if seconds)
        return f"{self.wall:.1f} s: training {self.training:.1f} s (waiting for data {self.waiting:.1f} s){aside}"


@runtime_checkable
class HasInspectionTime(Protocol):
    """A callback with time that does not count as training (see ``LayerCallback``)."""

    inspection_seconds: float


class TrainingClock:
    """Measures ``ElapsedTime``; between ``pause`` and ``resume`` all but waiting for data counts as validation.

    Args:
        trainer: The trainer, with its callbacks and training data loader.
        module: The LightningModule in training; its device is synchronized before each reading.
    """

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._validation = 0.0
        self._paused: float | None = None

    def elapsed(self) -> ElapsedTime:
        """Seconds so far, after a device synchronization."""
        synchronize(self._module.device)
        waited, inspection, checkpoints = self._counted()
        return ElapsedTime(time.perf_counter(), waited, self._validation, inspection, checkpoints)

    def pause(self) -> None:
        """Stop counting training time."""
        synchronize(self._module.device)
        self._paused = time.perf_counter() - sum(self._counted())

    def resume(self) -> None:
        """Count training time again; no effect if it is not paused.

        What is counted by itself (waiting, inspections, checkpoints) and fell into the pause is no validation too.
        """
        if self._paused is not None:
            self._validation += time.perf_counter() - sum(self._counted()) - self._paused
            self._paused = None

    def _counted(self) -> tuple[float, float, float]:
        """Seconds of waiting, inspections and checkpoints so far, which are counted where they are spent."""
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
        inspection = sum(
            callback.inspection_seconds for callback in callbacks if isinstance(callback, HasInspectionTime)
        )
        checkpoints = sum(callback.seconds for callback in callbacks if isinstance(callback, LastCheckpoint))
        return self._waited(), inspection, checkpoints

    def _waited(self) -> float:
        loader = self._trainer.train_dataloader
        return loader.waited if isinstance(loader, CheckedDataLoader) else 0.0


@dataclass(frozen=True)
class IntervalTotals:
    """Totals of one rank over one logging interval.

    Args:
        samples: Conversations.
        supervised: Supervised tokens.
        tokens: Tokens without padding.
        image_tokens: Image tokens.
        positions: Tokens with padding.
        flops: Minimum FLOPs that the policy needs for them; nan where they could not be counted.
        seconds: Seconds of training, including waiting for data.
        waiting: Seconds of waiting for data.
        peak: Measured FLOP/s of matrix products on this rank; nan where they could not be measured.
        memory: Peak memory so far, GiB.
    """

    samples: float
    supervised: float
    tokens: float
    image_tokens: float
    positions: float
    flops: float
    seconds: float
    waiting: float
    peak: float
    memory: float


def throughput_metrics(ranks: Sequence[IntervalTotals]) -> dict[str, float]:
    """Throughput metrics of all ranks together; undefined metrics (nan) are left out.

    Ranks wait for each other, so the interval is equally long on all of them. Only rank 0 knows the time of the
    analyses during which the others wait, so the smallest training time is the right one; the longest wait for data
    delays all ranks.

    Args:
        ranks: One ``IntervalTotals`` per rank, of the same interval.
    """
    seconds = max(min(rank.seconds for rank in ranks), 1e-9)
    flops = sum(rank.flops for rank in ranks) / seconds
    found = {
        metric_names.SUPERVISED_TOKENS_PER_SECOND: sum(rank.supervised for rank in ranks) / seconds,
        metric_names.TOKENS_PER_SECOND: sum(rank.tokens for rank in ranks) / seconds,
        metric_names.IMAGE_TOKENS_PER_SECOND: sum(rank.image_tokens for rank in ranks) / seconds,
        metric_names.SAMPLES_PER_SECOND: sum(rank.samples for rank in ranks) / seconds,
        metric_names.TFLOPS: flops / 1e12,
        metric_names.MFU: flops / sum(rank.peak for rank in ranks),
        metric_names.DATA_WAIT: min(1.0, max(rank.waiting for rank in ranks) / seconds),
        metric_names.PADDING: 1 - sum(rank.tokens for rank in ranks) / max(1.0, sum(rank.positions for rank in ranks)),
        metric_names.PEAK_MEMORY: max(rank.memory for rank in ranks),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


class Throughput(Callback):
    """Logs throughput of all ranks over the steps since it was last logged.

    Waiting for data, the optimizer and per-step callbacks count as training time; validation, inspections and
    checkpoints do not. FLOPs are the minimum that the policy needs (``planning.flops``): recomputation and padding do
    not count.
    """

    def __init__(self) -> None:
        self._work = BatchCounter()
        self._clock: TrainingClock | None = None
        self._begun: ElapsedTime | None = None
        self._read: ElapsedTime | None = None
        self._said = -1
        self._cost: StepCost | None = None
        self._peak = math.nan

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock, self._begun, self._work = TrainingClock(trainer, pl_module), None, BatchCounter()
        every, total = _log_interval(trainer), total_steps(trainer)
        if total is None or total // every > trainer.global_step // every:
            self._cost = _step_cost(trainer, pl_module)
            self._peak = _peak_flops(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        assert self._clock is not None
        self._clock.resume()
        if self._begun is None:
            if pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pl_module.device)
            self._begun = self._read = self._clock.elapsed()
            self._said = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._clock is not None and self._begun is not None:
            self._clock.pause()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        self._work.add(batch)
        step = trainer.global_step
        if step == self._said or step % _log_interval(trainer):
            return
        assert self._clock is not None
        assert self._read is not None
        now = self._clock.elapsed()
        mine = self._interval(now.since(self._read), pl_module)
        for name, value in throughput_metrics(_gather_ranks(mine, trainer, pl_module)).items():
            pl_module.log(name, value, prog_bar=name == metric_names.SUPERVISED_TOKENS_PER_SECOND)
        self._read, self._said = now, step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._clock is not None and self._begun is not None:
            self._clock.resume()
            if trainer.is_global_zero:
                log.info("time: %s", self._clock.elapsed().since(self._begun))

    def _interval(self, elapsed: ElapsedTime, module: L.LightningModule) -> IntervalTotals:
        done = self._work.take()
        return IntervalTotals(
            samples=done.samples,
            supervised=done.shape.supervised,
            tokens=done.shape.tokens,
            image_tokens=done.image_tokens,
            positions=done.positions,
            flops=math.nan if self._cost is None else done.flops(self._cost, live(module).plan),
            seconds=elapsed.training,
            waiting=elapsed.waiting,
            peak=self._peak,
            memory=_peak_memory(module.device),
        )


def _log_interval(trainer: L.Trainer) -> int:
    """Optimizer steps between two logged values."""
    return max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set by its logger connector


def _gather_ranks(mine: IntervalTotals, trainer: L.Trainer, module: L.LightningModule) -> list[IntervalTotals]:
    if trainer.world_size == 1:
        return [mine]
    row = torch.tensor(astuple(mine), dtype=torch.float64, device=module.device)
    gathered = trainer.strategy.all_gather(row)
    assert isinstance(gathered, Tensor)
    return [IntervalTotals(*values) for values in gathered.reshape(-1, len(row)).tolist()]


def _step_cost(trainer: L.Trainer, module: L.LightningModule) -> StepCost | None:
    try:
        return StepCost.of(live(module).mm, live(module).plan, data_of(trainer).example_batch())
    except Exception as error:  # training goes on without it
        log_decision("throughput.flops", "not counted", f"{type(error).__name__}: {error}")
        return None


def _peak_flops(trainer: L.Trainer, module: L.LightningModule) -> float:
    """Measured FLOP/s of matrix products in the run's precision; logs it and the source of the memory metric."""
    if module.device.type == "cuda":
        log_decision(
            "throughput.memory", "tensors on the GPU", "the highest sum of the allocator since the first batch"
        )
    else:
        log_decision("throughput.memory", "resident set of the process", "its highest since it began, loading included")
    dtype = compute_dtype(live(module).mm.model, str(trainer.precision))
    try:
        peak = measured_peak(module.device, dtype)
    except RuntimeError as error:  # out of memory, or a type without products on this device
        log_decision("throughput.peak", "not measured", f"{type(error).__name__}: {error}")
        return math.nan
    finally:
        if module.device.type == "cuda":
            torch.cuda.empty_cache()  # release the benchmark's matrices
    reason = f"median of large matrix products in {str(dtype).removeprefix('torch.')} on this {module.device.type}"
    log_decision("throughput.peak", f"{peak / 1e12:.3g} TFLOP/s", f"{reason}; MFU is a share of it")
    return peak


def _peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: allocated tensors on CUDA, resident set of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest * (1 if sys.platform == "darwin" else 1024) / 2**30
