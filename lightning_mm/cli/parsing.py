"""Errors of the command line and of config files, on one screen, with the dotted key and what was probably meant.

Data flow: jsonargparse's message -> ``UserError``. ``JSONARGPARSE_DEBUG=1`` shows the library's own traceback.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_mm import tuning
from lightning_mm.errors import UserError

ALLOWED = ("lightning.", "torch.", "lightning_mm.", "torchmetrics.")
"""Where a config's ``class_path`` may point without ``--allow``."""


class OneScreenParser(LightningArgumentParser):
    """A parser whose errors a person can read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated option would be taken for another one without a word.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a UserError instead of printing the usage of some hundred options."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise explained(message, [name for action in self._actions for name in action.option_strings])


def explained(message: str, options: Iterable[str]) -> UserError:
    """A parser's message as what, why and fix.

    Args:
        message: As the library gives it.
        options: Every option string that exists.
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
        return UserError(f"{dotted} is no option.", why, suggestion(unknown[1], known) or f"Options: {', '.join(known)}.")
    dotted = ".".join(dict.fromkeys(keys)) if keys else ""
    if dotted.endswith("tuning") and "import path" in message:
        value = re.search(r"import path string: (\S+)", message)
        named = value[1] if value else ""
        why = f"'{named}' is no tuning policy."
        return UserError(f"{dotted} cannot be read.", why, suggestion(named, _policies()) or _listed(_policies()))
    if match := re.search(r"Expected a typing.Literal\[(.*?)\]. Got value: (\S+)", message, re.S):
        choices = re.findall(r"'([^']+)'", match[1])
        return UserError(f"{dotted}: '{match[2]}' is no choice.", _listed(choices), suggestion(match[2], choices) or "Choose.")
    if match := re.search(r"required: (?:\w+\.)?([\w.]+)", message):
        return UserError(f"--{match[1]} is missing.", "It has no default.", f"Give --{match[1]} VALUE, or set it in a file.")
    return UserError(f"{dotted or 'The command line'} cannot be read.", why.replace("<class '", "").replace("'>", ""), _HELP)


_HELP = "See --help, or --print_config for a complete file. JSONARGPARSE_DEBUG=1 shows where it was refused."


def suggestion(given: str, known: Iterable[str]) -> str:
    """Did you mean ...?

    Example:
        >>> suggestion("--model.tunning", ["--model.tuning", "--data.train"])
        'Did you mean --model.tuning?'
        >>> suggestion("xyz", ["--model.tuning"])
        ''
    """
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"Did you mean {near[0]}?" if near else ""


def refuse_foreign_classes(config: Any, allowed: Iterable[str], key: str = "") -> None:
    """Stop before a config file makes us import and call something that nobody has allowed.

    Raises:
        UserError: Naming the key and the class.
    """
    prefixes = (*ALLOWED, *(f"{name.rstrip('.')}." for name in allowed))
    if isinstance(config, dict):
        path = config.get("class_path")
        if isinstance(path, str) and not f"{path}.".startswith(prefixes):
            raise UserError(
                f"{key or 'class_path'}: {path} is not loaded.",
                f"Config files may name classes of {', '.join(p.rstrip('.') for p in prefixes)} only.",
                f"If you trust it: --allow {path.partition('.')[0]}",
            )
        for name, value in config.items():
            refuse_foreign_classes(value, allowed, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list):
        for index, value in enumerate(config):
            refuse_foreign_classes(value, allowed, f"{key}[{index}]")


def _policies() -> list[str]:
    return [name for name in tuning.__all__ if issubclass(getattr(tuning, name), tuning.TuningPolicy)][:-1]


def _fields_of(message: str) -> list[str]:
    match = re.search(r"class_path '[\w.]*?(\w+)'", message)
    policy = getattr(tuning, match[1], None) if match else None
    return list(getattr(policy, "__dataclass_fields__", {}))


def _listed(names: Iterable[str]) -> str:
    return f"Choices are {', '.join(names)}."
