"""Reading files that may be anything: what was found, or why there is nothing; a report never fails for one bad file.

Data flow: a path and what reads it -> ``Found`` -> the template lays out its content, or says its problem.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError

BROKEN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, csv.Error, OSError)
"""What reading contents of a wrong shape raises."""


@dataclass(frozen=True)
class Found:
    """What became of one section: its content, or why there is none."""

    content: Any = None
    problem: str = ""


def found(path: Path, read: Callable[[], Any]) -> Found:
    """The content that ``read`` gives, or the reason why there is none."""
    if not path.exists():
        return Found(problem=f"The run has no {path.name}.")
    try:
        return Found(read())
    except UserError as error:
        return Found(problem=f"{error.what} {error.why}")
    except BROKEN as error:
        return Found(problem=f"{path.name} is not as it should be ({type(error).__name__}: {str(error)[:200]}).")
