"""A file of conversations, read at once.

Data flow: path -> ``source.open_source`` -> ``read_conversations`` -> ``ConversationFile``.
"""

from dataclasses import dataclass
from pathlib import Path

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.readers.invalid_row import InvalidRow
from lightning_mm.data.readers.json_rows import MAX_ROW_CHARACTERS, iter_json_rows
from lightning_mm.data.readers.opened import PartReport, check_any
from lightning_mm.data.readers.row_reader import RowReader
from lightning_mm.data.readers.source import ReadOptions, Source, open_source
from lightning_mm.data.sample import Rejection, Sample

__all__ = [
    "MAX_ROW_CHARACTERS", "ConversationFile", "InvalidRow", "RowReader", "iter_json_rows", "missing_file_reason",
    "read_conversations",
]  # fmt: skip


@dataclass(frozen=True)
class ConversationFile:
    """The content of a file.

    Args:
        samples: Usable rows in file order.
        rejections: Rows that cannot be used.
        num_rows: Number of all rows.
    """

    samples: tuple[Sample, ...]
    rejections: tuple[Rejection, ...]
    num_rows: int


def missing_file_reason(path: Path) -> tuple[str, str]:
    """Why and fix of the UserError for a path that is no file."""
    if path.is_dir():
        return "It is a folder.", "Name the .json or .jsonl file in it."
    return "It does not exist.", "Check the path; it is relative to the folder the command runs in."


def read_conversations(
    path: Path | str, image_root: Path | str | None = None, *, answers_required: bool = True
) -> ConversationFile:
    """The samples and rejections of a file of conversations.

    Args:
        path: A file in one of the forms that ``source`` reads.
        image_root: Folder that image paths are relative to and may not leave; None takes the file's own folder.
        answers_required: Whether a row without an answer is rejected; if not, an open question gets an empty answer.

    Raises:
        UserError: There is no such file, it cannot be read, or it has no usable row.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No data file {path}.", *missing_file_reason(path))
    source = open_source(
        Source(str(path), image_root=None if image_root is None else str(image_root)),
        ReadOptions(answers_required=answers_required),
    )
    report = PartReport()
    read = [each for part in source.parts() for each in source.read(part, report)]
    samples = tuple(each for each in read if isinstance(each, Sample))
    rejections = tuple(each for each in read if isinstance(each, Rejection))
    check_any(path, bool(samples), rejections, len(read))
    if report.num_marked:
        log_decision(
            "data.image_marks",
            "put in front of the first question",
            f"{report.num_marked} rows of {path.name} name images but hold no <image> mark",
        )
    return ConversationFile(samples, rejections, len(read))
