"""Says which callbacks, loggers or plugins a later file or option puts aside: it sets a list anew where it names it.

Data flow: arguments in their order -> what each says of the trainer's lists -> a line for every list that lost members.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_mm.cli.trainer_parts import as_list
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError

_LISTS = ("callbacks", "logger", "plugins")
_FILES = ("-c", "--config")


def say_replaced(arguments: list[str]) -> None:
    """Log what a later ``trainer.callbacks``, ``logger`` or ``plugins`` drops of the ones before it.

    Args:
        arguments: Command line arguments; files are named by their paths.
    """
    held: dict[str, list[Any]] = {}
    for source, option, value in _settings(arguments):
        key, members = option.rstrip("+"), as_list(value)
        before = held.get(key, [])
        held[key] = before + members if option.endswith("+") else members
        if lost := [_name(member) for member in before if member not in held[key]]:
            why = f"{source} sets the list anew; {key}+ in its place adds to it"
            log_decision(f"trainer.{key}", f"without {', '.join(lost)}", why)


def _settings(arguments: list[str]) -> Iterator[tuple[str, str, Any]]:
    """(where it is said, option of the trainer, its value) of everything that the arguments say of the lists."""
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not equals:
            value = arguments[index + 1] if index + 1 < len(arguments) else ""
        if option in _FILES:
            content = _read(Path(value).read_text(encoding="utf-8") if Path(value).is_file() else value, value)
            if value and not isinstance(content, dict):
                why = "It is empty." if content is None else "It does not consist of options and their values."
                raise UserError(
                    f"{value} sets no options.", why, "Write them as {trainer: {max_steps: 100}} or in lines."
                )
            trainer = content.get("trainer") if content else None
            for key, given in trainer.items() if isinstance(trainer, dict) else ():
                if str(key).rstrip("+") in _LISTS:
                    yield value, str(key), given
        elif option.startswith("--trainer.") and option.removeprefix("--trainer.").rstrip("+") in _LISTS:
            yield option, option.removeprefix("--trainer."), _read(value, option)


def _read(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is no YAML.", " ".join(str(error).split()), "Mend it there.") from error


def _name(member: Any) -> str:
    """The class of a callback, logger or plugin, however it is written."""
    named = member.get("class_path", member) if isinstance(member, dict) else member
    return str(named).rpartition(".")[2]
