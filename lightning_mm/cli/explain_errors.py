"""Messages of jsonargparse and errors of libraries as ``UserError``s that fit on one screen.

Data flow: a message or an exception -> what it is about (option, class, file, package) -> ``UserError``, with the
nearest name that would have been right.
"""

import difflib
import errno
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from traceback import walk_tb

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lightning_mm import tuning
from lightning_mm.core.errors import UserError, first_line
from lightning_mm.core.processes import worker_killed_error
from lightning_mm.verbs.config_classes import OPTION_BASES, explain_refusal, refused_names

_HELP = "See --help, or --print_config for a complete file. JSONARGPARSE_DEBUG=1 shows where it was refused."
_TRAINER = "Change the trainer's options, or its -c file."
_PACKAGES = {
    "comet_ml": "comet-ml",
    "liger_kernel": "liger-kernel",
    "transformer_engine": "transformer-engine",
    "PIL": "pillow",
    "yaml": "pyyaml",
}
"""Where a package's name at pip is not that of its module."""


def explain_message(message: str, options: Iterable[str]) -> UserError:
    """A jsonargparse error message as ``UserError``.

    Args:
        message: jsonargparse's message.
        options: All option strings, for suggestions.
    """
    if match := re.search(r"unrecognized arguments: (\S*)|does not accept option '(\S+)'", message):
        given = f"--{match[2]}" if match[2] else match[1].partition("=")[0]
        is_file = given.endswith((".yaml", ".yml"))
        fix = f"Files are named by -c {given}." if is_file else suggestion(given, options) or "See --help."
        return UserError(f"{given} is no option.", "Nothing reads it.", fix)
    if match := re.search(r"argument (\S+): expected one argument", message):
        given = match[1].rpartition("/")[2]
        return UserError(f"{given} has no value.", "Nothing follows it.", f"Give {given} VALUE.")
    keys = re.findall(r'(?:Parser key|key) "([\w.+]+)"', message)
    dotted = ".".join(dict.fromkeys(key.rstrip("+") for key in keys))
    kinds: Sequence[Callable[[str, str], UserError | None]] = (
        explain_refusal,
        _missing_package,
        _no_option,
        _no_class,
        _no_choice,
    )
    for explain in kinds:
        if (found := explain(message, dotted)) is not None:
            return found
    if (missing := _missing(message, dotted, set(options))) is not None:
        return missing
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    why = (lines[-1] if lines else message).replace("<class '", "").replace("'>", "")
    kinds_expected = dict.fromkeys(re.findall(r"Expected a <class '(bool|int|float|str)'>", message))
    if kinds_expected and "Expected" not in why:
        why = f"Expected {' or '.join(kinds_expected)}. {why}"
    return UserError(f"{dotted or 'The command line'} cannot be read.", why, _HELP)


def explain_exception(error: Exception) -> UserError | None:
    """A library's error as ``UserError``; None if the user cannot mend it."""
    first = first_line(error)
    if (package := _missing_package(str(error))) is not None:
        return package
    if isinstance(error, MisconfigurationException):
        return UserError("The trainer cannot be set up.", first, _TRAINER)
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            "The device is out of memory.",
            first,
            "Lower data.batch_size, data.max_tokens or data.max_length, or set model.activation_checkpointing true.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" of {error.filename}" if error.filename else ""
        return UserError(f"The disk{where} is full.", first, "Free some space; checkpoints of earlier steps are whole.")
    if isinstance(error, RuntimeError) and "No space left on device" in str(error) and "torch_" in str(error):
        return UserError(
            "Shared memory (/dev/shm) is full.",
            first,
            "Set data.num_workers 0, or give the container more of it (docker run --shm-size 8g).",
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return UserError(
            "The machine is out of memory.",
            first or "Python could not allocate any more.",
            "Ask lightning-mm plan what the run takes; lower data.batch_size, data.max_length or data.num_workers.",
        )
    if isinstance(error, RuntimeError) and (killed := worker_killed_error(error)) is not None:
        return killed
    if isinstance(error, (ValueError, RuntimeError)) and _is_lightnings_own(error):
        return UserError("The trainer cannot do what it was asked for.", first, _TRAINER)
    return None


def explain_trainer(error: Exception) -> UserError:
    """An error that Lightning raised while the trainer was made, from the options that it was given."""
    if (package := _missing_package(str(error))) is not None:
        return package
    for name in refused_names(str(error)):  # an option that takes strings too has taken it for one
        return UserError(
            f"{name} is not loaded.",
            "The command line does not name it, and its package is not trusted.",
            f"If you trust it: --allow {name.partition('.')[0]}",
        )
    hint = ""
    if match := re.search(r"invalid (?:strategy|accelerator) name: `(strategy|accelerator)='(\w+)'", str(error)):
        known = {
            "strategy": StrategyRegistry.available_strategies(),
            "accelerator": AcceleratorRegistry.available_accelerators(),
        }
        hint = suggestion(match[2], [*known[match[1]], "auto", "gpu"])
    return UserError("The trainer cannot be set up.", first_line(error), hint or _TRAINER)


def suggestion(given: str, known: Iterable[str]) -> str:
    """The hint 'Did you mean X?' with the known name closest to ``given``; empty if none is close.

    Example:
        >>> suggestion("--model.tunning", ["--model.tuning", "--data.train"])
        'Did you mean --model.tuning?'
        >>> suggestion("xyz", ["--model.tuning"])
        ''
    """
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"Did you mean {near[0]}?" if near else ""


def _missing_package(message: str, _: str = "") -> UserError | None:
    """An optional package that is not installed."""
    if match := re.search(r"No module named '([\w.]+)'", message):
        module = match[1].partition(".")[0]
        named = _PACKAGES.get(module, module)
    elif match := re.search(r"Requirement '([\w-]+)[^']*' not met", message):
        found = re.findall(r"Requirement '([\w-]+)[^']*' not met", message)
        named = min(found, key=len)  # tensorboardX beside tensorboard
    elif match := re.search(r"must have (?:\w+) installed.*?`pip install (?:-U )?([\w-]+)`", message, re.S):
        named = match[1]
    else:
        return None
    return UserError(f"The package {named} is not installed.", "An option needs it.", f"pip install {named}")


def _missing(message: str, dotted: str, options: set[str]) -> UserError | None:
    """A required option or argument that was not given."""
    if match := re.search(r"required: (?:fit\.|validate\.|test\.|predict\.)?([\w.]+)", message):
        of_class = re.search(r"class_path '[\w.]*?(\w+)'", message)
        name = f"{dotted}.{match[1]}" if of_class and dotted else match[1]
        if not of_class and f"--{name}" not in options:
            return UserError(
                f"{name.upper()} is missing.", "The verb works on it.", f"Give {name.upper()}; see --help."
            )
        why = f"{of_class[1]} needs it." if of_class else "It has no default."
        return UserError(f"--{name} is missing.", why, f"Give --{name} VALUE, or set it in a file.")
    if dotted and re.search(r"Expected an? .*(?:Got|Given) value: None", message):
        return UserError(
            f"--{dotted} is missing.", "It has no default.", f"Give --{dotted} VALUE, or set it in a file."
        )
    return None


def _no_option(message: str, dotted: str) -> UserError | None:
    """An option that the named class does not have."""
    if (match := re.search(r"Option '([\w.]+)' is not accepted", message)) is None:
        return None
    known = _options_of(message)
    fix = suggestion(match[1], known) or (f"Options: {', '.join(known)}." if known else "See --help.")
    return UserError(f"{dotted}.{match[1]} is no option.", "The class named there does not have it.", fix)


def _no_class(message: str, dotted: str) -> UserError | None:
    """A class that does not exist, or an abstract one."""
    if dotted.startswith("model.tuning") and "is abstract" in message:
        example = "--model.tuning IntermediateOnly"
        return UserError(f"{dotted} comes without a policy.", "Its options depend on which it is.", f"Add {example}.")
    wrong = r"import path string: ([\w.]+)|class_path '([\w.]+)':\s+module '[\w.]+' has no attribute"
    if (match := re.search(wrong, message)) is None:
        return None
    given = match[1] or match[2]
    last = dotted.rpartition(".")[2]
    if last == "tuning":
        known, what = _policies(), "tuning policy"
    elif last in OPTION_BASES:
        known, what = _class_names(OPTION_BASES[last]), last.rstrip("s")
    else:
        return None
    fix = suggestion(given.rpartition(".")[2], known) or _listed(known)
    return UserError(f"{dotted} cannot be read.", f"'{given}' is no {what}.", fix)


def _no_choice(message: str, dotted: str) -> UserError | None:
    given = re.search(r"Expected a typing.Literal\[.*?(?:Got|Given) value: (\S+)", message, re.S)
    if given is None or given[1] == "None":
        return None
    listed = " ".join(re.findall(r"typing.Literal\[(.*?)\]", message))
    choices = list(dict.fromkeys(re.findall(r"[\w.-]+", listed)))
    fix = suggestion(given[1], choices) or "Give one of them."
    return UserError(f"{dotted}: '{given[1].strip(chr(39))}' is no choice.", _listed(choices), fix)


def _is_lightnings_own(error: Exception) -> bool:
    """Whether Lightning raised an error by itself, and not where our code below the command line called it."""
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in walk_tb(error.__traceback__)]
    ours = (name for name in modules if name.startswith("lightning_mm."))
    by_lightning = bool(modules) and modules[-1].startswith("lightning.")
    return by_lightning and all(name.startswith(("lightning_mm.cli.", "lightning_mm.__main__")) for name in ours)


def _policies() -> list[str]:
    return [name for name in tuning.__all__ if issubclass(getattr(tuning, name), tuning.TuningPolicy)][:-1]


def _class_names(bases: Iterable[type]) -> list[str]:
    """Names of the public classes that derive from one of some bases, ours and Lightning's."""
    found: dict[str, None] = {}
    left = list(bases)
    while left:
        kind = left.pop()
        left += kind.__subclasses__()
        if (
            not kind.__name__.startswith("_")
            and not inspect.isabstract(kind)
            and kind.__module__.startswith(("lightning.", "lightning_mm."))
        ):
            found[kind.__name__] = None
    return sorted(found)


def _options_of(message: str) -> list[str]:
    """Names of the options of the first class that a message names."""
    if (match := re.search(r"class_path '([\w.]+)\.(\w+)'", message)) is None:
        return []
    kind = getattr(sys.modules.get(match[1]), match[2], None)
    return [] if kind is None else [name for name in inspect.signature(kind).parameters if name != "kwargs"]


def _listed(names: Iterable[str]) -> str:
    return f"Choices are {', '.join(names)}."
