"""What a fit finds out on its own rows before the first step: parameters that nothing reads, and the cache.

Data flow: model + trainer + data module -> names of unused parameters; settings of the cache -> an open cache, or the
reason why there is none.
"""

import math
from dataclasses import replace

import lightning as L
import torch

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.example_batches import mixed_batch
from lightning_mm.execution.cache.activation_cache import CacheSettings
from lightning_mm.execution.connector_init import scale_connector
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.execution.step import TrainingStep
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region
from lightning_mm.training.unreached import regions_without_rows
from lightning_mm.tuning.policy import TuningPlan
from lightning_mm.tuning.unused_parameters import unused_parameters

_NUM_MEASURED_ROWS = 64
"""Rows with pictures on which the norm of a connector's tokens is measured."""


def find_unread(mm: MultimodalModel, plan: TuningPlan, trainer: L.Trainer, data: MMDataModule) -> tuple[str, ...]:
    """Names of parameters that the plan trains and the forward pass of a row with an image never uses."""
    if plan.modes[Region.VISION] == plan.modes[Region.CONNECTOR] == "frozen":
        return ()
    with torch.device("cpu"):  # Lightning configures models with the accelerator as the default device
        batch = data.example_batch()
    if not batch.has_images:
        regions = ", ".join(regions_without_rows(plan.modes))
        log_decision("model.tuning", f"{regions}: stays as it is", "no row of data.train has a picture")
        return ()
    device = trainer.strategy.root_device
    mm.model.to(device)
    with trainer.precision_plugin.forward_context():
        return unused_parameters(mm, lambda: supervised_nll(mm.model, mm.head, batch.to(device)).nll)


def start_at_stream_norm(mm: MultimodalModel, plan: TuningPlan, trainer: L.Trainer, data: MMDataModule | None) -> None:
    """Scale a new connector before the first step; see ``execution.connector_init``.

    Args:
        mm: The model under its plan, with its processor.
        plan: What trains.
        trainer: The trainer of the fit; all of its ranks use what rank 0 measures.
        data: Whose first rows with pictures are measured; None takes a synthetic picture.
    """
    device = trainer.strategy.root_device
    with torch.device("cpu"):
        batch = None if data is None else next(iter(data.sample_batches(1, _NUM_MEASURED_ROWS)), None)
    mm.model.to(device)
    scale_connector(mm, plan, None if batch is None else batch.to(device), trainer.strategy.broadcast)


def begin_steps(
    step: TrainingStep, settings: CacheSettings, trainer: L.Trainer, data: MMDataModule, before: bool | None
) -> None:
    """Prove the step on rows of this fit, and open its cache; the model is on the trainer's device.

    Args:
        step: The prepared step.
        settings: Of the cache.
        trainer: The trainer of the fit.
        data: Where its rows come from.
        before: Whether the run that goes on had a cache; None where no run goes on.
    """
    prove_step(step, trainer, data)
    open_cache(step, settings, trainer, data, before)
    prove_sharing(step, trainer, data)


def open_cache(
    step: TrainingStep, settings: CacheSettings, trainer: L.Trainer, data: MMDataModule, before: bool | None
) -> None:
    """Decide whether this fit caches frozen activations, and open their store if so; see ``TrainingStep.open_cache``.

    Args:
        step: The prepared step, its model on the trainer's device.
        settings: Of the cache.
        trainer: The trainer of the fit.
        data: Where its rows come from.
        before: Whether the run that goes on had a cache, which 'auto' stays with: activations from a cache differ in
            their last bits. None where no run goes on.
    """
    epochs = math.inf if before else _times_seen(trainer, data)
    if before is False and settings.mode == "auto":
        log_decision("model.cache", "off", "the run that goes on began without one")
        settings = replace(settings, mode="off")
    model = step.mm.transformers
    facts = {
        "precision": str(trainer.precision),
        "dtype": str(model.dtype),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "max_length": data.max_length,
        "device": trainer.strategy.root_device.type,
        "hardware": _hardware(trainer.strategy.root_device),
        "matmul": torch.get_float32_matmul_precision(),
    }

    def example(count: int) -> Batch:
        return data.example_batch(count).to(trainer.strategy.root_device)

    with trainer.precision_plugin.forward_context():
        step.open_cache(settings, data.collator(), example, epochs, facts)


def prove_step(step: TrainingStep, trainer: L.Trainer, data: MMDataModule) -> None:
    """Prove on this run's rows that the prepared step computes the family's own losses; see ``TrainingStep.prove``.

    Args:
        step: The prepared step, its model on the trainer's device.
        trainer: The trainer of the fit.
        data: Where its rows come from.
    """
    with torch.device("cpu"):  # Lightning configures optimizers with the accelerator as the default device
        batch = None if data.paths["train"] is None else mixed_batch(data.samples("train"), data.collator())
    if batch is None:
        return
    try:
        with trainer.precision_plugin.forward_context():
            step.prove(batch.to(trainer.strategy.root_device))
    except torch.OutOfMemoryError:
        log_decision("model.compute", "not proved", f"{len(batch)} rows do not fit in memory with and without padding")
        torch.cuda.empty_cache()


def _hardware(device: torch.device) -> str:
    """What the last bits of a result depend on besides the type of the device: another one adds in another order."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def prove_sharing(step: TrainingStep, trainer: L.Trainer, data: MMDataModule) -> None:
    """Prove on this run's rows that those which share pictures train as if each stood alone, where they are to.

    Args:
        step: The prepared step, its model on the trainer's device.
        trainer: The trainer of the fit.
        data: Where its rows come from.

    Raises:
        UserError: They do not.
    """
    batch = data.shared_example() if data.share_images and data.paths["train"] is not None else None
    if batch is not None:
        with trainer.precision_plugin.forward_context():
            step.verify_sharing(batch.to(trainer.strategy.root_device))


def _times_seen(trainer: L.Trainer, data: MMDataModule) -> float:
    """How often a run sees a row, on average; once, where the number of rows is not known."""
    num_rows = data.rows.num_train_rows
    if num_rows is None:
        return 1.0
    seen = trainer.max_steps * trainer.accumulate_grad_batches * data.rows_per_batch * trainer.world_size
    if trainer.max_steps < 0:
        seen = (trainer.max_epochs or 1) * data.rows.mixture.num_rows
    return seen / num_rows


def refuse_cache(settings: CacheSettings, why: str) -> None:
    """Log that there is no cache and why; raise a ``UserError`` if it was asked for."""
    if settings.mode == "on":
        raise UserError("model.cache.mode: on is not possible here.", why, "Leave it at auto.")
    if settings.mode == "auto":
        log_decision("model.cache", "off", why)
