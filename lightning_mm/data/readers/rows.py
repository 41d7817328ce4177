"""Rows in memory, where a file of rows is taken: each door that a file has, and its checks, are theirs too.

Data flow: mappings, as ``json`` would load them, or a dataset of ``datasets`` -> a file (temporary for one call, in the
cache for a data module) -> the reader of that kind of file.
"""

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock
from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import staged_folder, write_atomically

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


def in_cache(given: Any, image_root: PathLike | None, what: str, cache: Path) -> Any:
    """What was given where it names files; for rows or a dataset in memory, a source in the cache that holds them.

    Rows are a file named after their content, a dataset a folder named after its fingerprint, which ``datasets`` makes
    from its data and transforms: the same is the same source in a later run. After a transform that ``datasets`` cannot
    hash, each run keeps a copy of its own.

    Args:
        given: Paths and sources, rows, a ``datasets.Dataset`` or ``DatasetDict``; None is returned.
        image_root: Folder that the pictures are relative to; None: the current folder.
        what: Name of the argument, for errors.
        cache: Folder of the cache.

    Raises:
        UserError: Rows hold something besides JSON and pictures, or it is a stream.
    """
    if hasattr(given, "save_to_disk"):
        fingerprint = getattr(given, "_fingerprint", None) or [each._fingerprint for each in given.values()]
        folder = cache / "given" / hashlib.sha256(repr(fingerprint).encode()).hexdigest()[:32]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "lock"):  # all ranks come here at the same time
            if not folder.exists():
                with staged_folder(folder) as staged:
                    given.save_to_disk(staged)
        return {"path": str(folder), "name": what, "image_root": str(image_root or Path.cwd())}
    if isinstance(given, Sequence) and not isinstance(given, str) and given and all(map(_is_row, given)):
        rows = [_absolute(row) if image_root is None else dict(row) for row in given]
        try:
            content = json.dumps(rows, default=_picture_text)
        except (TypeError, ValueError) as error:
            fix = "Give text, numbers, lists, mappings and pictures, or a datasets.Dataset."
            raise UserError(f"Rows of {what} cannot be written as JSON.", f"{error}.", fix) from error
        file = cache / "given" / f"{what}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, content)
        return {"path": str(file), "name": what, "image_root": str("/" if image_root is None else image_root)}
    if not isinstance(given, (str, Path, Mapping, Sequence, type(None))):
        raise UserError(
            f"{what} is {type(given).__name__}.",
            "It is a path, a source with a path, a list of these, rows, or a datasets.Dataset.",
            "Save a stream first, or give the files that it reads.",
        )
    return str(given) if isinstance(given, Path) else given


def _picture_text(value: object) -> str:
    """A picture in memory as text that the readers decode: PNG, whose pixels are the picture's."""
    if isinstance(value, Image.Image):
        stream = io.BytesIO()
        value.save(stream, "PNG")
        value = stream.getvalue()
    if isinstance(value, (bytes, bytearray)):
        return f"data:image/png;base64,{base64.b64encode(value).decode()}"
    raise TypeError(f"{type(value).__name__} is no JSON: {str(value)[:60]!r}")


def _is_row(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "path" not in entry


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
