"""What the results of all verbs have in common: they print themselves, in a terminal and in a notebook.

Data flow: a result's ``tables`` -> text (``print``), HTML (a notebook's cell), or the console of the command line.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_mm.core.decisions import DecisionLog, decision_log, run_is_open

_WIDTH = 140
_PAGE = '<pre style="white-space:pre; overflow-x:auto; line-height:normal; font-family:monospace">{code}</pre>'


class PrintedResult(ABC):
    """A result that is printed as its tables."""

    @abstractmethod
    def tables(self) -> Sequence[Table | Text | str]:
        """What is printed of it, in order."""

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
        self._print(console)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]  # the StringIO above

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, record=True, force_jupyter=False)
        self._print(console)
        return console.export_html(inline_styles=True, code_format=_PAGE)

    def _print(self, console: Console) -> None:
        for each in self.tables():
            console.print(each, highlight=False)


@contextmanager
def open_decisions() -> Iterator[DecisionLog]:
    """The log of the run that is open, as on the command line; elsewhere a new one, for this verb alone."""
    if run_is_open():
        yield decision_log()
        return
    with DecisionLog().opened() as log:
        yield log
