"""The consoles of a process: one on stderr for bar and log, one on stdout for results; piped, both are plain lines.

Data flow: log records and tables -> the terminal, above a bar that may be running there, or -> a pipe or file: one
line per message, not wrapped, not padded, without colors.
"""

import io
import logging
import sys
from collections.abc import Iterable
from copy import copy
from functools import cache
from typing import Any

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.table import Table

TABLE_WIDTH = 88
"""Columns that a table may take for its title or note, beyond those of its cells."""
_UNWRAPPED = 100_000
"""Columns of a page on which nothing is wrapped."""


class PlainConsole(Console):
    """A rich console whose output is plain lines where it is no terminal (and no notebook).

    Rich alone would fold such output at 80 columns, and pad every line of a table to its full width.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does; where nobody sees a terminal, as ``plain_text``."""
        if self.is_terminal or self.is_jupyter:
            super().print(*objects, **options)
        else:
            self.file.write(plain_text(*objects))
            self.file.flush()


def plain_text(*objects: Any) -> str:
    """What rich would print, as lines without colors, folding or trailing blanks; tables without rules.

    Example:
        >>> table = Table("policy", "FLOPs", title="A step")
        >>> table.add_row("Full", "12 G")
        >>> print(plain_text(table), end="")
        A step
        policy  FLOPs
        Full    12 G
    """
    page = Console(file=io.StringIO(), width=_UNWRAPPED, color_system=None, force_jupyter=False, highlight=False)
    for each in objects:
        if isinstance(each, Table):
            bare = copy(each)
            bare.title = bare.caption = bare.box = bare.min_width = None
            bare.pad_edge, bare.padding = False, (0, 2, 0, 0)
            page.print(*(part for part in (each.title, bare, each.caption) if part), sep="\n", markup=True)
        else:
            page.print(each, markup=False)
    text = page.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


@cache
def message_console() -> Console:
    """The console on stderr that bar and log share: on one console, a message never cuts the bar in two."""
    return PlainConsole(stderr=True)


@cache
def result_console() -> Console:
    """The console on stdout, for what a verb was asked for."""
    return PlainConsole()


class ConsoleHandler(logging.Handler):
    """Shows log records on ``message_console``, or above whatever bar of rich or tqdm is running."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        try:
            text = self.format(record)
            if isinstance(sys.stderr, FileProxy):  # a bar is running, ours or Lightning's: it moves down a line
                sys.stderr.write(f"{text}\n")
            elif (tqdm := _running_tqdm()) is not None:  # as that of transformers' Trainer
                tqdm.write(text, file=sys.stderr)
            else:  # a table that a library has laid out keeps its lines
                message_console().print(text, markup=False, highlight=False, soft_wrap="\n" in text)
        except Exception:  # as logging's own handlers do: a message never ends a run
            self.handleError(record)


def _running_tqdm() -> Any:
    """Tqdm's class, where one of its bars is running in this process; else None. It is not imported for it."""
    tqdm = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    return tqdm if getattr(tqdm, "_instances", None) else None


def show_messages() -> None:
    """Show what this package logs (decisions, progress) on the console, unless a handler does so already."""
    logger = logging.getLogger("lightning_mm")
    if not logger.handlers:
        logger.addHandler(ConsoleHandler())
    logger.setLevel(logging.INFO)


def show_warnings_of(library: str, talks: Iterable[str] = ()) -> None:
    """Show a library's warnings on the same console; its own handler would write into a running bar.

    Args:
        library: Name of its logger.
        talks: Loggers of it whose other messages are shown too: they say what the user has asked for.
    """
    logger = logging.getLogger(library)
    logger.handlers, logger.propagate = [ConsoleHandler()], False
    logger.setLevel(logging.WARNING)
    for each in talks:
        logging.getLogger(each).setLevel(logging.INFO)
