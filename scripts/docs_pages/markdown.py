"""Markdown tables, and docstrings as their cells.

Data flow: rows of text -> Markdown.
"""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence

from docstring_parser import parse


def cell(text: object) -> str:
    """Text as the content of a table cell: one line, bars and angle brackets escaped."""
    plain = re.sub(r"`([^`<]+) <\s*([^>`]+?)\s*>`_+", r"\1 (\2)", " ".join(str(text).split()))  # links of Sphinx
    escaped = plain.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"``([^`]+)``", lambda code: "`" + code[1] + "`", escaped)


def code(text: object) -> str:
    """Text as inline code in a table cell; empty for None and empty text."""
    flat = " ".join(str(text).split()).replace("|", "\\|")
    return f"`{flat}`" if text is not None and flat else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def arguments_of(kind: type) -> Mapping[str, str]:
    """Argument -> its description, from the docstrings of a class and its bases, the class's own first."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if each.__doc__ and not each.__doc__.startswith(f"{each.__name__}("):
            found |= {p.arg_name: p.description or "" for p in parse(inspect.cleandoc(each.__doc__)).params}
    return found


def summary_of(kind: object) -> str:
    """What a docstring says before its sections."""
    parsed = parse(inspect.getdoc(kind) or "")
    return "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)
