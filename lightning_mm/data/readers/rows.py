"""Rows in memory, where a file of rows is taken: each door that a file has, and its checks, are theirs too.

Data flow: mappings, as ``json`` would load them -> a temporary JSON file -> the reader of that kind of file.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_mm.core.errors import UserError

PathLike = str | Path
Rows = Iterable[Mapping[str, Any]]

_IMAGES = ("image", "images", "other_images")


def as_file(
    given: PathLike | Rows, image_root: PathLike | None, what: str, stack: ExitStack
) -> tuple[Path, PathLike | None]:
    """A file of rows, and the folder that its pictures are relative to (None: the file's own).

    Args:
        given: The file; or rows, whose pictures are relative to the current folder where there is no ``image_root``.
        image_root: Folder that the pictures are relative to, if one is given.
        what: Name of the argument, for errors.
        stack: Removes the temporary file.

    Raises:
        UserError: It is neither, or there is no row.
    """
    if isinstance(given, (str, Path)):
        return Path(given), image_root
    rows = [given] if isinstance(given, Mapping) else list(given) if isinstance(given, Iterable) else [given]
    if wrong := next((row for row in rows if not isinstance(row, Mapping)), None):
        raise UserError(
            f"{what} cannot be read.",
            f"It holds {type(wrong).__name__}: {str(wrong)[:60]!r}.",
            f"Give {what} as the path of a file, or as rows: mappings, as a line of such a file holds them.",
        )
    if not rows:
        raise UserError(f"{what} is empty.", "It holds no row.", "Give one row or more.")
    folder = Path(stack.enter_context(TemporaryDirectory()))
    file = folder / f"{what}.json"
    file.write_text(json.dumps([_absolute(row) if image_root is None else dict(row) for row in rows], default=str))
    return file, Path("/") if image_root is None else image_root


def _absolute(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with pictures named by their whole path, also in the rows inside it."""
    made = dict(row)
    for key in _IMAGES:
        if isinstance(made.get(key), (str, Path)):
            made[key] = str(Path(made[key]).absolute())
        elif isinstance(made.get(key), (list, tuple)):
            made[key] = [str(Path(each).absolute()) if isinstance(each, (str, Path)) else each for each in made[key]]
    if isinstance(made.get("neighbours"), (list, tuple)):
        made["neighbours"] = [_absolute(each) if isinstance(each, Mapping) else each for each in made["neighbours"]]
    return made
