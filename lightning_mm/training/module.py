"""The LightningModule: a backbone, a tuning policy, an objective and an optimizer.

Data flow: Batch -> ``training_step`` (summed NLL) -> gradients divided once by the global number of supervised tokens
-> optimizer. Validation and test: Batch -> loss and token accuracy; PromptBatch -> ``answer`` -> exact match.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_mm.core import metric_names
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, PromptBatch
from lightning_mm.data.collator import Collator
from lightning_mm.data.dataloader import Collate
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.execution.cache.activation_cache import CacheSettings
from lightning_mm.execution.loss import LossAccumulator, LossOutput, add_zero_grad_term, scale_gradients, supervised_nll
from lightning_mm.execution.prepare import Compute
from lightning_mm.execution.step import TrainingStep
from lightning_mm.layer_selection.select import AutoRange, Selection, auto_layers_option, with_layers
from lightning_mm.models.generation import greedy_answers
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region
from lightning_mm.models.loading import Backbone, fingerprint
from lightning_mm.models.processor import load_processor
from lightning_mm.training import checkpoint as state
from lightning_mm.training.answer_metrics import SplitScores
from lightning_mm.training.auto_layers import choose_layers
from lightning_mm.training.callbacks.weight_averaging import over_trained_weights
from lightning_mm.training.eval_context import data_of
from lightning_mm.training.resume_point import ResumePoint
from lightning_mm.training.run_length import total_steps
from lightning_mm.training.standard_callbacks import add_standard_callbacks
from lightning_mm.training.trainer_checks import check_trainer
from lightning_mm.training.unreached import drop_picture_gradients, regions_without_rows, unreached_groups
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


class TeardownAfterException(Callback):
    """Restores the model's own forward passes if a run ends with an exception."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        pl_module.teardown(str(trainer.state.fn))


class MMModule(L.LightningModule):
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
    processor: Any  # its transformers processor
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
        # A checkpoint holds only trainable tensors; ``state.validate_checkpoint`` is stricter than Lightning's check.
        self.strict_loading = False
        self._window = LossAccumulator()
        self.resume_point = ResumePoint()
        self._resumed: Mapping[str, Any] | None = None
        self.unread: tuple[str, ...] | None = None
        self.auto, self.compute, self.cache = auto, compute, cache
        self.selection: Selection | None = None
        self._layers: tuple[int, ...] | None = None

    @property
    def _data(self) -> MMDataModule:
        return data_of(self.trainer)

    def configure_model(self) -> None:
        """Load the model and apply the tuning policy, once; prepare the model for this stage's steps."""
        if hasattr(self, "step"):
            self.step.open()
            return
        self.processing = load_processor(self.backbone.path, self.backbone.revision)
        self.processor = self.processing.processor
        if auto_layers_option(self.tuning):
            self.tuning, self.selection = self._resolve_auto_layers()
        mm, self.plan = prepare_model(self.backbone, self.tuning)
        self.mm, self.model = replace(mm, processor=self.processing), mm.model
        self._drop_unread()
        self.census = take_census(self.mm, self.plan, self.optimizer.lr, self.optimizer.weight_decay)
        self.base = fingerprint(self.model)
        precision = str(self.trainer.precision) if self._trainer is not None else None
        self.step = TrainingStep(self.mm, self.plan, self.compute, self.activation_checkpointing, precision)

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
        return self.step.wrap_collator(collator) if hasattr(self, "step") else collator

    def on_train_end(self) -> None:
        """Say what no row of the run has reached."""
        if self.trainer.global_step:
            for group, count in unreached_groups(self.trainer.optimizers[0]).items():
                why = "no row of the run reaches them; they are as they were, weight decay included"
                log_decision("model.tuning", f"{group}: {count} tensors never got a gradient", why)

    def on_fit_end(self) -> None:
        self.step.close_cache()

    def configure_callbacks(self) -> list[Callback]:
        """Give the trainer what every run has and it lacks (``add_standard_callbacks``), refuse what goes not with it.

        Returns:
            What does the work of ``teardown`` after an exception, for Lightning does not call ``teardown`` then; and
            what takes the place of averages of weights.
        """
        data = getattr(self.trainer, "datamodule", None)
        validates = data is not None and data.paths["val"] is not None
        check_trainer(self.trainer, validates)
        add_standard_callbacks(self.trainer, validates)
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
        if self._trainer is None or getattr(self.trainer, "datamodule", None) is None:
            raise UserError("layers: auto needs data.", "Layers are chosen by reading the model.", "Run it with fit.")
        selection = choose_layers(self.backbone, self.tuning, self.auto, self.trainer)
        return with_layers(self.tuning, selection.chosen.layers), selection

    def resume_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the unused parameters and the layers from a checkpoint instead of finding them again."""
        saved = checkpoint[state.KEY]
        self.unread, self._layers = tuple(saved["unread"]), tuple(saved["layers"])

    def _drop_unread(self) -> None:
        """Freeze parameters that the policy names but the forward pass never uses (e.g. the top of LLaVA's tower)."""
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
        """Names of trainable parameters that the forward pass never uses; empty outside a fit."""
        data = getattr(self._trainer, "datamodule", None)
        if data is None or self.trainer.state.fn != TrainerFn.FITTING:
            return ()
        if self.plan.modes[Region.VISION] == self.plan.modes[Region.CONNECTOR] == "frozen":
            return ()
        with torch.device("cpu"):  # Lightning calls this hook with the accelerator as the default device
            batch = data.example_batch()
        if not batch.has_images:
            regions = ", ".join(regions_without_rows(self.plan.modes, 0))
            log_decision("model.tuning", f"{regions}: stays as it is", "no row of data.train has a picture")
            return ()
        device = self.trainer.strategy.root_device
        self.model.to(device)
        with self.trainer.precision_plugin.forward_context():
            head = self.mm.head
            return unused_parameters(self.mm, lambda: supervised_nll(self.model, head, batch.to(device)).nll)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters, by name in the state dict."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def objective(self, batch: Batch) -> LossOutput:
        """Summed NLL of a batch."""
        return self.step.objective(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Summed NLL; divided once, over all ranks and micro-batches, before the optimizer step."""
        objective = self.objective(batch)
        self._window.add(objective, batch.has_images)
        if batch.has_images and batch.num_supervised:
            return objective.nll
        return add_zero_grad_term(objective.nll, iter(self.trainable.values()))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn summed gradients into those of the mean over all supervised tokens.

        Lightning divided by the number of micro-batches and DDP by the number of ranks; both are undone here, before
        clipping, so that neither changes what is learned.
        """
        loss, tokens, pictures = self._window.close(lambda held: self.trainer.strategy.reduce(held, reduce_op="sum"))
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / max(tokens, 1.0)
        norm = scale_gradients(self.trainable, scale)
        if not pictures:
            drop_picture_gradients(self.model, self.mm.layout)
        self.log(metric_names.TRAIN_LOSS, loss, prog_bar=True)
        self.log(metric_names.GRAD_NORM, norm)
        for group in optimizer.param_groups:
            self.log(metric_names.learning_rate(group["name"]), group["lr"])
        self.resume_point.begin_update()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step as Lightning does; ``on_before_optimizer_step`` is called within, after the backward pass."""
        super().optimizer_step(*args, **kwargs)
        self.resume_point.end_update()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Remember where the run can be resumed."""
        self.resume_point.record(self.trainer)

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
        if getattr(self.trainer, "datamodule", None) is not None:
            self._open_cache()
        optimizer = build_optimizer(self._groups(), self.optimizer)
        factor = schedule_factor(self.optimizer, total_steps(self.trainer))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.mm, self.plan, self.optimizer)

    def answer(self, batch: PromptBatch) -> list[str]:
        """Greedy answers, one per question; an empty list for a batch whose questions were all rejected."""
        if not len(batch):
            return []
        return greedy_answers(self.model, self.processor, batch.inputs, self.max_new_tokens)

    def on_validation_epoch_start(self) -> None:
        self._begin_scores("val")

    def on_test_epoch_start(self) -> None:
        self._begin_scores("test")

    def _begin_scores(self, split: metric_names.Stage) -> None:
        types = self._data.question_types(split)
        self.scores = SplitScores(types).to(self.device)

    def validation_step(
        self, batch: Batch | PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, list[str]] | None:
        """Update the scores: loss and token accuracy of teacher-forced batches, exact match of generated answers.

        Returns:
            The generated answers; None for teacher-forced batches.
        """
        if isinstance(batch, Batch):
            objective = self.objective(batch)
            self.scores.add(objective.nll, objective.num_correct, objective.num_tokens)
            return None
        scores = self.scores.blank_answers if dataloader_idx == 2 else self.scores.answers
        answers = self.answer(batch)
        scores.update(answers, batch.references, batch.question_types)
        return {"answers": answers}

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, split: metric_names.Stage) -> None:
        for name, value in self.scores.compute(split).items():
            self.log(name, value, prog_bar=name in (f"{split}/loss", f"{split}/exact_match"))

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """One row per question: id, origin, turn, generated answer and reference answer."""
        rows = zip(batch.samples, batch.turns, self.answer(batch), strict=True)
        return [
            {"id": s.id, "origin": s.origin, "turn": turn, "answer": answer, "reference": s.turns[turn].text}
            for s, turn, answer in rows
        ]

    def settings(self) -> dict[str, Any]:
        """Settings stored in the checkpoint; a resumed run logs those that differ."""
        trainer, data = self.trainer, getattr(self.trainer, "datamodule", None)
        settings = {**asdict(self.optimizer), "betas": list(self.optimizer.betas)}
        learned_from = ("batch_size", "max_length", "max_tokens", "group_by_length", "seed")
        return {
            **{f"model.optimizer.{name}": value for name, value in settings.items()},
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
            "trainer.precision": str(trainer.precision),
            "trainer.steps": total_steps(trainer),
            **({f"data.{name}": getattr(data, name) for name in learned_from} if data else {}),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.step.flush()
        state.drop_frozen_weights(checkpoint, set(self.trainable))
        generators = self.resume_point.put_into(checkpoint, self.trainer)
        checkpoint[state.KEY] = state.checkpoint_metadata(
            self.census, self.base, self.settings(), self.unread or (), generators
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state.validate_checkpoint(checkpoint, self.census, self.base, set(self.trainable), self.optimizer.name)
        self._resumed = checkpoint[state.KEY]

    def on_train_start(self) -> None:
        """After a resume: apply this run's learning rates, and log every setting that differs from the checkpoint."""
        if self._resumed is not None:
            state.log_setting_changes(self._resumed["settings"], self.settings())
            optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
            restore_learning_rates(optimizer, cast(torch.optim.lr_scheduler.LambdaLR, scheduler), self._groups())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Restore a resumed run's random generators, right before the first random number is drawn."""
        if self._resumed is not None:
            state.restore_rank_rng(self._resumed)
            self._resumed = None
