"""The command line: finds the verb and runs it; errors become one message and an exit status.

Data flow: arguments -> the verb's function (imported when needed) -> exit status.
"""

import errno
import gc
import logging
import sys
import warnings
from collections.abc import Callable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_mm.cli.parser import suggestion
from lightning_mm.core.console import show_messages
from lightning_mm.core.decisions import DecisionLog
from lightning_mm.core.errors import UserError, first_line
from lightning_mm.data.dataloader import worker_killed_error

_KNOWN = (
    ".*does not have many workers.*",  # data.num_workers is the user's choice
    ".*LightningCLI's args parameter.*",  # the arguments are passed on as they came
    ".*in eval mode at the start.*",  # what is frozen is meant to be; the census shows it
    ".*isinstance.treespec, LeafSpec.*",  # between Lightning 2.6.6 and torch 2.13
    ".*callbacks used to create the checkpoint.*",  # a run may be resumed or tested without some of them
    ".*dirpath has changed.*",  # a resumed run has its own folder
    ".*exists and is not empty.*",  # the checkpoint folder of a run that is resumed
)
VERBS = ("fit", "validate", "test", "predict", "plan", "inspect", "trace", "edit", "export", "report")


def run(arguments: list[str]) -> int:
    """Run one verb; returns the exit status."""
    _configure_logging()
    try:
        with DecisionLog().opened():
            return _load_verb(arguments[0])(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MisconfigurationException, OSError) as error:
        if (explained := _explain(error)) is None:
            raise
        print(f"error: {explained}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _explain(error: Exception) -> UserError | None:
    """A library's error as ``UserError``; None if the user cannot mend it."""
    first = first_line(error)
    if isinstance(error, MisconfigurationException):
        return UserError("The trainer cannot be set up.", first, "Change the trainer's options, or its -c file.")
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            "The device is out of memory.",
            first,
            "Lower data.batch_size, data.max_tokens or data.max_length, or set model.activation_checkpointing true.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError("The disk is full.", first, "Free some space; earlier checkpoints of the run are whole.")
    return worker_killed_error(error) if isinstance(error, RuntimeError) else None


def _load_verb(name: str) -> Callable[[list[str]], int]:
    """Import a verb, and enable garbage collection again, which ``__main__`` disables for a fast start."""
    try:
        return _import_verb(name)
    finally:
        if not gc.isenabled():
            gc.freeze()
            gc.enable()


def _import_verb(name: str) -> Callable[[list[str]], int]:
    if name == "export":
        from lightning_mm.cli.export import export

        return export
    if name == "plan":
        from lightning_mm.cli.plan import plan

        return plan
    if name == "trace":
        from lightning_mm.cli.trace import trace

        return trace
    if name == "edit":
        from lightning_mm.cli.edit import edit

        return edit
    if name == "inspect":
        from lightning_mm.cli.inspect import inspect

        return inspect
    if name == "report":
        from lightning_mm.cli.export import report

        return report
    if name in VERBS:
        from lightning_mm.cli.fit import train

        return train
    raise UserError(f"'{name}' is no verb.", f"Verbs are {', '.join(VERBS)}.", suggestion(name, VERBS) or "See --help.")


def _configure_logging() -> None:
    """Log our own messages to the console; of the libraries, warnings only."""
    show_messages()
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in _KNOWN:
        warnings.filterwarnings("ignore", message=message)
