"""fit, validate, test and predict: Lightning's command line with our run directory, our callbacks and our errors.

Data flow: arguments and YAML files -> run directory -> module, data module, trainer -> the verb -> report.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from lightning_mm.analysis.findings import carry_over
from lightning_mm.callbacks.base import InspectingCallback
from lightning_mm.cli.parser import OneScreenParser, refuse_foreign_classes
from lightning_mm.core.csv_logger import MetricsFile
from lightning_mm.core.decisions import decide, log
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
from lightning_mm.training.callbacks.throughput import Throughput
from lightning_mm.training.module import MMModule

_WANDB = Literal["auto", "online", "offline", "off"]
_RANK: Any = rank_zero_only  # knows this process's rank before torch.distributed does
RUN_VARIABLE = "LIGHTNING_MM_RUN"
"""Tells the processes that a multi-device run starts for its other ranks which folder is theirs."""


def train(arguments: list[str]) -> int:
    """Run fit, validate, test or predict; returns the exit status."""
    decide.clear()
    refuse_foreign_classes(arguments)
    try:
        _run(arguments)
    except Preempted:
        return EXIT_CODE
    return 0


def _run(arguments: list[str]) -> None:
    TrainingCLI(
        MMModule,
        MMDataModule,
        parser_class=OneScreenParser,
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
    """LightningCLI that owns ``runs/<name>/`` and lets no checkpoint overrule the command line."""

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
        """A checkpoint's hyperparameters never overrule what was asked for; ``state.check`` compares them instead."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        resumed = config.get("ckpt_path")
        self.checkpoint = state.read_checkpoint(Path(resumed)) if resumed else None
        read_config(Backbone(path=config.model.backbone.path, revision=config.model.backbone.revision))
        self.run = _run_directory(config, str(self.subcommand))
        if _RANK.rank == 0:
            self._parser(self.subcommand).save(_reusable(config), self.run.config, overwrite=True, skip_validation=True)
        if self.subcommand == "fit" and resumed and self.checkpoint is not None and _RANK.rank == 0:
            _continue_metrics(Path(resumed), self.run)
            carry_over(RunDirectory(Path(resumed).parent.parent), self.run, self.checkpoint["global_step"])

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.checkpoint is not None:
            self.model.resume_from(self.checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand]
        given = self._get(self.config_init, "trainer")
        loggers: list[Any] = [MetricsFile(self.run.metrics)]
        if given.get("logger") is not False and config.run.wandb != "off" and self.subcommand == "fit":
            loggers.append(OnlineLogger(self.run.path, mode=config.run.wandb, run_id=self.run.id, name=self.run.name))
        if isinstance(given.get("logger"), (list, tuple)):
            loggers.extend(given["logger"])
        if SLURMEnvironment.detect():
            # Lightning would save inside the signal handler, where ranks can wait for each other for ever.
            kwargs["plugins"] = [*(given.get("plugins") or []), SLURMEnvironment(auto_requeue=False)]
        return super().instantiate_trainer(
            logger=loggers,
            default_root_dir=self.run.path,
            callbacks=[*(given.get("callbacks") or []), *self._callbacks(config)],
            enable_checkpointing=True,
            **kwargs,
        )

    def _callbacks(self, config: Namespace) -> list[Callback]:
        callbacks: list[Callback] = [ProgressBar(), Throughput()]
        given = self._get(self.config_init, "trainer").get("callbacks") or []
        lookers = [callback for callback in given if isinstance(callback, InspectingCallback)]
        _refuse_twice(lookers)
        for callback in lookers:
            callback.run = self.run
        if self.subcommand == "fit":
            evaluation = self._get(self.config_init, "evaluation")
            evaluation.run = self.run
            callbacks += [evaluation, LastCheckpoint(self.run.checkpoints / "last.ckpt", config.run.save_every)]
            if config.data.val is not None:
                callbacks.append(BestCheckpoint(self.run.checkpoints))
        return [*callbacks, RunRecorder(self.run)]

    def after_fit(self) -> None:
        self._close_online()
        if _RANK.rank == 0:
            log.info("run: %s", self.run.path)

    def _close_online(self) -> None:
        for logger in self.trainer.loggers:
            if isinstance(logger, OnlineLogger):
                logger.summarise(census=self.model.census.to_dict(), decisions={str(d.name): str(d) for d in decide})
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
    """Rank 0 makes the folder and tells the ranks that it will start; started ranks take the one they are told."""
    if (told := os.environ.get(RUN_VARIABLE)) and _RANK.rank != 0:
        return RunDirectory(Path(told))
    policy = (config.model.get("tuning") or {}).get("class_path", "IntermediateOnly").rpartition(".")[2]
    default = policy if verb == "fit" else f"{policy}-{verb}"
    if _RANK.rank != 0:
        return RunDirectory(Path(config.run.root).absolute() / (config.run.name or default))
    run = RunDirectory.create(config.run.root, config.run.name, default)
    os.environ[RUN_VARIABLE] = str(run.path)
    return run


def _reusable(config: Namespace) -> Namespace:
    """The config as any verb can read it: what belongs to one call only is left out."""
    kept = config.clone()
    for key in ("ckpt_path", "config", "weights_only", "return_predictions", "verbose"):
        kept.pop(key, None)
    return kept


def _refuse_twice(lookers: Sequence[InspectingCallback]) -> None:
    """Lightning keeps the state of callbacks by their class, and refuses a second one in words about its code."""
    kinds = [type(looker).__name__ for looker in lookers]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise UserError(
                f"trainer.callbacks names {kind} {kinds.count(kind)} times.",
                "A run keeps the clock and the findings of one of each kind.",
                f"Name {kind} once, with all that it shall measure and the closer schedule.",
            )


def _continue_metrics(checkpoint: Path, run: RunDirectory) -> None:
    """A resumed run's curves begin where the first run's did, and hold no step twice.

    Training logs a step under the number of steps before it, a look under the number of steps that are done.
    """
    earlier = checkpoint.parent.parent / "metrics.csv"
    if not earlier.is_file():
        return
    step = state.read_checkpoint(checkpoint)["global_step"]
    with (
        earlier.open(encoding="utf-8", newline="") as source,
        run.metrics.open("w", encoding="utf-8", newline="") as to,
    ):
        reader = csv.DictReader(source)
        writer = csv.DictWriter(to, reader.fieldnames or ["step"], lineterminator="\n")
        writer.writeheader()
        for row in (row for row in reader if row["step"]):
            looked = {key: value for key, value in row.items() if value and key.startswith(("inside/", "inspect/"))}
            if int(row["step"]) < step:
                writer.writerow(row)
            elif int(row["step"]) == step and looked:
                writer.writerow({"step": row["step"], **looked})
    decide("run", f"curves continue those of {earlier.parent.name}", f"resumed at step {step}")
