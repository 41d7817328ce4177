"""The LightningModule: a backbone, a tuning policy, an objective and an optimizer.

Data flow: Batch -> ``training_step`` (summed NLL) -> gradients divided once by the global number of supervised tokens
-> optimizer. Validation, test and prediction are in ``evaluating``.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_mm.core import metric_names
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.data.collator import Collator
from lightning_mm.data.dataloader import Collate
from lightning_mm.execution.cache.activation_cache import CacheSettings
from lightning_mm.execution.loss import Objective, Window, anchored, scale_gradients, supervised_nll
from lightning_mm.execution.prepare import Compute
from lightning_mm.execution.step import TrainingStep
from lightning_mm.layer_selection.select import AutoRange, Selection, auto_layers_option, with_layers
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region
from lightning_mm.models.loading import Backbone, fingerprint
from lightning_mm.models.processor import load_processing
from lightning_mm.training import checkpoint as state
from lightning_mm.training.auto_layers import choose_layers
from lightning_mm.training.evaluating import Evaluating
from lightning_mm.tuning import IntermediateOnly, TuningPlan, TuningPolicy
from lightning_mm.tuning.apply import drop_parameters, prepare_model, set_requires_grad
from lightning_mm.tuning.census import Census, take_census
from lightning_mm.tuning.optimizer import (
    OptimizerSettings,
    build_optimizer,
    parameter_groups,
    restore_learning_rates,
    schedule_factor,
)
from lightning_mm.tuning.unused_parameters import unused_parameters


class MMModule(Evaluating):
    """Partial fine-tuning of a multimodal LLM.

    Args:
        backbone: The Hugging Face model.
        tuning: Which weights move; IntermediateOnly if not given.
        optimizer: AdamW and its schedule.
        activation_checkpointing: Recompute blocks in backward to save memory; only those that backward crosses anyway.
        max_new_tokens: Longest answer that is generated in validation, test and predict.
        auto: How layers are chosen where the policy says ``layers: auto``.
        compute: How a step is computed.
        cache: Where what the frozen prefix puts out is kept, so that it is computed once per row.
    """

    model: Any  # a transformers model; its class is known at run time only
    mm: MultimodalModel
    plan: TuningPlan
    census: Census
    step: TrainingStep

    def __init__(
        self,
        backbone: Backbone,
        tuning: TuningPolicy | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008  (frozen)
        activation_checkpointing: bool = False,
        max_new_tokens: int = 16,
        auto: AutoRange = AutoRange(),  # noqa: B008  (frozen)
        compute: Compute = Compute(),  # noqa: B008  (frozen)
        cache: CacheSettings = CacheSettings(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        self.backbone, self.tuning, self.optimizer = backbone, tuning or IntermediateOnly(), optimizer
        if tuning is None:
            log_decision(
                "model.tuning", self.tuning.describe(), "none was named; the middle is where vision meets language"
            )
        self.activation_checkpointing, self.max_new_tokens = activation_checkpointing, max_new_tokens
        # A checkpoint holds what trains and nothing else; ``state.check`` is stricter than Lightning's own test.
        self.strict_loading = False
        self._window = Window()
        self._resumed: Mapping[str, Any] | None = None
        self.unread: tuple[str, ...] | None = None
        self.auto, self.compute, self.cache = auto, compute, cache
        self.selection: Selection | None = None
        self._layers: tuple[int, ...] | None = None

    def setup(self, stage: str) -> None:
        precision = str(self.trainer.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise UserError(
                f"trainer.precision: {precision} is not supported.",
                "It would cast what must stay in float32 (rotary tables, summed losses).",
                "Use 32-true or bf16-mixed; for bfloat16 weights, 32-true with model.backbone.dtype bfloat16.",
            )

    def configure_model(self) -> None:
        """Load, plan, freeze, verify, once; prepare the model for this stage's steps."""
        if hasattr(self, "census"):
            self.step.open()
            return
        self.processing = load_processing(self.backbone.path, self.backbone.revision)
        self.processor = self.processing.processor
        if auto_layers_option(self.tuning):
            self.tuning, self.selection = self._chosen()
        mm, self.plan = prepare_model(self.backbone, self.tuning)
        self.mm, self.model = replace(mm, processor=self.processing), mm.model
        self._drop_unread()
        self.census = take_census(self.mm, self.plan, self.optimizer.lr, self.optimizer.weight_decay)
        self.base = fingerprint(self.model)
        precision = str(self.trainer.precision) if self._trainer is not None else None
        self.step = TrainingStep(self.mm, self.plan, self.compute, self.activation_checkpointing, precision)

    def on_fit_start(self) -> None:
        """Open the cache of frozen activations, once the model is on its device."""
        if getattr(self.trainer, "datamodule", None) is not None:
            self._open_cache()

    def _open_cache(self) -> None:
        data, trainer = self._data, self.trainer
        seen = trainer.max_steps * trainer.accumulate_grad_batches * data.rows_per_batch * trainer.world_size
        epochs = seen / len(data.samples("train")) if trainer.max_steps > 0 else float(trainer.max_epochs or 1)
        facts = {
            "precision": str(trainer.precision),
            "dtype": str(self.model.dtype),
            "attention": str(getattr(self.model.config, "_attn_implementation", None)),
            "max_length": data.max_length,
            "device": trainer.strategy.root_device.type,
            "matmul": torch.get_float32_matmul_precision(),
        }

        def example(count: int) -> Batch:
            return data.example_batch(count).to(trainer.strategy.root_device)

        with trainer.precision_plugin.forward_context():
            self.step.open_cache(self.cache, data.collator(), example, epochs, facts)

    def wrap_collator(self, collator: Collator) -> Collate:
        """The collate function of conversation batches, which the data module asks for when it makes a loader.

        Where the cache is open, it leaves out the images of rows whose activations are cached.
        """
        return self.step.collate_function(collator)

    def on_fit_end(self) -> None:
        self.step.close_cache()

    def teardown(self, stage: str) -> None:
        """Take off the model what preparing it has put on: another user of it runs the family's own code."""
        if hasattr(self, "step"):
            self.step.close()

    def _chosen(self) -> tuple[TuningPolicy, Selection | None]:
        """``layers: auto`` written out: as the checkpoint has it, else by reading the untuned model."""
        if self._layers is not None:
            return with_layers(self.tuning, self._layers), None
        if self._trainer is None or getattr(self.trainer, "datamodule", None) is None:
            raise UserError("layers: auto needs data.", "Layers are chosen by reading the model.", "Run it with fit.")
        selection = choose_layers(self.backbone, self.tuning, self.auto, self.trainer)
        return with_layers(self.tuning, selection.chosen.layers), selection

    def resume_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over what the run that wrote a checkpoint had found out about its model."""
        saved = checkpoint[state.KEY]
        self.unread, self._layers = tuple(saved["unread"]), tuple(saved["layers"])

    def _drop_unread(self) -> None:
        """Freeze what the policy names and the model never reads (the top of LLaVA's tower, say)."""
        if self.unread is None:
            self.unread = self._find_unread()
        if not self.unread:
            return
        self.plan = drop_parameters(self.plan, self.unread)
        set_requires_grad(self.mm, self.plan)
        log_decision(
            "model.tuning", f"{len(self.unread)} named tensors stay frozen", f"never read: {self.unread[0]}, ..."
        )

    def _find_unread(self) -> tuple[str, ...]:
        """Only a fit asks; every other verb, and a resumed fit, is told by the checkpoint."""
        data = getattr(self._trainer, "datamodule", None)
        if data is None or self.trainer.state.fn != TrainerFn.FITTING:
            return ()
        if self.plan.modes[Region.VISION] == self.plan.modes[Region.CONNECTOR] == "frozen":
            return ()
        with torch.device("cpu"):  # Lightning calls this hook with the accelerator as the default device
            batch = data.example_batch()
        if not batch.has_images:
            return ()
        device = self.trainer.strategy.root_device
        self.model.to(device)
        with self.trainer.precision_plugin.forward_context():
            head = self.mm.head
            return unused_parameters(self.mm, lambda: supervised_nll(self.model, head, batch.to(device)).nll)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """What trains, by name in the state dict."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def objective(self, batch: Batch) -> Objective:
        """Summed NLL of a batch."""
        return self.step.objective(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Summed NLL; the division comes once, over all ranks and micro-batches, before the optimizer step."""
        objective = self.objective(batch)
        self._window.add(objective)
        if batch.has_images and batch.num_supervised:
            return objective.nll
        return anchored(objective.nll, iter(self.trainable.values()))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn summed gradients into those of the mean over all supervised tokens.

        Lightning divided by the number of micro-batches and DDP by the number of ranks; both are undone here, before
        clipping, so that neither changes what is learned.
        """
        loss, tokens = self._window.close(lambda held: self.trainer.strategy.reduce(held, reduce_op="sum"))
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / max(tokens, 1.0)
        norm = scale_gradients(self.trainable, scale)
        self.log(metric_names.TRAIN_LOSS, loss, prog_bar=True)
        self.log(metric_names.GRAD_NORM, norm)
        for group in optimizer.param_groups:
            self.log(metric_names.learning_rate(group["name"]), group["lr"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip here: Lightning refuses fused optimizers in mixed precision, also where no loss scaler is involved."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.trainable.values(), gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(self.trainable.values(), gradient_clip_val)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over what trains, and its schedule by optimizer step."""
        optimizer = build_optimizer(self._groups(), self.optimizer)
        factor = schedule_factor(self.optimizer, self._total_steps())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _total_steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError(
                "The length of the run is not known.",
                "The learning-rate schedule needs it, and neither steps nor epochs are bounded.",
                "Set trainer.max_steps or trainer.max_epochs.",
            )
        return int(steps)

    def _groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.mm, self.plan, self.optimizer)

    def settings(self) -> dict[str, Any]:
        """What a resumed run compares with its checkpoint, and says if it differs."""
        trainer, data = self.trainer, getattr(self.trainer, "datamodule", None)
        settings = {**asdict(self.optimizer), "betas": list(self.optimizer.betas)}
        learned_from = ("batch_size", "max_length", "max_tokens", "group_by_length", "seed")
        return {
            **{f"model.optimizer.{name}": value for name, value in settings.items()},
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
            "trainer.precision": str(trainer.precision),
            "trainer.steps": self._total_steps(),
            **({f"data.{name}": getattr(data, name) for name in learned_from} if data else {}),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.step.flush()
        state.keep_trainable(checkpoint, set(self.trainable))
        checkpoint[state.KEY] = state.record(self.census, self.base, self.settings(), self.unread or ())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state.check(checkpoint, self.census, self.base, set(self.trainable), self.optimizer.name)
        self._resumed = checkpoint[state.KEY]

    def on_train_start(self) -> None:
        """After everything is restored: this run's rates count, and every difference is said."""
        if self._resumed is not None:
            state.narrate_changes(self._resumed["settings"], self.settings())
            optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
            restore_learning_rates(optimizer, cast(torch.optim.lr_scheduler.LambdaLR, scheduler), self._groups())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """The last moment before randomness is drawn: put a resumed run's generators back."""
        if self._resumed is not None:
            state.restore_rank(self._resumed)
            self._resumed = None
