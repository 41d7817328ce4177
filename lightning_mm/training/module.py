"""The LightningModule: a backbone, a tuning policy, an objective and an optimizer.

Data flow: Batch -> ``training_step`` (summed NLL) -> gradients divided once by the global number of supervised tokens
-> optimizer. ``evaluation_steps`` has what it does besides training.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Never, Self

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_mm.core import metric_names
from lightning_mm.core.choices import refuse_unknown
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.notebook import show_messages
from lightning_mm.data.batch import Batch
from lightning_mm.data.collator import Collator
from lightning_mm.data.dataloader import Collate
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.own_batches import as_batch
from lightning_mm.execution.cache.activation_cache import CacheSettings
from lightning_mm.execution.connector_init import ConnectorInit
from lightning_mm.execution.loss import LossAccumulator, LossOutput, add_zero_grad_term, scale_gradients
from lightning_mm.execution.prepare import Compute
from lightning_mm.execution.step import TrainingStep
from lightning_mm.layer_selection.select import AutoRange, Selection, auto_layers_option, with_layers
from lightning_mm.models.base_identity import base_identity
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone
from lightning_mm.training import checkpoint as state
from lightning_mm.training.arguments import (
    ELSEWHERE,
    MakesOptimizer,
    backbone_of,
    connector_init_of,
    optimizer_of,
    policy_of,
    skip_nonfinite_of,
)
from lightning_mm.training.auto_layers import choose_layers
from lightning_mm.training.callbacks.teardown import TeardownAfterException
from lightning_mm.training.callbacks.weight_averaging import over_trained_weights
from lightning_mm.training.checkpoint_file import KEY
from lightning_mm.training.eval_context import data_of, live
from lightning_mm.training.fit_start import begin_steps, find_unread, refuse_cache, start_at_stream_norm
from lightning_mm.training.load_checkpoint import load_module
from lightning_mm.training.loss_watch import LossWatch
from lightning_mm.training.model_and_data import ModelAndData
from lightning_mm.training.nonfinite import NonFiniteSteps
from lightning_mm.training.resume_point import ResumePoint, at_step_end
from lightning_mm.training.run_config import model_options
from lightning_mm.training.run_length import total_steps
from lightning_mm.training.source_losses import SourceLosses
from lightning_mm.training.standard_callbacks import add_standard_callbacks
from lightning_mm.training.trainer_checks import check_trainer
from lightning_mm.training.unreached import drop_picture_gradients, say_unreached
from lightning_mm.tuning import TuningPlan, TuningPolicy
from lightning_mm.tuning.apply import drop_parameters, prepare_model, set_requires_grad
from lightning_mm.tuning.census import Census, take_census
from lightning_mm.tuning.optimizer import (
    OptimizerSettings,
    build_optimizer,
    named_groups,
    parameter_groups,
    restore_learning_rates,
    schedule_factor,
)


class MMModule(ModelAndData):
    """Partial fine-tuning of a multimodal LLM.

    Args:
        backbone: The Hugging Face model: a folder or hub name, a loaded model (tuned in place), or a ``Backbone``.
        tuning: Which weights move; IntermediateOnly if not given.
        optimizer: AdamW and its schedule; in Python also a function from groups of parameters to an optimizer, or to
            what ``configure_optimizers`` may return, such as ``lambda params: torch.optim.SGD(params, lr=1e-3)``.
        activation_checkpointing: Recompute blocks in backward to save memory; only those that backward crosses anyway.
        max_new_tokens: Longest answer that is generated in validation, test and predict.
        auto: How layers are chosen where the policy says ``layers: auto``.
        compute: How a step is computed.
        cache: Where what the frozen prefix puts out is kept, so that it is computed once per row.
        connector_init: 'stream_norm' scales a new connector when a fit begins, so that picture tokens enter the decoder
            at the norm of its stream; 'keep' (default) leaves it as it is loaded. A resumed fit is never scaled.
        lr: Learning rate, in place of that of ``optimizer``.
        processor: The model's processor, already loaded; that of ``backbone`` if not given.
        skip_nonfinite: Optimizer steps with NaN or infinity in loss or gradient that a run passes over, each said with
            its rows; no weight changes then. One more stops the run; 0 (default): the first.

    Raises:
        UserError: An argument is unknown, or the model cannot be tuned.

    Example::

        module = MMModule("org/name", IntermediateOnly("25%-50%"), lr=1e-5)
        data = MMDataModule(train="train.json", val="val.json", batch_size=4)
        L.Trainer(max_steps=100, precision="bf16-mixed").fit(module, datamodule=data)
    """

    model: Any  # a transformers model; its class is known at run time only
    processor: Any  # its transformers processor
    mm: MultimodalModel
    plan: TuningPlan
    census: Census
    step: TrainingStep

    def __init__(
        self,
        backbone: str | Path | nn.Module | Backbone,
        tuning: TuningPolicy | None = None,
        optimizer: OptimizerSettings | MakesOptimizer = OptimizerSettings(),  # noqa: B008  (frozen)
        activation_checkpointing: bool = False,
        max_new_tokens: int = 16,
        auto: AutoRange = AutoRange(),  # noqa: B008  (frozen)
        compute: Compute = Compute(),  # noqa: B008  (frozen)
        cache: CacheSettings = CacheSettings(),  # noqa: B008  (frozen)
        connector_init: ConnectorInit = "keep",
        lr: float | None = None,
        processor: Any = None,
        skip_nonfinite: int = 0,
        **unknown: Never,
    ) -> None:
        super().__init__()
        show_messages()
        refuse_unknown(MMModule, unknown, ELSEWHERE)
        self.backbone, loaded = backbone_of(backbone)
        self._is_users = loaded is not None
        self._loaded = (loaded,)  # not as an attribute of its own, which would make it a part of the state dict
        self._given_processor = processor
        self.tuning = policy_of(tuning)
        self.optimizer, self._make_optimizer = optimizer_of(optimizer, lr)
        self._scheduler: LambdaLR | None = None
        self.activation_checkpointing, self.max_new_tokens = activation_checkpointing, max_new_tokens
        # A checkpoint holds only trainable tensors; ``state.validate_checkpoint`` is stricter than Lightning's check.
        self.strict_loading = False
        self._window, self._source_losses, self._loss_watch = LossAccumulator(), SourceLosses(), LossWatch(None)
        self.skip_nonfinite, self._nonfinite = skip_nonfinite_of(skip_nonfinite), NonFiniteSteps()
        self.resume_point = ResumePoint()
        self._resumed: Mapping[str, Any] | None = None
        self.loaded_step: int | None = None
        self.unread: tuple[str, ...] | None = None
        self.auto, self.compute, self.cache = auto, compute, cache
        self.connector_init = connector_init_of(connector_init)
        self.selection: Selection | None = None
        self._cached: bool | None = None
        self._layers: tuple[int, ...] | None = None

    @property
    def _data(self) -> MMDataModule:
        return data_of(self.trainer)

    def configure_model(self) -> None:
        """Load the model and apply the tuning policy, once; prepare the model for this stage's steps."""
        if hasattr(self, "step"):
            self.step.open()
            return
        (loaded,) = self._loaded
        self.processor = self.processing.processor
        if self._files is not None:
            self._files.decide_max_length()
        if auto_layers_option(self.tuning):
            self.tuning, self.selection = self._resolve_auto_layers()
        mm, self.plan = prepare_model(self.backbone, self.tuning, loaded)
        self.mm, self.model = replace(mm, processor=self.processing), mm.model
        self._drop_unread()
        self._init_connector()
        rates = (None, None) if self.own_optimizer else (self.optimizer.lr, self.optimizer.weight_decay)
        self.census = take_census(self.mm, self.plan, *rates)
        self.base = base_identity(self.model, self.processing)
        precision = str(self.trainer.precision) if self._trainer is not None else None
        compute = self.compute
        if self._is_users and compute.frozen_dtype == "auto":
            compute = replace(compute, frozen_dtype="float32")
        self.step = TrainingStep(self.mm, self.plan, compute, self.activation_checkpointing, precision)

    def wrap_collator(self, collator: Collator) -> Collate:
        """The collate function of conversation batches, which the data module asks for when it makes a loader.

        Where the cache is open, it leaves out the images of rows whose activations are cached.
        """
        return self.step.wrap_collator(collator) if hasattr(self, "step") else collator

    def on_train_end(self) -> None:
        """Say what no row of the run has reached."""
        if self.trainer.global_step:
            say_unreached(self.trainer.optimizers[0])

    def on_fit_end(self) -> None:
        self.step.close_cache()

    def configure_callbacks(self) -> list[Callback]:
        """Give the trainer what every run has and it lacks (``add_standard_callbacks``), refuse what goes not with it.

        Returns:
            What does the work of ``teardown`` after an exception, for Lightning does not call ``teardown`` then; and
            what takes the place of averages of weights.
        """
        check_trainer(self.trainer)
        add_standard_callbacks(self.trainer)
        if self._files is None:  # only then, for Lightning warns of the hook beside a data module
            vars(self)["on_before_batch_transfer"] = lambda batch, _: as_batch(batch, self.processing)
        else:
            vars(self).pop("on_before_batch_transfer", None)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
        return [TeardownAfterException(), *over_trained_weights(callbacks)]

    def teardown(self, stage: str) -> None:
        """Undo the preparation, so that other users of the model run its original code."""
        if hasattr(self, "step"):
            self.step.close()

    def _resolve_auto_layers(self) -> tuple[TuningPolicy, Selection | None]:
        """The policy with ``layers: auto`` resolved, from the checkpoint or by analyzing the untuned model."""
        if self._layers is not None:
            return with_layers(self.tuning, self._layers), None
        if self._files is None:
            why = "Layers are chosen by reading the model on the rows of a data module."
            raise UserError("layers: auto needs data.", why, "Fit it with an MMDataModule, or name the layers.")
        selection = choose_layers(self.backbone, self.tuning, self.auto, self.trainer, *self._loaded)
        return with_layers(self.tuning, selection.chosen.layers), selection

    def resume_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the unused parameters and the layers from a checkpoint instead of finding them again."""
        saved = checkpoint[KEY]
        self.unread, self._layers = tuple(saved["unread"]), tuple(saved["layers"])

    def _drop_unread(self) -> None:
        """Freeze parameters that the policy names but the forward pass never uses (e.g. the top of LLaVA's tower)."""
        if self.unread is None:
            fits = self._files is not None and self.trainer.state.fn == TrainerFn.FITTING
            self.unread = find_unread(self.mm, self.plan, self.trainer, self._data) if fits else ()
        if not self.unread:
            return
        self.plan = drop_parameters(self.plan, self.unread)
        set_requires_grad(self.mm, self.plan)
        log_decision(
            "model.tuning", f"{len(self.unread)} named tensors stay frozen", f"never read: {self.unread[0]}, ..."
        )

    def _init_connector(self) -> None:
        """Scale the connector as ``connector_init`` says, if this is the beginning of a fit."""
        fits = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if self.connector_init == "keep" or not fits or self._layers is not None or self.trainer.ckpt_path:
            return
        start_at_stream_norm(self.mm, self.plan, self.trainer, self._files)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters, by name in the state dict."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def objective(self, batch: Batch) -> LossOutput:
        """Summed NLL of a batch."""
        return self.step.objective(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Summed loss; divided once, over all ranks and micro-batches, before the optimizer step."""
        objective = self.objective(batch)
        self._window.add(objective, batch.has_images)
        self._nonfinite.add(batch, objective, self._files is not None)
        self._source_losses.add(objective, batch)
        if batch.has_images and batch.num_supervised:
            return objective.objective
        return add_zero_grad_term(objective.objective, iter(self.trainable.values()))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn summed gradients into those of the mean over all supervised tokens.

        Lightning divided by the number of micro-batches and DDP by the number of ranks; both are undone here, before
        clipping, so that neither changes what is learned.
        """
        loss, tokens, pictures = self._window.close(lambda held: self.trainer.strategy.reduce(held, reduce_op="sum"))
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / max(tokens, 1.0)
        norm = scale_gradients(self.trainable, scale)
        if not self._nonfinite.close(self, loss, norm):
            self._source_losses.drop_step()
        elif not pictures:
            drop_picture_gradients(self.model, self.mm.layout)
        self._source_losses.keep_step()
        self._loss_watch.add(self.trainer.global_step + 1, loss)
        self.log(metric_names.TRAIN_LOSS, loss, prog_bar=True)
        self.log(metric_names.GRAD_NORM, norm)
        for index, group in enumerate(optimizer.param_groups):
            self.log(metric_names.learning_rate(group.get("name", f"group {index}")), group["lr"])
        self.resume_point.begin_update()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step as Lightning does; ``on_before_optimizer_step`` is called within, after the backward pass."""
        super().optimizer_step(*args, **kwargs)
        self.resume_point.end_update()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Remember where the run can be resumed; log the losses of the sources now and then."""
        self.resume_point.record(self.trainer)
        every = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set by its logger connector
        if at_step_end(self.trainer) and self.trainer.global_step % every == 0:
            self.log_dict(self._source_losses.close(lambda held: self.trainer.strategy.reduce(held, reduce_op="sum")))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients; Lightning's own method refuses fused optimizers in bf16-mixed, which has no loss scaler."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.trainable.values(), gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(self.trainable.values(), gradient_clip_val)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the trainable parameters, and its learning-rate schedule by optimizer step.

        It is the first hook of a fit with the model on its device, so the cache of frozen activations is opened here:
        Lightning makes the training loader next, to count the steps of an epoch.
        """
        if self._files is not None:
            begin_steps(self.step, self.cache, self.trainer, self._files, (self._resumed or {}).get("cached"))
            self._cached = self.step.cache is not None
        if self._make_optimizer is not None:
            log_decision("model.optimizer", "yours", "its rates stay as they are, but for a schedule of its own")
            made: OptimizerLRScheduler = self._make_optimizer(named_groups(self.mm, self.plan))
            return made
        optimizer = build_optimizer(self._groups(), self.optimizer)
        factor = schedule_factor(self.optimizer, total_steps(self.trainer))
        self._scheduler = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"}}

    @property
    def own_optimizer(self) -> bool:
        """Whether the user makes the optimizer."""
        overridden = type(self).configure_optimizers is not MMModule.configure_optimizers
        return overridden or self._make_optimizer is not None

    def _groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.mm, self.plan, self.optimizer)

    def settings(self) -> dict[str, Any]:
        """Settings stored in the checkpoint; a resumed run logs those that differ."""
        return state.settings_of(self.trainer, self._files, None if self.own_optimizer else self.optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.step.flush()
        state.drop_frozen_weights(checkpoint, set(self.trainable))
        generators = self.resume_point.put_into(checkpoint, self.trainer)
        if self._resumed is not None:  # no batch since the resume
            generators = self._resumed["rng"]
        checkpoint[KEY] = state.checkpoint_metadata(
            self.census, self.base, self.settings(), self.unread or (), generators
        )
        checkpoint[KEY] |= {
            "model": model_options(live(self)),
            "skipped_steps": self._nonfinite.passed,
            "cached": self._cached,
        }

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's cannot know where the frozen weights are
        cls,
        checkpoint_path: str | Path,
        *,
        backbone: str | Path | nn.Module | Backbone | None = None,
        tuning: TuningPolicy | None = None,
        **options: Any,
    ) -> Self:
        """The trained module of a checkpoint, in eval mode on the CPU, with its base model loaded.

        Args:
            checkpoint_path: The file, such as ``runs/IntermediateOnly/checkpoints/last.ckpt``.
            backbone: The base model, if it is no longer where it was, or was given loaded.
            tuning: The policy, if it is a class of yours.
            options: Further arguments of the module.

        Raises:
            UserError: The checkpoint cannot be read, or belongs to another base model.
        """
        return load_module(cls, checkpoint_path, backbone, tuning, options)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        name = "yours" if self.own_optimizer else self.optimizer.name
        state.validate_checkpoint(checkpoint, self.census, self.base, self.trainable, name)
        self.loaded_step = int(checkpoint["global_step"])
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._resumed = checkpoint[KEY]
            log_decision("ckpt_path", self.trainer.ckpt_path, f"the run goes on after step {self.loaded_step}")

    def on_train_start(self) -> None:
        """After a resume: apply this run's learning rates, and log every setting that differs from the checkpoint."""
        self.resume_point.begin(self.trainer)
        self._nonfinite = NonFiniteSteps((self._resumed or {}).get("skipped_steps", 0))
        self._loss_watch = LossWatch(getattr(self.mm.head, "out_features", None))
        self._source_losses = SourceLosses(() if self._files is None else self._files.rows.source_names("train"))
        if not self.step.cache_decided:
            own = "DataLoader" if self._files is None else "configure_optimizers"
            refuse_cache(self.cache, f"your own {own} takes the place of what opens it")
        if self._resumed is not None:
            state.log_setting_changes(self._resumed["settings"], self.settings())
            if self._scheduler is not None:
                restore_learning_rates(self.trainer.optimizers[0], self._scheduler, self._groups())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Restore a resumed run's random generators, right before the first random number is drawn."""
        if self._resumed is not None:
            state.restore_rank_rng(self._resumed)
        self.resume_point.begin_batch()
        self._resumed = self.loaded_step = None  # the weights are no longer those of the checkpoint
