"""The page of errors: every ``UserError`` in the source, its cause and what to do, for the site's search.

Data flow: the source -> calls of ``UserError(what, why, fix)`` (by AST) -> Markdown by room.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

from docs_pages.markdown import cell, table

_HEAD = """# Errors

What can go wrong and be mended by you, as the package says it: one screen without a traceback, exit status 2 on the
command line, `lightning_mm.UserError` in Python. Words in CAPITALS stand for names and numbers of your run. Copy a part
of a message into the search box.
"""


@dataclass(frozen=True)
class Message:
    """One error as its source has it.

    Args:
        room: Package of lightning_mm that raises it.
        what: What failed.
        why: The cause.
        fix: What to do.
    """

    room: str
    what: str
    why: str
    fix: str


def collect(package: Path) -> list[Message]:
    """Every error of the package, sorted by room and text, each once."""
    found: dict[Message, None] = {}
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError" and len(node.args) == 3:
                found[Message(room, *(_text(argument) for argument in node.args))] = None
    return sorted(found, key=lambda each: (each.room, each.what))


def _text(node: ast.expr) -> str:
    """A string expression as text; what is computed becomes a word in capitals."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _name(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.BoolOp):
        return " / ".join(_text(part) for part in node.values)
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body)} / {_text(node.orelse)}"
    return _name(node)


def _name(node: ast.expr) -> str:
    """The word that stands for a value: the last name in its expression."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, (ast.BoolOp, ast.IfExp, ast.JoinedStr)):
        return _text(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join" and node.args:
        return _name(node.args[0])
    if isinstance(node, ast.Call) and node.args and not isinstance(node.args[0], ast.Starred):
        return _name(node.args[0])
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return _name(node.generators[0].iter)
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    for attribute in ("attr", "id"):
        if (name := getattr(node, attribute, None)) is not None:
            return "…" if name.startswith("__") else str(name).strip("_").upper()
    return "…"


def page(package: Path) -> str:
    """Markdown: a table of errors for each room."""
    text, messages = _HEAD, collect(package)
    for room in sorted({each.room for each in messages}):
        rows = [(cell(each.what), cell(each.why), cell(each.fix)) for each in messages if each.room == room]
        text += f"\n## {room}\n\n" + table(("what", "why", "fix"), rows)
    return text
