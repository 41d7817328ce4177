"""The verb plan: what a run will cost, before it starts and without weights, compared with every other policy.

Data flow: the options of ``fit`` -> model and data as configured, nothing loaded -> ``verbs.plan`` -> tables, and a
JSON file.
"""

import json
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_mm.cli.fit import TrainingCLI, parse_only
from lightning_mm.core.console import PlainConsole
from lightning_mm.core.errors import UserError
from lightning_mm.planning.devices import DEVICES
from lightning_mm.verbs import plan as verb


def plan(arguments: list[str]) -> int:
    """Tell what a run will cost; returns the exit status."""
    cli = parse_only(PlanningCLI, arguments[1:])
    config = cli.config
    lengths = {name: config[name] for name in ("image_tokens", "text_tokens", "supervised")}
    if config.data.train is None and all(length is None for length in lengths.values()):
        raise UserError(
            "The lengths of rows are not known.",
            "Neither data.train nor lengths are given.",
            "Give --data.train FILE, or --image_tokens, --text_tokens and --supervised.",
        )
    found = verb.plan(
        cli.config_init.model,
        data=cli.config_init.data,
        **lengths,
        batch_size=config.batch_size,
        precision=str(config.trainer.precision),
        devices=_ranks(config),
        accumulate_grad_batches=int(config.trainer.accumulate_grad_batches),
        max_steps=int(config.trainer.max_steps),
        device=config.device,
        compare=config.compare,
    )
    console = PlainConsole()
    for each in found.tables():
        console.print(each)
    if config.json:
        Path(config.json).write_text(json.dumps(found.to_dict(), indent=1))
    return 0


class PlanningCLI(TrainingCLI):
    """The command line of ``fit`` with the options of ``plan``; no trainer is made and nothing is run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        listed = ", ".join(DEVICES)
        parser.add_argument("--device", type=str, default="measured", help=f"{listed}, cpu, or measured here.")
        parser.add_argument("--json", type=str | None, default=None, help="File to write everything to.")
        parser.add_argument("--compare", type=bool, default=True, help="Tell of the other policies too.")
        parser.add_argument("--image_tokens", type=int | None, default=None, help="Of a row, in place of data.train.")
        parser.add_argument("--text_tokens", type=int | None, default=None, help="The same; answers are text too.")
        parser.add_argument("--supervised", type=int | None, default=None, help="The same: tokens of the answers.")
        parser.add_argument("--batch_size", type=int | None, default=None, help="In place of data.batch_size.")

    def before_instantiate_classes(self) -> None:
        """Do nothing: no run directory is made."""

    def instantiate_classes(self) -> None:
        parts = Namespace(model=self.config.model, data=self.config.data)
        self.config_init = self.parser.instantiate_classes(parts)


def _ranks(config: Namespace) -> int:
    devices = config.trainer.devices
    per_node = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
    return per_node * int(config.trainer.num_nodes)
