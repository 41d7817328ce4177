"""The verbs fit, validate, test and predict: LightningCLI with our run directory, callbacks and errors.

Data flow: arguments and YAML files -> run directory -> module, data module, trainer -> the verb -> report.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_mm.cli import trainer_parts
from lightning_mm.cli.explain_errors import explain_trainer
from lightning_mm.cli.parser import Parser
from lightning_mm.cli.replaced_lists import say_replaced
from lightning_mm.cli.resume import begun_anew, find_checkpoint, own_folder, take_over
from lightning_mm.core.decisions import decision_log, log, log_decision
from lightning_mm.core.distributed import all_gather_object
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import append_jsonl, read_json
from lightning_mm.core.run_directory import RunDirectory, release_claims
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.loading import Backbone, read_config
from lightning_mm.report.wandb import OnlineLogger
from lightning_mm.training.callbacks.evaluation import HeldOutEvaluation
from lightning_mm.training.callbacks.stop_signals import Preempted
from lightning_mm.training.checkpoint_file import KEY, read_checkpoint
from lightning_mm.training.module_options import ModuleOptions
from lightning_mm.training.standard_callbacks import keep_all
from lightning_mm.training.trainer_checks import check_precision
from lightning_mm.training.unfinished import left_after

_WANDB = Literal["auto", "online", "offline", "off"]
_RANK: Any = rank_zero_only  # its ``rank`` is set before torch.distributed is
_ROOT = "runs"
RUN_VARIABLE = "LIGHTNING_MM_RUN"
"""Environment variable with the run directory, for the processes that a multi-device run starts for other ranks."""


def train(arguments: list[str]) -> int:
    """Run fit, validate, test or predict; returns the exit status."""
    say_replaced(arguments)
    try:
        with _no_folder_of_a_failed_start():
            _run(arguments)
    except Preempted as stopped:
        return int(stopped.code or 0)
    except SIGTERMException:  # it came before training, and Lightning heard it
        return 128 + signal.SIGTERM
    except SystemExit as left:
        if isinstance(left.__context__, KeyboardInterrupt):  # Lightning makes an exit of Ctrl-C
            raise KeyboardInterrupt from None
        raise
    return 0


@contextmanager
def _no_folder_of_a_failed_start() -> Iterator[None]:
    """Remove the run's folder if the run fails before it has begun."""
    if _RANK.rank == 0:
        os.environ.pop(RUN_VARIABLE, None)
    try:
        yield
    except BaseException:
        made = os.environ.get(RUN_VARIABLE) if _RANK.rank == 0 else None
        if made and not RunDirectory(Path(made)).has_begun:
            shutil.rmtree(made, ignore_errors=True)
        raise
    finally:
        release_claims()


def parse_only(cli: "type[TrainingCLI]", arguments: list[str]) -> "TrainingCLI":
    """The options of a verb that takes those of ``fit`` and runs no trainer.

    Args:
        cli: Its command line.
        arguments: Behind the verb.
    """
    return cli(
        ModuleOptions,
        MMDataModule,
        parser_class=Parser,
        auto_configure_optimizers=False,
        save_config_callback=None,
        seed_everything_default=0,
        load_from_checkpoint_support=False,
        run=False,
        args=arguments,
    )


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._asked: list[str] = kwargs["args"]
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static, and called on self
        """The verb that runs: a parser for each of the others would take a second."""
        return {verb: skipped for verb, skipped in LightningCLI.subcommands().items() if verb in self._asked[:1]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run.root", type=str, default=_ROOT, help="Folder of all runs.")
        parser.add_argument(
            "--run.name", type=str | None, default=None, help="Name of this run; the policy's if not given."
        )
        parser.add_argument(
            "--run.wandb", type=_WANDB, default="auto", help="W&B: online if logged in, else offline; or off."
        )
        parser.add_argument(
            "--run.project",
            type=str | None,
            default=None,
            help="W&B project; else WANDB_PROJECT or lightning_mm.",
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
        _take_root(config)
        asked = config.get("ckpt_path")
        if asked:
            found = find_checkpoint(config.ckpt_path, config.run.root, config.run.name or _policy(config))
            config.ckpt_path = None if found is None else str(found)
        resumed = config.get("ckpt_path")
        self.checkpoint = read_checkpoint(Path(resumed), mapped=False) if resumed else None
        read_config(Backbone(path=config.model.backbone.path, revision=config.model.backbone.revision))
        goes_on = own_folder(Path(resumed), config.run.name) if self.subcommand == "fit" and resumed else None
        if asked == "auto" and not resumed and self.subcommand == "fit" and _RANK.rank == 0:
            goes_on = begun_anew(config.run.root, config.run.name or _policy(config))
        self.run = _run_directory(config, str(self.subcommand), goes_on)
        if _RANK.rank == 0:
            self._parser(self.subcommand).save(
                _reusable_config(config), self.run.config, overwrite=True, skip_validation=True, skip_none=False
            )
        if self.subcommand == "fit" and resumed and self.checkpoint is not None and _RANK.rank == 0:
            earlier = RunDirectory(Path(resumed).absolute().parent.parent)
            take_over(earlier, self.run, self.checkpoint["global_step"], left_after(self.checkpoint))

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.checkpoint is not None:
            self.model.resume_from(self.checkpoint)
            self.datamodule.resume_from(self.checkpoint[KEY]["settings"])
            self.checkpoint = None  # the trainer takes it, and lets go of it

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config, fits = self.config[self.subcommand], self.subcommand == "fit"
        given = self._get(self.config_init, "trainer")
        if given.get("barebones"):
            raise UserError(
                "trainer.barebones: true leaves no run.", "It logs and saves nothing.", "Use it with Trainer in Python."
            )
        evaluation = self._get(self.config_init, "evaluation") if fits else None
        parts = trainer_parts.callbacks(given, self.run, config.run.save_every, evaluation, config.data.val is not None)
        resumed = Path(config.ckpt_path) if config.get("ckpt_path") else None
        if plugins := trainer_parts.plugins(given.get("plugins"), resumed, self.checkpoint):
            kwargs["plugins"] = plugins
        wandb = "off" if self.subcommand == "predict" else config.run.wandb
        if given.get("precision") is not None:
            check_precision(str(given.precision))
        try:
            trainer = super().instantiate_trainer(
                logger=trainer_parts.loggers(given.get("logger"), self.run, wandb, config.run.project),
                default_root_dir=self.run.path,
                callbacks=parts,
                **kwargs,
            )
        except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
            raise explain_trainer(error) from error
        keep_all(trainer)
        return trainer

    def after_validate(self) -> None:
        self._close_online()

    def after_test(self) -> None:
        self._close_online()

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
                logger.log_comparison(self.model.census.policy)
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


def _run_directory(config: Namespace, verb: str, goes_on: RunDirectory | None) -> RunDirectory:
    """The run directory: rank 0 makes it and passes it to the ranks it starts by ``RUN_VARIABLE``.

    Args:
        config: The options.
        verb: Name of the verb.
        goes_on: The folder of the run that goes on; None: the run has a new one.
    """
    if (given := os.environ.get(RUN_VARIABLE)) and _RANK.rank != 0:
        return RunDirectory(Path(given))
    if goes_on is not None:
        if _RANK.rank == 0 and not goes_on.claim():
            raise UserError(
                f"{goes_on.path} is in use.",
                "Another process trains in it: two would write over each other's checkpoints.",
                "Wait for it or stop it, or give another --run.name, which makes a copy.",
            )
        if _RANK.rank == 0:  # alone: another rank might remove what this one is writing
            goes_on.remove_temporary_files()
        if config.get("ckpt_path"):
            log_decision("run", f"goes on in {goes_on.path}", "from its last.ckpt; another --run.name makes a copy")
        os.environ[RUN_VARIABLE] = str(goes_on.path)
        return goes_on
    default = _policy(config) if verb == "fit" else f"{_policy(config)}-{verb}"
    if _RANK.rank != 0:
        return RunDirectory(Path(config.run.root).absolute() / (config.run.name or default))
    run = RunDirectory.create(config.run.root, config.run.name, default, kind=verb)
    run.claim()
    os.environ[RUN_VARIABLE] = str(run.path)
    return run


def _policy(config: Namespace) -> str:
    """Name of the policy, which is that of a run whose name is not given."""
    named: str = (config.model.get("tuning") or {}).get("class_path", "IntermediateOnly")
    return named.rpartition(".")[2]


def _take_root(config: Namespace) -> None:
    """Let ``trainer.default_root_dir`` be the folder of all runs, where ``run.root`` is not given."""
    asked = config.trainer.get("default_root_dir")
    if asked is None:
        return
    if config.run.root == _ROOT:
        config.run.root = str(asked)
        log_decision("run.root", asked, "trainer.default_root_dir; the run has a folder of its own in it")
    else:
        log_decision("trainer.default_root_dir", "not used", f"run.root is {config.run.root}")
    config.trainer.default_root_dir = None


def _reusable_config(config: Namespace) -> Namespace:
    """The config without the options of a single call, so that every verb can read it."""
    kept = config.clone()
    for key in ("ckpt_path", "config", "weights_only", "return_predictions", "verbose"):
        kept.pop(key, None)
    _spell_values(kept)
    return kept


def _spell_values(options: Any) -> None:
    """Replace what YAML cannot write by words: defaults of Lightning's callbacks are Enums and devices."""
    for key, value in enumerate(options) if isinstance(options, list) else list(vars(options).items()):
        if isinstance(value, Enum):
            options[key] = value.value
        elif isinstance(value, torch.device):
            options[key] = str(value)
        elif isinstance(value, (Namespace, list)):
            _spell_values(value)
