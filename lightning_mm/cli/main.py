"""The command line: finds the verb and runs it; errors become one message and an exit status.

Data flow: arguments -> the verb's function (imported when needed) -> exit status.
"""

import gc
import sys
import warnings
from collections.abc import Callable

from lightning_mm.cli.explain_errors import explain_exception, suggestion
from lightning_mm.cli.shipped_configs import find_configs
from lightning_mm.core.console import show_messages, show_warnings_of
from lightning_mm.core.decisions import DecisionLog
from lightning_mm.core.errors import UserError
from lightning_mm.verbs.config_classes import judged_names

_KNOWN = (
    ".*does not have many workers.*",  # data.num_workers is the user's choice
    ".*LightningCLI's args parameter.*",  # the arguments are passed on as they came
    ".*in eval mode at the start.*",  # what is frozen is meant to be; the census shows it
    ".*isinstance.treespec, LeafSpec.*",  # between Lightning 2.6.6 and torch 2.13
    ".*callbacks used to create the checkpoint.*",  # a run may be resumed or tested without some of them
    ".*dirpath has changed.*",  # a resumed run has its own folder
    ".*was called without a model.*",  # OnExceptionCheckpoint: what is gone on from is said
    ".*is set, but there is no last checkpoint.*",  # the same
    ".*exists and is not empty.*",  # the checkpoint folder of a run that is resumed
)
VERBS = (
    "fit", "validate", "test", "predict", "replay", "check", "plan", "inspect", "trace", "edit", "study", "export",
    "report",
)  # fmt: skip
_ALSO_CALLED = {
    **dict.fromkeys(("train", "finetune", "fine-tune", "tune", "run", "sft"), "fit"),
    **dict.fromkeys(("val", "eval", "evaluate"), "validate"),
    **dict.fromkeys(("generate", "infer", "answer", "chat"), "predict"),
    **dict.fromkeys(("data", "dataset", "preview", "verify", "dry-run"), "check"),
    **dict.fromkeys(("estimate", "cost", "profile"), "plan"),
    **dict.fromkeys(("probe", "look", "analyze", "analyse", "select"), "inspect"),
    **dict.fromkeys(("merge", "save", "push", "convert"), "export"),
}
"""What the verbs are called elsewhere."""


def run(arguments: list[str]) -> int:
    """Run one verb; returns the exit status."""
    _configure_logging()
    try:
        with DecisionLog().opened(), judged_names(arguments[1:]):
            return _load_verb(arguments[0])(find_configs(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if (explained := explain_exception(error)) is None:
            raise
        print(f"error: {explained}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


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
    if name == "replay":
        from lightning_mm.cli.replay import replay

        return replay
    if name == "check":
        from lightning_mm.cli.check import check

        return check
    if name == "plan":
        from lightning_mm.cli.plan import plan

        return plan
    if name == "trace":
        from lightning_mm.cli.trace import trace

        return trace
    if name == "edit":
        from lightning_mm.cli.edit import edit

        return edit
    if name == "study":
        from lightning_mm.cli.study import study

        return study
    if name == "inspect":
        from lightning_mm.cli.inspect import inspect

        return inspect
    if name == "report":
        from lightning_mm.cli.export import report

        return report
    if name in VERBS:
        from lightning_mm.cli.fit import train

        return train
    hint = f"Did you mean {_ALSO_CALLED[name]}?" if name in _ALSO_CALLED else suggestion(name, VERBS)
    raise UserError(f"'{name}' is no verb.", f"Verbs are {', '.join(VERBS)}.", hint or "See --help.")


def _configure_logging() -> None:
    """Log our own messages to the console; of the libraries, warnings only."""
    show_messages()
    show_warnings_of("lightning.pytorch", ("lightning.pytorch.callbacks", "lightning.pytorch.profilers"))
    show_warnings_of("lightning.fabric")
    for message in _KNOWN:
        warnings.filterwarnings("ignore", message=message)
