"""Files and folders that are written whole or not at all, and JSON in them.

Data flow: content -> a hidden file or folder beside the target -> renamed to the target; a reader, and a run that
starts after a kill, finds the old content or the new one, never a half.
"""

import contextlib
import json
import logging
import math
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lightning_mm.core.errors import UserError

log = logging.getLogger("lightning_mm")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, replacing one that exists; what fails or is killed on the way leaves the old file as it was.

    Args:
        path: The file; its folder must exist.
        content: Text is written in UTF-8, with line ends as they are.

    Raises:
        OSError: It cannot be written; no temporary file is left.
        UnicodeEncodeError: The text holds a lone surrogate.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replaced_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Give an open file that takes the place of ``path`` when the block ends, and is removed when it raises.

    It lies beside ``path``, on the same file system. Its content and its name reach the disk, so that a power cut
    leaves the old file or the new one, whole.

    Args:
        path: The file; its folder must exist.

    Raises:
        OSError: It cannot be written; the old file is as it was, and no temporary file is left.
    """
    # The process id alone is not enough: processes on other machines may share the folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_absent_or_empty(folder: Path) -> bool:
    """Whether a folder can be made at this path without touching anything: nothing is there, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``target`` when the block ends, and is removed when it raises.

    Args:
        target: Folder to make; its parents are made where they are missing.
        overwrite: Whether it replaces a folder that holds something. If not, such a folder stays as it is and the block
            ends in an OSError.

    Yields:
        A folder on the same file system, in a hidden one beside ``target``, with the permissions of any new folder.

    Raises:
        OSError: The folder cannot be made or renamed; a folder that was at ``target`` is still there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        staged, old = Path(scratch) / "new", Path(scratch) / "old"
        staged.mkdir()
        yield staged
        had_content = overwrite and not is_absent_or_empty(target)
        if had_content:
            target.rename(old)
        try:
            staged.replace(target)
        except OSError:
            if had_content:
                old.rename(target)
            raise


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically; numbers that are not finite become null, which every reader knows."""
    write_atomically(path, json.dumps(_to_json(value), indent=1, allow_nan=False))


def append_jsonl(path: Path, rows: Iterable[object]) -> None:
    """Append one JSON line per row, in one write, so that a kill cuts at most the last line."""
    lines = "".join(json.dumps(_to_json(row), allow_nan=False) + "\n" for row in rows)
    if lines:
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: If it is missing or broken, saying which.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.name} is missing.", f"There is no {path}.", "Let the run write it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read.", str(error), "Let the run write it again.") from error


def read_json_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON file that holds a list of them; none where there is no file yet.

    A file that cannot be read is warned about and counts as empty: whoever adds to it begins it anew.
    """
    try:
        rows = read_json(path) if path.exists() else []
    except UserError as error:
        log.warning("%s %s It is begun anew.", error.what, error.why)
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the rows of a JSON-lines file, and count the lines that hold none (a kill can cut the last one).

    Raises:
        UserError: If the file is missing or cannot be read at all.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path.name} is missing.", str(error), "Let the run write it.") from error
    rows = [_parse_row(line) for line in text.split("\n") if line.strip()]
    valid = [row for row in rows if row is not None]
    return valid, len(rows) - len(valid)


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _to_json(value: object) -> object:
    """What JSON can hold: dataclasses become dicts, paths strings, and non-finite numbers null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return _to_json(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value
