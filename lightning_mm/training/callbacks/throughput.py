"""How fast training goes, and what holds it up: tokens, samples and arithmetic per second, and the share of each loss.

Data flow: Batches -> ``work`` and the clock -> at the trainer's own logging interval one wait for the device and one
exchange between the ranks -> ``rates``, logged.

Where the time of a run goes: training (waiting for data as a part of it), validation, looks inside, checkpoints.

Data flow: the loader, the callbacks that know what they cost, and the wall clock -> ``Clock.spent`` -> differences.

How fast the ranks were in an interval, all of them together.

Data flow: one ``Interval`` of each rank -> ``rates``, by the keys of ``names``.
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
from lightning_mm.planning.devices import benchmark_matmul, compute_dtype, synchronize
from lightning_mm.planning.flops import StepCost
from lightning_mm.training.callbacks.checkpoints import LastCheckpoint
from lightning_mm.training.callbacks.step_cost import BatchCounter
from lightning_mm.training.eval_context import data_of, live


@dataclass(frozen=True)
class Spent:
    """Seconds up to some moment; only differences mean anything.

    Args:
        wall: All of them.
        waiting: Waiting for the next training batch; training time.
        validation: From its start to the next step, but for waiting: scores, ``best.ckpt`` and the report are in it.
        looks: Looking inside.
        checkpoints: Writing ``last.ckpt``.
    """

    wall: float
    waiting: float
    validation: float
    looks: float
    checkpoints: float

    @property
    def training(self) -> float:
        """What is left for training."""
        return self.wall - self.validation - self.looks - self.checkpoints

    def since(self, earlier: "Spent") -> "Spent":
        """What was spent in between."""
        pairs = zip(astuple(self), astuple(earlier), strict=True)
        return Spent(*(max(0.0, late - early) for late, early in pairs))

    def __str__(self) -> str:
        parts = {"validation": self.validation, "looks inside": self.looks, "checkpoints": self.checkpoints}
        aside = "".join(f", {name} {seconds:.1f} s" for name, seconds in parts.items() if seconds)
        return f"{self.wall:.1f} s: training {self.training:.1f} s (waiting for data {self.waiting:.1f} s){aside}"


@runtime_checkable
class Inspects(Protocol):
    """A callback that spends time on looking inside the model; that time is no training."""

    inspection_seconds: float


class Clock:
    """Reads what was spent; between ``leave`` and ``back`` all but waiting for data counts as validation."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._validation = 0.0
        self._left: tuple[float, float] | None = None

    def spent(self) -> Spent:
        """What was spent so far, once the device has done what it was told to."""
        synchronize(self._module.device)
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
        looks = sum(callback.inspection_seconds for callback in callbacks if isinstance(callback, Inspects))
        saves = sum(callback.seconds for callback in callbacks if isinstance(callback, LastCheckpoint))
        return Spent(time.perf_counter(), self._waited(), self._validation, looks, saves)

    def leave(self) -> None:
        """What comes now is not training."""
        synchronize(self._module.device)
        self._left = time.perf_counter(), self._waited()

    def back(self) -> None:
        """Training goes on; without effect if it was never left."""
        if self._left is not None:
            began, waited = self._left
            self._validation += time.perf_counter() - began - (self._waited() - waited)
            self._left = None

    def _waited(self) -> float:
        loader = self._trainer.train_dataloader
        return loader.waited if isinstance(loader, CheckedDataLoader) else 0.0


@dataclass(frozen=True)
class Interval:
    """What one rank did between two readings.

    Args:
        samples: Conversations.
        supervised: Tokens whose prediction was trained.
        tokens: All tokens but padding.
        image_tokens: Those that stand for pictures.
        positions: Tokens and padding.
        flops: What the policy needs at least for them; nan where it could not be counted.
        seconds: Of training, waiting for data included.
        waiting: Of these, waiting for data.
        peak: FLOP/s of this rank's matrix products; nan where they could not be measured.
        memory: GiB held at once so far.
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


def rates(ranks: Sequence[Interval]) -> dict[str, float]:
    """Rates of all ranks together; what is not known is left out.

    Ranks wait for each other, so they took equally long; the one that knows of most time that was no training (rank 0
    analyses looks inside while the others wait for it) knows best, and the one that waited longest for data held up
    all.
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
    """Rates over the steps since they were last logged, of all ranks together.

    Waiting for data counts, as do the optimizer and what other callbacks do at each step; validation, looks inside and
    checkpoints do not. FLOPs are those that the policy needs at least (``tuning.flops``): what is computed twice, or
    for padding, is no use.
    """

    def __init__(self) -> None:
        self._work = BatchCounter()
        self._clock: Clock | None = None
        self._begun: Spent | None = None
        self._read: Spent | None = None
        self._said = -1
        self._cost: StepCost | None = None
        self._peak = math.nan

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock, self._begun, self._work = Clock(trainer, pl_module), None, BatchCounter()
        every, total = _every(trainer), int(trainer.estimated_stepping_batches)
        if total // every > trainer.global_step // every:
            self._cost = _cost(trainer, pl_module)
            self._peak = _peak(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        assert self._clock is not None
        self._clock.back()
        if self._begun is None:
            if pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pl_module.device)
            self._begun = self._read = self._clock.spent()
            self._said = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._clock is not None and self._begun is not None:
            self._clock.leave()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        self._work.add(batch)
        step = trainer.global_step
        if step == self._said or step % _every(trainer):
            return
        assert self._clock is not None
        assert self._read is not None
        now = self._clock.spent()
        mine = self._interval(now.since(self._read), pl_module)
        for name, value in rates(_of_all_ranks(mine, trainer, pl_module)).items():
            pl_module.log(name, value, prog_bar=name == metric_names.SUPERVISED_TOKENS_PER_SECOND)
        self._read, self._said = now, step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._clock is not None and self._begun is not None:
            self._clock.back()
            if trainer.is_global_zero:
                log.info("time: %s", self._clock.spent().since(self._begun))

    def _interval(self, spent: Spent, module: L.LightningModule) -> Interval:
        done = self._work.take()
        return Interval(
            samples=done.samples,
            supervised=done.shape.supervised,
            tokens=done.shape.tokens,
            image_tokens=done.image_tokens,
            positions=done.positions,
            flops=math.nan if self._cost is None else done.flops(self._cost, live(module).plan),
            seconds=spent.training,
            waiting=spent.waiting,
            peak=self._peak,
            memory=_memory(module.device),
        )


def _every(trainer: L.Trainer) -> int:
    """Steps between two readings."""
    return max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set by its logger connector


def _of_all_ranks(mine: Interval, trainer: L.Trainer, module: L.LightningModule) -> list[Interval]:
    if trainer.world_size == 1:
        return [mine]
    row = torch.tensor(astuple(mine), dtype=torch.float64, device=module.device)
    gathered = trainer.strategy.all_gather(row)
    assert isinstance(gathered, Tensor)
    return [Interval(*values) for values in gathered.reshape(-1, len(row)).tolist()]


def _cost(trainer: L.Trainer, module: L.LightningModule) -> StepCost | None:
    try:
        return StepCost.of(live(module).mm, live(module).plan, data_of(trainer).example_batch())
    except Exception as error:  # training does not need it
        log_decision("throughput.flops", "not counted", f"{type(error).__name__}: {error}")
        return None


def _peak(trainer: L.Trainer, module: L.LightningModule) -> float:
    """FLOP/s of matrix products in the run's precision; said, as is where memory is read."""
    if module.device.type == "cuda":
        log_decision(
            "throughput.memory", "tensors on the GPU", "the highest sum of the allocator since the first batch"
        )
    else:
        log_decision("throughput.memory", "resident set of the process", "its highest since it began, loading included")
    dtype = compute_dtype(live(module).mm.model, str(trainer.precision))
    try:
        peak = benchmark_matmul(module.device, dtype)
    except RuntimeError as error:  # out of memory, or a type without products on this device
        log_decision("throughput.peak", "not measured", f"{type(error).__name__}: {error}")
        return math.nan
    finally:
        if module.device.type == "cuda":
            torch.cuda.empty_cache()  # what was multiplied here is of no use to training
    reason = f"median of large matrix products in {str(dtype).removeprefix('torch.')} on this {module.device.type}"
    log_decision("throughput.peak", f"{peak / 1e12:.3g} TFLOP/s", f"{reason}; MFU is a share of it")
    return peak


def _memory(device: torch.device) -> float:
    """GiB that were held at once."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest * (1 if sys.platform == "darwin" else 1024) / 2**30
