"""The verb check: what a fit would read of its data, shown before it trains.

Data flow: the options of ``fit`` -> model and data as configured, no weights loaded -> ``verbs.check`` -> tables, a
JSON file, a page.
"""

import json
import sys
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from lightning_mm.cli.fit import TrainingCLI, parse_only
from lightning_mm.core.console import result_console
from lightning_mm.core.io import write_atomically
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.verbs import check as verb


def check(arguments: list[str]) -> int:
    """Tell what is in the data; returns the exit status: 1 where a fit would stop on it."""
    cli = parse_only(CheckingCLI, arguments[1:])
    config = cli.config
    found = verb.check(None, MMDataModule(**config.data.as_dict()), samples=config.samples)
    console = result_console()
    for each in found.tables():
        console.print(each, highlight=False)
    if config.json:
        write_atomically(Path(config.json), json.dumps(found.to_dict(), indent=1))
    if config.html:
        found.write_html(config.html)
    if found.error is not None:
        print(f"error: {found.error}", file=sys.stderr)
    return 0 if found.error is None else 1


class CheckingCLI(TrainingCLI):
    """The command line of ``fit`` with the options of ``check``; no trainer and no module is made."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        # Without a model, what is read can still be told.
        next(action for action in parser._actions if action.dest == "model.backbone.path").required = False
        parser.set_defaults({"model.backbone.path": ""})
        parser.add_argument("--samples", type=int, default=3, help="Rows of each source that are shown.")
        parser.add_argument("--json", type=str | None, default=None, help="File to write everything to, for programs.")
        parser.add_argument("--html", type=str | None, default=None, help="Page to write, with pictures.")

    def before_instantiate_classes(self) -> None:
        """Do nothing: no run directory is made."""

    def instantiate_classes(self) -> None:
        """Do nothing: only the data module is made."""
