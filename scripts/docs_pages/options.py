"""The page of every option of the command line, from the parsers themselves.

Data flow: each verb, stopped where it would parse -> its parser -> options by group -> Markdown.
"""

import re
from argparse import SUPPRESS, Action
from typing import Any, NoReturn
from unittest.mock import patch

from docs_pages.markdown import cell, code, table
from lightning_mm.cli.main import VERBS, _import_verb
from lightning_mm.cli.parser import Parser

_TRAINING = ("fit", "validate", "test", "predict")
_HEAD = """# Options

Every option of every verb, as the parsers have it. `-c FILE` may be repeated, later files win; `--print_config` prints a
complete file. Files may name classes of this package, lightning, torch and torchmetrics only, unless `--allow PACKAGE`
is given. Options of policies are in [Policies](policies.md), those of callbacks in [Callbacks](callbacks.md).
"""
_LINK = {"model.tuning": "[Policies](policies.md)", "trainer.callbacks": "[Callbacks](callbacks.md)"}


class _Parser(Exception):
    """Carries a parser out of the verb that made it."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser


def parser_of(verb: str) -> Any:
    """The parser of a verb, made as the verb makes it."""

    def stop(parser: Parser, *_: Any, **__: Any) -> NoReturn:
        raise _Parser(parser)

    with patch.object(Parser, "parse_args", stop):
        try:
            _import_verb(verb)([verb])
        except _Parser as caught:
            parser: Any = caught.parser
            subcommands = parser._subcommands_action
            return parser if subcommands is None else subcommands._name_parser_map[verb]
    raise AssertionError(f"{verb} parses nothing")


def actions(verb: str) -> list[Action]:
    """The options and arguments of a verb that its help shows."""
    shown = [action for action in parser_of(verb)._actions if action.help != SUPPRESS]
    return [action for action in shown if not _is_left_out(action)]


def _is_left_out(action: Action) -> bool:
    """Whether an option is the parser's own: its help, or a file for a whole group."""
    name = _name(action)
    is_group = (action.help or "").startswith("Path to a configuration file")
    return is_group or name in ("--help", "--print_config", "--config") or name.endswith(".help")


def _name(action: Action) -> str:
    """The long form of an option, without the + that appends to a list; the name of an argument."""
    plain = [name for name in action.option_strings if not name.endswith("+")]
    return max(plain, key=len, default=action.dest)


def page() -> str:
    """Markdown: the options of fit by group, of its relatives as far as they differ, and of every other verb."""
    fit = actions("fit")
    text = _HEAD + "\n## fit\n\n" + _groups(fit)
    known = {_name(action) for action in fit}
    for verb in (verb for verb in VERBS if verb != "fit"):
        own = [action for action in actions(verb) if _name(action) not in known]
        shares = verb in (*_TRAINING, "plan")
        text += f"\n## {verb}\n\n" + ("The options of `fit`" + (", and:" if own else ".") + "\n\n" if shares else "")
        text += _table(own if shares else actions(verb)) if own or not shares else ""
    return text


def _groups(found: list[Action]) -> str:
    groups: dict[str, list[Action]] = {}
    for action in found:
        parts = action.dest.split(".")
        groups.setdefault(".".join(parts[: min(2, len(parts) - 1)]) or "of the call", []).append(action)
    merged: dict[str, list[Action]] = {}
    for group, members in groups.items():
        top = group if group.startswith("model.") and len(members) > 1 else group.split(".")[0]
        merged.setdefault(top, []).extend(members)
    return "\n".join(f"### {group}\n\n{_table(members)}" for group, members in merged.items())


def _table(found: list[Action]) -> str:
    return table(("option", "type", "default", "meaning"), map(_row, found))


def _row(action: Action) -> tuple[str, str, str, str]:
    meaning = cell(re.sub(r"\s*\((?:required, )?type:.*$", "", action.help or "", flags=re.S))
    if action.dest in _LINK:
        meaning = f"{meaning} See {_LINK[action.dest]}."
    return code(_name(action)), code(_type(action)), code(_default(action)), meaning


def _type(action: Any) -> str:
    kind = getattr(action, "_typehint", None) or action.type
    if kind is None:
        return ""
    written = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    written = re.sub(r"\b(?:\w+\.)+(?=\w)", "", written).replace("NoneType", "None")
    return written if len(written) < 90 else written[:87] + "..."


def _default(action: Action) -> str:
    value = action.default
    if value is None or value == SUPPRESS:
        return "" if value == SUPPRESS or action.required else "null"
    if isinstance(value, str):
        return value or '""'
    written = getattr(value, "class_path", None)
    if written is None and isinstance(value, dict):
        written = value.get("class_path")
    return str(value if written is None else str(written).rpartition(".")[2])
