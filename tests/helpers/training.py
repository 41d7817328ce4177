"""Short real training runs on tiny models, as the command line would set them up, and callbacks that observe them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.execution.cache.activation_cache import CacheSettings
from lightning_mm.execution.connector_init import ConnectorInit
from lightning_mm.execution.prepare import Compute
from lightning_mm.layer_selection.select import AutoRange
from lightning_mm.models.loading import Backbone
from lightning_mm.training.callbacks.teardown import TeardownAfterException
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import (
    ConnectorOnly,
    EarlyLayers,
    Full,
    IntermediateOnly,
    LateLayers,
    LoRA,
    LoRAOnMiddle,
    PerRegion,
    RandomLayers,
    TuningPolicy,
    UniformSparse,
)
from lightning_mm.tuning.optimizer import OptimizerSettings
from tests.helpers.data import Data

POLICIES: dict[str, TuningPolicy] = {
    "full": Full(),
    "vision too": Full(vision="full"),
    "intermediate": IntermediateOnly(layers="1-2"),
    "lora": LoRAOnMiddle(layers="1-2", lora=LoRA(r=4, dropout=0.1)),
    "connector": ConnectorOnly(),
    "early": EarlyLayers(budget="1-2"),
    "late": LateLayers(budget="1-2"),
    "uniform": UniformSparse(budget="1-2"),
    "random": RandomLayers(budget="1-2"),
    "mixed": PerRegion(layers="2", layers_mode="lora", connector="full", norm="full", lora=LoRA(r=2)),
}
"""What training is tried with on every family."""
MIDDLE = IntermediateOnly(layers="2")
DROPOUT = LoRAOnMiddle(layers="1-2", lora=LoRA(r=4, dropout=0.3))
"""Dropout draws from the global generator at every step: a resumed run without its state would differ."""


class _OnStart(Callback):
    def __init__(self, call: Callable[[MMModule], None]) -> None:
        self.call = call

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, MMModule)
        self.call(pl_module)


class BareModule(MMModule):
    """A module whose runs write no folder, evaluate nothing and measure no throughput unless a test says so."""

    def configure_callbacks(self) -> list[Callback]:
        return [TeardownAfterException()]


def scale_of(name: str, gradients: Mapping[str, Tensor]) -> Tensor:
    """Tells how large a gradient's rounding is: itself, or the weight beside a key's bias, which moves no softmax."""
    return gradients[name.removesuffix("bias") + "weight" if name.endswith("k_proj.bias") else name]


def losses_of(module: MMModule, batch: Batch, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Summed NLL before each of some steps on one batch."""
    losses = []
    for _ in range(steps):
        loss = module.objective(batch).nll
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train(
    model: Path,
    data: Mapping[str, Any],
    folder: Path,
    *,
    tuning: TuningPolicy | None = None,
    optimizer: OptimizerSettings | None = None,
    data_options: Mapping[str, Any] = MappingProxyType({}),
    on_start: Callable[[MMModule], None] | None = None,
    batch_size: int = 2,
    num_workers: int = 0,
    max_length: int | None = None,
    callbacks: list[Callback] | None = None,
    ckpt_path: Path | None = None,
    activation_checkpointing: bool = False,
    auto: AutoRange | None = None,
    compute: Compute | None = None,
    cache: CacheSettings | None = None,
    connector_init: ConnectorInit = "keep",
    skip_nonfinite: int = 0,
    **trainer_options: Any,
) -> tuple[MMModule, L.Trainer]:
    """Fit on the files, or sources, of each split; returns the module and its trainer."""
    L.seed_everything(0, verbose=False)
    module = BareModule(
        Backbone(path=str(model)),
        tuning,
        optimizer or OptimizerSettings(lr=1e-2),
        activation_checkpointing=activation_checkpointing,
        auto=auto or AutoRange(),
        compute=compute or Compute(),
        cache=cache or CacheSettings(mode="off"),
        connector_init=connector_init,
        skip_nonfinite=skip_nonfinite,
    )
    files = {split: str(given) if isinstance(given, Path) else given for split, given in data.items()}
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "max_length": max_length}
    datamodule = MMDataModule(**files, **options, **data_options, processor=str(model))
    trainer = L.Trainer(
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks or ()),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[*(callbacks or []), *([_OnStart(on_start)] if on_start else [])],
        **{"accelerator": "cpu", "devices": 1, "limit_val_batches": 0, **trainer_options},
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


def configured(folder: Path, tuning: TuningPolicy, **options: bool) -> MMModule:
    """A module with its model loaded and its policy applied, without a trainer."""
    module = MMModule(Backbone(path=str(folder)), tuning, **options)
    module.configure_model()
    return module


class SaveAt(Callback):
    """Saves after an optimizer step, and ends the run there as a kill would: nothing after it is kept."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


class Losses(Callback):
    """Keeps the training loss of every optimizer step."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if "train/loss" in trainer.callback_metrics:  # not before the first optimizer step
            self.by_step[trainer.global_step] = float(trainer.callback_metrics["train/loss"])


def train_losses(
    model: Path, data: Data, folder: Path, **options: Any
) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """Fit for 12 steps; returns the loss of each and the trained weights."""
    observed = Losses()
    module, _ = train(model, data, folder, callbacks=[observed], **{"max_steps": 12, "tuning": MIDDLE, **options})
    return observed.by_step, {name: p.detach().clone() for name, p in module.trainable.items()}


def cache_on(folder: Path, **options: Any) -> CacheSettings:
    """An activation cache under ``folder``."""
    return CacheSettings(mode="on", folder=str(folder / "kept"), **options)
