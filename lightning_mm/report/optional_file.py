"""Reading files of a run that may be missing, half written or not ours: their content, or why there is none.

Data flow: a path and a function that reads it -> ``OptionalFile`` -> the template shows its content, or its problem. A
report never fails for one bad file.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError

PARSE_ERRORS = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, csv.Error, OSError,
)  # fmt: skip
"""What reading contents of a wrong shape raises."""


@dataclass(frozen=True)
class OptionalFile:
    """What was read of a file: its content, or the problem that left none."""

    content: Any = None
    problem: str = ""


def read_optional(path: Path, read: Callable[[], Any]) -> OptionalFile:
    """The content that ``read`` returns, or the reason why there is none."""
    if not path.exists():
        return OptionalFile(problem=f"The run has no {path.name}.")
    try:
        return OptionalFile(read())
    except UserError as error:
        return OptionalFile(problem=f"{error.what} {error.why}")
    except PARSE_ERRORS as error:
        return OptionalFile(problem=f"{path.name} is not as it should be ({type(error).__name__}: {str(error)[:200]}).")
