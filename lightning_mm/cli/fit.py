"""The verbs fit, validate, test and predict: LightningCLI with our run directory, callbacks and errors.

Data flow: arguments and YAML files -> run directory -> module, data module, trainer -> the verb -> report.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from lightning_mm.analysis.findings import copy_earlier_findings
from lightning_mm.callbacks.base import LayerCallback
from lightning_mm.cli.parser import Parser
from lightning_mm.core.csv_logger import ResumableCSVLogger
from lightning_mm.core.decisions import decision_log, log, log_decision
from lightning_mm.core.distributed import all_gather_object
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import append_jsonl, read_json
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.loading import Backbone, read_config
from lightning_mm.report.wandb import OnlineLogger
from lightning_mm.training import checkpoint as state
from lightning_mm.training.callbacks.checkpoints import EXIT_CODE, BestCheckpoint, LastCheckpoint, Preempted
from lightning_mm.training.callbacks.evaluation import HeldOutEvaluation
from lightning_mm.training.callbacks.progress import ProgressBar
from lightning_mm.training.callbacks.run_recorder import RunRecorder
from lightning_mm.training.module_options import ModuleOptions
from lightning_mm.verbs.config_classes import refuse_foreign_classes

_WANDB = Literal["auto", "online", "offline", "off"]
_RANK: Any = rank_zero_only  # its ``rank`` is set before torch.distributed is
RUN_VARIABLE = "LIGHTNING_MM_RUN"
"""Environment variable with the run directory, for the processes that a multi-device run starts for other ranks."""


def train(arguments: list[str]) -> int:
    """Run fit, validate, test or predict; returns the exit status."""
    refuse_foreign_classes(arguments)
    try:
        _run(arguments)
    except Preempted:
        return EXIT_CODE
    return 0


def _run(arguments: list[str]) -> None:
    TrainingCLI(
        ModuleOptions,
        MMDataModule,
        parser_class=Parser,
        auto_configure_optimizers=False,
        save_config_callback=None,
        seed_everything_default=0,
        load_from_checkpoint_support=False,
        trainer_defaults={
            "use_distributed_sampler": False,  # the data module deals out samples itself, without duplicates
            "log_every_n_steps": 10,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,  # the census says more
        },
        args=arguments,
    )


class TrainingCLI(LightningCLI):
    """LightningCLI with our run directory; hyperparameters of checkpoints do not override the command line."""

    run: RunDirectory
    checkpoint: dict[str, Any] | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run.root", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--run.name", type=str | None, default=None, help="Name of this run; the policy's if not given."
        )
        parser.add_argument(
            "--run.wandb", type=_WANDB, default="auto", help="W&B: online if logged in, else offline; or off."
        )
        parser.add_argument(
            "--run.save_every", type=int, default=200, help="Steps between writes of checkpoints/last.ckpt."
        )
        parser.add_argument("--allow", type=str, default="", help="Packages whose classes files may name: a,b,c.")
        parser.add_class_arguments(HeldOutEvaluation, "evaluation")
        parser.link_arguments("model.backbone.path", "data.processor")
        parser.link_arguments("model.backbone.revision", "data.revision")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: options override a checkpoint's hyperparameters; ``validate_checkpoint`` compares them."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        resumed = config.get("ckpt_path")
        self.checkpoint = state.read_checkpoint(Path(resumed), mapped=False) if resumed else None
        read_config(Backbone(path=config.model.backbone.path, revision=config.model.backbone.revision))
        self.run = _run_directory(config, str(self.subcommand))
        if _RANK.rank == 0:
            self._parser(self.subcommand).save(
                _reusable_config(config), self.run.config, overwrite=True, skip_validation=True
            )
        if self.subcommand == "fit" and resumed and self.checkpoint is not None and _RANK.rank == 0:
            earlier, step = RunDirectory(Path(resumed).parent.parent), self.checkpoint["global_step"]
            _continue_metrics(earlier, self.run, step)
            copy_earlier_findings(earlier, self.run, step)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.checkpoint is not None:
            self.model.resume_from(self.checkpoint)
            self.checkpoint = None  # the trainer takes it, and lets go of it

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand]
        given = self._get(self.config_init, "trainer")
        loggers: list[Any] = [ResumableCSVLogger(self.run.metrics)]
        if given.get("logger") is not False and config.run.wandb != "off" and self.subcommand == "fit":
            loggers.append(OnlineLogger(self.run.path, mode=config.run.wandb, run_id=self.run.id, name=self.run.name))
        if isinstance(given.get("logger"), (list, tuple)):
            loggers.extend(given["logger"])
        given_plugins = given.get("plugins") or []
        given_plugins = list(given_plugins) if isinstance(given_plugins, (list, tuple)) else [given_plugins]
        plugins: list[Any] = []
        if self.checkpoint is not None and not any(isinstance(each, CheckpointIO) for each in given_plugins):
            plugins.append(state.LoadedCheckpoint(Path(config.ckpt_path), self.checkpoint))
        if SLURMEnvironment.detect():
            # Lightning would save inside the signal handler, where ranks can deadlock.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        if plugins:
            kwargs["plugins"] = [*given_plugins, *plugins]
        return super().instantiate_trainer(
            logger=loggers,
            default_root_dir=self.run.path,
            callbacks=[*(given.get("callbacks") or []), *self._callbacks(config)],  # the module adds what is missing
            enable_checkpointing=True,
            **kwargs,
        )

    def _callbacks(self, config: Namespace) -> list[Callback]:
        """The callbacks that have options, and those whose defaults of Lightning are not wanted."""
        given = self._get(self.config_init, "trainer").get("callbacks") or []
        _refuse_duplicates([callback for callback in given if isinstance(callback, LayerCallback)])
        callbacks: list[Callback] = [ProgressBar(), RunRecorder(self.run)]
        if self.subcommand == "fit":
            callbacks += [self._get(self.config_init, "evaluation"), LastCheckpoint(config.run.save_every)]
            if config.data.val is not None:
                callbacks.append(BestCheckpoint())
        return callbacks

    def after_fit(self) -> None:
        self._close_online()
        if _RANK.rank == 0:
            log.info("run: %s", self.run.path)

    def _close_online(self) -> None:
        for logger in self.trainer.loggers:
            if isinstance(logger, OnlineLogger):
                logger.summarise(
                    census=self.model.census.to_dict(), decisions={str(d.name): str(d) for d in decision_log()}
                )
                if self.run.samples.is_file() and _RANK.rank == 0:
                    logger.log_samples(read_json(self.run.samples))
                logger.close()

    def predict(self, **kwargs: Any) -> None:
        """Answer the questions of ``data.predict`` into ``predictions.jsonl``, in the order of the file."""
        batches = self.trainer.predict(**{**kwargs, "return_predictions": True}) or []
        mine = [row for batch in batches for row in batch]
        rows: list[dict[str, Any]] = [row for part in all_gather_object(mine) for row in part]
        order = [sample.origin for sample in self.datamodule.samples("predict")]
        if _RANK.rank == 0:
            target = self.run.path / "predictions.jsonl"
            rows.sort(key=lambda row: (order.index(row["origin"]), row["turn"]))
            append_jsonl(target, rows)
            log.info("answers: %s", target)


def _run_directory(config: Namespace, verb: str) -> RunDirectory:
    """The run directory: rank 0 makes it and passes it to the ranks it starts by ``RUN_VARIABLE``."""
    if (given := os.environ.get(RUN_VARIABLE)) and _RANK.rank != 0:
        return RunDirectory(Path(given))
    policy = (config.model.get("tuning") or {}).get("class_path", "IntermediateOnly").rpartition(".")[2]
    default = policy if verb == "fit" else f"{policy}-{verb}"
    if _RANK.rank != 0:
        return RunDirectory(Path(config.run.root).absolute() / (config.run.name or default))
    run = RunDirectory.create(config.run.root, config.run.name, default)
    os.environ[RUN_VARIABLE] = str(run.path)
    return run


def _reusable_config(config: Namespace) -> Namespace:
    """The config without the options of a single call, so that every verb can read it."""
    kept = config.clone()
    for key in ("ckpt_path", "config", "weights_only", "return_predictions", "verbose"):
        kept.pop(key, None)
    return kept


def _refuse_duplicates(callbacks: Sequence[LayerCallback]) -> None:
    """Refuse two callbacks of one class: Lightning keeps callback states by class."""
    kinds = [type(callback).__name__ for callback in callbacks]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise UserError(
                f"trainer.callbacks names {kind} {kinds.count(kind)} times.",
                "A run keeps the clock and the findings of one of each kind.",
                f"Name {kind} once, with all that it shall measure and the closer schedule.",
            )


def _continue_metrics(earlier: RunDirectory, run: RunDirectory, step: int) -> None:
    """Copy the first run's curves up to the step that the run resumes at, each step once.

    Training logs a step under the number of steps before it, inspections under the number of steps done.
    """
    if not earlier.metrics.is_file():
        return
    with (
        earlier.metrics.open(encoding="utf-8", newline="") as source,
        run.metrics.open("w", encoding="utf-8", newline="") as to,
    ):
        reader = csv.DictReader(source)
        writer = csv.DictWriter(to, reader.fieldnames or ["step"], lineterminator="\n")
        writer.writeheader()
        for row in (row for row in reader if row["step"]):
            inspected = {key: value for key, value in row.items() if value and key.startswith(("inside/", "inspect/"))}
            if int(row["step"]) < step:
                writer.writerow(row)
            elif int(row["step"]) == step and inspected:
                writer.writerow({"step": row["step"], **inspected})
    log_decision("run", f"curves continue those of {earlier.name}", f"resumed at step {step}")
