"""Which names in files become objects: the judge that jsonargparse asks before it imports one.

Data flow: a name in a config file of any suffix, a sub-config, an environment variable, or the config of a run ->
``_Judge`` -> the object, or a refusal -> ``UserError`` with file, option and name.

Importing a class runs its package's code, and options that take functions call them. So names are judged where they
become objects, by what they are and where they are defined, however they are written: ``torch.os.system`` is a function
of ``posix``. More is trusted only by the command line: what it names itself, and the packages of ``--allow``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from typing import Any

import lightning.pytorch.cli  # noqa: F401  (importing it lets jsonargparse fetch configs, which is switched off below)
import torch
from jsonargparse import set_parsing_settings
from jsonargparse._common import check_import_path, parsing_settings
from jsonargparse._optionals import _get_config_read_mode
from jsonargparse._util import config_load_stack, get_import_path, import_object
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torchmetrics import Metric

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.tuning import TuningPolicy

ALLOWED = ("lightning", "torch", "lightning_mm", "torchmetrics")
"""Packages whose classes a file may name without ``--allow``."""
OPTION_BASES: dict[str, tuple[type, ...]] = {
    "callbacks": (Callback,),
    "logger": (Logger,),
    "profiler": (Profiler,),
    "strategy": (Strategy,),
    "plugins": (CheckpointIO, ClusterEnvironment, LayerSync, Precision),
}
"""Options of the trainer that are classes, and what those derive from."""
_KINDS = (*(base for bases in OPTION_BASES.values() for base in bases), Accelerator, TuningPolicy, Metric)
_FUNCTIONS = ("torch.distributed.algorithms.ddp_comm_hooks",)
"""Where the functions are that files may name without ``--allow``: DDPStrategy's ``ddp_comm_hook``."""
_USES = "callbacks, loggers, profilers, strategies, plugins, policies, metrics, layers of torch.nn, plain settings"
_TABLE = "import_path_verdicts"
_FILES = ("-c", "--config")
_NAME = re.compile(r"(?<![\w./-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?![\w./-])")


class NotTrustedError(ImportError, ValueError):
    """A name that a file must not make an object of; jsonargparse reports both bases as errors of the option."""


@dataclass(frozen=True)
class _Refusal:
    name: str
    file: str
    why: str
    package: str

    def __str__(self) -> str:
        return f"{self.name} is not loaded ({self.file or 'no file'}): {self.why}"


@dataclass(eq=False)
class _Judge(Mapping[str, bool]):
    """jsonargparse's table of import paths: every path is in it, and true where what it names may be imported.

    jsonargparse looks up the path as it is written before it imports an object, then the path of its definition.

    Args:
        packages: Those of ``--allow``.
        named: What the command line names; other paths of the same objects are added when they are imported.
        file: What is read, where jsonargparse does not know it.
        refused: What has been refused.
    """

    packages: tuple[str, ...] = ()
    named: set[str] = field(default_factory=set)
    file: str = ""
    refused: list[_Refusal] = field(default_factory=list)

    def __getitem__(self, path: str) -> bool:
        if path in self.named:
            found = import_object(path, check_path=False)
            self.named |= {_home(found), _shortest(found)}
            return True
        allowed = (*ALLOWED, *self.packages)
        if not _within(path, allowed):
            self._refuse(path, path, f"Files may name classes of {', '.join(allowed)} only.")
        found = import_object(path, check_path=False)
        home = _home(found)
        if _within(home, self.packages):
            return True
        if not _within(home, ALLOWED):
            self._refuse(path, home, f"It is {home}, and files may name classes of {', '.join(allowed)} only.")
        if not _is_of_use(found, home):
            self._refuse(path, home, f"It is none of what files may name: {_USES}.")
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def _refuse(self, path: str, home: str, why: str) -> None:
        stack = config_load_stack.get()
        self.refused.append(_Refusal(path, stack[-1][1] if stack else self.file, why, home.partition(".")[0]))
        raise NotTrustedError(str(self.refused[-1]))


@contextmanager
def judged_names(arguments: Sequence[str] = (), file: str = "") -> Iterator[None]:
    """While active, jsonargparse makes only objects of names that are trusted, and fetches no config by URL.

    Within another one, what that trusts is trusted too.

    Args:
        arguments: Command line arguments: what they name themselves, and the packages of ``--allow``, are trusted.
        file: What is read, for messages, where jsonargparse does not know it.
    """
    before, fetches = dict(parsing_settings), "s" in _get_config_read_mode()
    outer = before[_TABLE] if isinstance(before[_TABLE], _Judge) else _Judge()
    packages = (*outer.packages, *_allowed_by(arguments))
    if arguments and packages:
        log_decision("allow", ", ".join(packages), "files may name anything that these packages define")
    judge = _Judge(packages, outer.named | _named_by(arguments), file)
    set_parsing_settings(config_read_mode_fsspec_enabled=False, instantiate_subclass_spec_in_any=False)
    parsing_settings.update({_TABLE: judge, "import_paths_enforced": True})
    try:
        _assert_judged()
        yield
    finally:
        parsing_settings.update(before)
        set_parsing_settings(config_read_mode_fsspec_enabled=fetches)


def explain_refusal(message: str, option: str) -> UserError | None:
    """The error for a name that the judge has refused; None if the message is of something else.

    Args:
        message: jsonargparse's message.
        option: Dotted name of the option.
    """
    judge = parsing_settings[_TABLE]
    refused = judge.refused if isinstance(judge, _Judge) else []
    # An option that takes strings too says the value alone.
    said = refused_names(message)
    found = next((each for each in reversed(refused) if str(each) in message or each.name in said), None)
    if found is None:
        return None
    where = ": ".join(part for part in (found.file, option) if part)
    return UserError(f"{where}: {found.name} is not loaded.", found.why, f"If you trust it: --allow {found.package}")


def refused_names(text: str) -> list[str]:
    """Names in a text that the judge has refused, such as one that was then taken for a plain string."""
    judge = parsing_settings[_TABLE]
    refused = [each.name for each in judge.refused] if isinstance(judge, _Judge) else []
    # A file that is named as a sub-config, and is not there, was tried as a class too.
    return [name for name in _NAME.findall(text) if name in refused and not name.endswith((".yaml", ".yml", ".json"))]


def _allowed_by(arguments: Sequence[str]) -> list[str]:
    """Packages of ``--allow``."""
    values = [value for option, value in _options(arguments) if option == "--allow"]
    return [name.strip().rstrip(".") for value in values for name in value.split(",") if name.strip()]


def _named_by(arguments: Sequence[str]) -> set[str]:
    """Dotted names in the values of options of the trainer and the module, and in YAML that stands in for a file."""
    values = [
        value
        for option, value in _options(arguments)
        if option.startswith(("--trainer.", "--model.")) or (option in _FILES and ":" in value)
    ]
    return {name for value in values for name in _NAME.findall(value)}


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option, value) of all arguments."""
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        yield option, value if equals else following


def _within(path: str, packages: Sequence[str]) -> bool:
    return f"{path}.".startswith(tuple(f"{package}." for package in packages))


def _home(found: Any) -> str:
    """Where an object is defined; of a value, where its class is."""
    named = found if isinstance(found, type) or hasattr(found, "__qualname__") else type(found)
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"


def _shortest(found: Any) -> str:
    """The path that jsonargparse writes for an object."""
    try:
        return get_import_path(found) or ""
    except ValueError:
        return ""


def _is_of_use(found: Any, home: str) -> bool:
    """Whether an object of an allowed package is what an option of files can mean, and runs nothing else."""
    if found is torch.dtype or isinstance(found, torch.dtype):
        return True
    if not isinstance(found, type):
        return _within(home, _FUNCTIONS)
    settings = is_dataclass(found) and "__call__" not in dir(found)
    # type.__call__ is of the metaclass and not in dir(): only classes whose instances can be called have it there.
    return settings or issubclass(found, (*_KINDS, Enum)) or home.startswith("torch.nn.modules.")


def _assert_judged() -> None:
    """Fail if jsonargparse does not ask the judge any more."""
    try:
        check_import_path("os.system")
    except NotTrustedError:
        return
    raise AssertionError("jsonargparse imports names without asking")
