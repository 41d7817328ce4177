"""How fast training goes, and what holds it up: tokens, samples and arithmetic per second, and the share of each loss.

Data flow: Batches -> ``work`` and the clock -> at the trainer's own logging interval one wait for the device and one
exchange between the ranks -> ``rates``, logged.
"""

import math
import resource
import sys
from dataclasses import astuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mm.callbacks.clock import Clock, Spent
from lightning_mm.callbacks.live import data_of, live
from lightning_mm.callbacks.rates import Interval, rates
from lightning_mm.callbacks.work import Work
from lightning_mm.dashboards import names
from lightning_mm.data.batch import Batch
from lightning_mm.decisions import decide, log
from lightning_mm.tuning.flops import StepCost
from lightning_mm.tuning.peak import compute_dtype, matmul_peak


class Throughput(Callback):
    """Rates over the steps since they were last logged, of all ranks together.

    Waiting for data counts, as do the optimizer and what other callbacks do at each step; validation, looks inside and
    checkpoints do not. FLOPs are those that the policy needs at least (``tuning.flops``): what is computed twice, or
    for padding, is no use.
    """

    def __init__(self) -> None:
        self._work = Work()
        self._clock: Clock | None = None
        self._begun: Spent | None = None
        self._read: Spent | None = None
        self._said = -1
        self._cost: StepCost | None = None
        self._peak = math.nan

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock, self._begun, self._work = Clock(trainer, pl_module), None, Work()
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
            pl_module.log(name, value, prog_bar=name == names.SUPERVISED_TOKENS_PER_SECOND)
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
        return StepCost.of(
            live(module).model, live(module).anatomy, live(module).plan, data_of(trainer).example_batch()
        )
    except Exception as error:  # training does not need it
        decide("throughput.flops", "not counted", f"{type(error).__name__}: {error}")
        return None


def _peak(trainer: L.Trainer, module: L.LightningModule) -> float:
    """FLOP/s of matrix products in the run's precision; said, as is where memory is read."""
    if module.device.type == "cuda":
        decide("throughput.memory", "tensors on the GPU", "the highest sum of the allocator since the first batch")
    else:
        decide("throughput.memory", "resident set of the process", "its highest since it began, loading included")
    dtype = compute_dtype(live(module).model, str(trainer.precision))
    try:
        peak = matmul_peak(module.device, dtype)
    except RuntimeError as error:  # out of memory, or a type without products on this device
        decide("throughput.peak", "not measured", f"{type(error).__name__}: {error}")
        return math.nan
    finally:
        if module.device.type == "cuda":
            torch.cuda.empty_cache()  # what was multiplied here is of no use to training
    reason = f"median of large matrix products in {str(dtype).removeprefix('torch.')} on this {module.device.type}"
    decide("throughput.peak", f"{peak / 1e12:.3g} TFLOP/s", f"{reason}; MFU is a share of it")
    return peak


def _memory(device: torch.device) -> float:
    """GiB that were held at once."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest * (1 if sys.platform == "darwin" else 1024) / 2**30
