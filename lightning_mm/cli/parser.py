"""The parser of the command line, and its errors on one screen.

Data flow: arguments -> ``Parser`` -> options, or jsonargparse's message -> ``UserError``. ``JSONARGPARSE_DEBUG=1``
shows the library's own traceback.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_mm import tuning
from lightning_mm.core.errors import UserError


class Parser(LightningArgumentParser):
    """The parser of all verbs; its errors are ``UserError``s that fit on one screen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated option could silently match another one.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a ``UserError`` instead of printing the usage of hundreds of options."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise explain_error(message, [name for action in self._actions for name in action.option_strings])


def explain_error(message: str, options: Iterable[str]) -> UserError:
    """A jsonargparse error message as ``UserError``.

    Args:
        message: jsonargparse's message.
        options: All option strings, for suggestions.
    """
    if match := re.search(r"unrecognized arguments: (.*)", message, re.S):
        given = match[1].split()[0].partition("=")[0]
        return UserError(f"{given} is no option.", "Nothing reads it.", suggestion(given, options) or "See --help.")
    keys = re.findall(r'(?:Parser key|key) "([\w.+]+)"', message)
    unknown = re.search(r"Option '([\w.]+)' is not accepted", message)
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    why = lines[-1] if lines else message
    if unknown:
        known = _fields_of(message)
        dotted = ".".join([*keys, unknown[1]])
        fix = suggestion(unknown[1], known) or f"Options: {', '.join(known)}."
        return UserError(f"{dotted} is no option.", "The class named there does not have it.", fix)
    dotted = ".".join(dict.fromkeys(keys)) if keys else ""
    if dotted.endswith("tuning") and "import path" in message:
        value = re.search(r"import path string: (\S+)", message)
        named = value[1] if value else ""
        why = f"'{named}' is no tuning policy."
        return UserError(f"{dotted} cannot be read.", why, suggestion(named, _policies()) or _listed(_policies()))
    if dotted.startswith("model.tuning") and "is abstract" in message:
        example = "--model.tuning IntermediateOnly"
        return UserError(f"{dotted} comes without a policy.", "Its options depend on which it is.", f"Add {example}.")
    literal = r"Expected a typing.Literal\[(.*?)\].*?(?:Got|Given) value: (\S+)"
    if match := re.search(literal, message, re.S):
        choices = re.findall(r"'([^']+)'", match[1])
        return UserError(
            f"{dotted}: '{match[2]}' is no choice.", _listed(choices), suggestion(match[2], choices) or "Choose."
        )
    if match := re.search(r"required: (?:\w+\.)?([\w.]+)", message):
        return UserError(
            f"--{match[1]} is missing.", "It has no default.", f"Give --{match[1]} VALUE, or set it in a file."
        )
    return UserError(
        f"{dotted or 'The command line'} cannot be read.", why.replace("<class '", "").replace("'>", ""), _HELP
    )


_HELP = "See --help, or --print_config for a complete file. JSONARGPARSE_DEBUG=1 shows where it was refused."


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


def _policies() -> list[str]:
    return [name for name in tuning.__all__ if issubclass(getattr(tuning, name), tuning.TuningPolicy)][:-1]


def _fields_of(message: str) -> list[str]:
    match = re.search(r"class_path '[\w.]*?(\w+)'", message)
    policy = getattr(tuning, match[1], None) if match else None
    return [field.name for field in fields(policy)] if policy is not None else []


def _listed(names: Iterable[str]) -> str:
    return f"Choices are {', '.join(names)}."
