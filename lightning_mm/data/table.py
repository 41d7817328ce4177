"""The canonical table: every row of a source as one Arrow row, written once and mapped into memory by all processes.

A source is converted in parts, each by one worker process, into a folder of the cache that is named after the content
of the source's files and everything else that its rows depend on. A part that is finished stays: a conversion that was
interrupted goes on where it was. Processes wait for each other at a lock, so that each table is written once. Only a
part without some rows for a reason that lies beside the file (a link that leads out, a picture that could not be
downloaded) is converted again at the next start; other rows then are another Arrow file, as processes may read the old.

Data flow: ``OpenSource`` -> ``write_table`` -> ``part-00000.arrow`` (rows), ``part-00000.json`` (what was not used, and
a digest of the rows) -> ``StoredTable`` -> ``row_table``, which gives Samples.

Shapes: a part has R rows of up to about 10,000.
"""

import filecmp
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from filelock import FileLock

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.file_digests import FileDigests
from lightning_mm.core.io import write_atomically
from lightning_mm.core.processes import run_in_processes
from lightning_mm.data.image_source import ImageBytes, ImageSource
from lightning_mm.data.readers import row_files
from lightning_mm.data.readers.invalid_row import BESIDE_THE_ROWS
from lightning_mm.data.readers.source import OpenSource, Part, PartReport
from lightning_mm.data.sample import Rejection, Sample

FORMAT = 1
"""Part of every key: a change of the schema, or of how rows are read, makes new tables."""
_TURN = pa.struct(
    [
        ("role", pa.string()),
        ("text", pa.string()),
        ("type", pa.string()),
        ("train", pa.bool_()),
        ("reasoning", pa.string()),
        ("tool_calls", pa.string()),
    ]
)
# A path in the file system's own bytes, which need not be UTF-8; or, where the content is stored, a name.
_IMAGE = pa.struct([("path", pa.binary()), ("stored", pa.bool_())])
SCHEMA = pa.schema(
    [
        ("origin", pa.string()),
        ("id", pa.string()),
        ("turns", pa.list_(_TURN)),
        ("tools", pa.string()),
        ("extra", pa.string()),
        ("images", pa.list_(_IMAGE)),
        ("videos", pa.list_(_IMAGE)),
        ("images_bytes", pa.list_(pa.large_binary())),
        ("videos_bytes", pa.list_(pa.large_binary())),
    ]
)
"""``images_bytes`` is empty, or aligned with ``images``: null for an image that is a file."""
_START = time.time()
_SEEN: set[Path] = set()
"""Reports that this process has used: it looks again where others of the same start, which wait, do not."""
_LARGE = 10_000_000
"""Bytes from which on it is said where a table is."""
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 1024, 64 << 20


@dataclass(frozen=True)
class StoredPart:
    """One Arrow file of a table.

    Args:
        file: The file.
        num_rows: Rows in it.
        num_read: Rows of the source that it was made of, those that cannot be used included.
        digest: Of the content of its rows, wherever the files are.
        rejections: What cannot be used.
        ignored: Column of the source -> in how many rows it was there and not read.
    """

    file: Path
    num_rows: int
    num_read: int
    digest: str
    rejections: tuple[Rejection, ...]
    ignored: dict[str, int]


@dataclass(frozen=True)
class StoredTable:
    """A source as a table on disk.

    Args:
        folder: Folder in the cache.
        parts: Its files, in the order of the source.
        name: Name of the source.
        shape: What its rows look like.
    """

    folder: Path
    parts: tuple[StoredPart, ...]
    name: str
    shape: str

    @property
    def num_rows(self) -> int:
        """Rows of the table, before any check of pictures."""
        return sum(part.num_rows for part in self.parts)

    @property
    def num_read(self) -> int:
        """Rows of the source."""
        return sum(part.num_read for part in self.parts)

    @property
    def rejections(self) -> Iterator[Rejection]:
        """Rows that are not in the table, with reasons."""
        return (rejection for part in self.parts for rejection in part.rejections)

    @property
    def ignored(self) -> dict[str, int]:
        """Columns that were not read, and in how many rows each was there."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.ignored)
        return dict(total)


def cache_folder(given: str | Path | None = None) -> Path:
    """Where tables are kept: as given, else ``lightning_mm/data`` in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(given) if given else Path(home) / "lightning_mm" / "data").absolute()


def store_table(source: OpenSource, cache: Path, num_workers: int = 0) -> StoredTable:
    """The table of a source: the one in the cache, or made now.

    Args:
        source: What to read.
        cache: Folder of all tables.
        num_workers: Processes that convert; 0 and 1 convert in this one.

    Raises:
        UserError: The cache cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        parts, key = _parts_and_key(source, cache)
        folder = cache / "tables" / key
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            missing = [number for number in range(len(parts)) if not _is_done(_report_file(folder, number))]
            if missing:
                _convert(source, [(number, parts[number]) for number in missing], folder, num_workers)
    except OSError as error:
        raise UserError(
            f"The table of {source.source.path} cannot be written.",
            f"{error}.",
            "Give --data.cache_dir a folder with room that can be written.",
        ) from error
    stored = tuple(_stored_part(folder, number) for number in range(len(parts)))
    return StoredTable(folder, stored, source.source.name, source.shape)


def _is_done(report: Path) -> bool:
    """Whether a part is complete, and would not become another one now."""
    if not report.exists():
        return False
    content = json.loads(report.read_text(encoding="utf-8"))
    return content["is_settled"] or (content["time"] >= _START and report not in _SEEN)


def _convert(source: OpenSource, parts: list[tuple[int, Part]], folder: Path, num_workers: int) -> None:
    for left in folder.glob("*.tmp"):  # by a process that was killed
        left.unlink()
    jobs = [(source, part, folder, number) for number, part in parts]
    run_in_processes(_write_part, jobs, num_workers, f"reading {source.source.name}")
    size = sum(file.stat().st_size for file in folder.glob("*.arrow"))
    if size > _LARGE:
        log_decision("data.cache_dir", folder, f"the rows of {source.source.name}, {size / 1e6:.0f} MB")


def _write_part(source: OpenSource, part: Part, folder: Path, number: int) -> None:
    """Convert one part; its report is written last, and says that the part is complete."""
    report, rejections, digest = PartReport(), list[Rejection](), xxhash.xxh3_128()
    temporary = folder / f"part-{number:05d}.{os.getpid()}.tmp"
    num_rows = 0
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for rows in _batches(_columns(source.read(part, report), rejections)):
                writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                num_rows += len(rows)
                for row in rows:
                    _update(digest, row)
        file = _put(temporary, folder, number)
    finally:
        temporary.unlink(missing_ok=True)
    dropped = sum(rejection.kind == "dropped" for rejection in rejections)
    content = {
        "file": file.name,
        "time": time.time(),
        "is_settled": not any(rejection.reason.startswith(BESIDE_THE_ROWS) for rejection in rejections),
        "num_rows": num_rows,
        "num_read": num_rows + dropped,
        "digest": digest.hexdigest(),
        "rejections": [asdict(rejection) for rejection in rejections],
        "ignored": dict(report.ignored),
    }
    write_atomically(_report_file(folder, number), json.dumps(content))


def _put(written: Path, folder: Path, number: int) -> Path:
    """The file of a part: the one with this content, or a new one."""
    for turn in count():
        file = folder / (f"part-{number:05d}-{turn}.arrow" if turn else f"part-{number:05d}.arrow")
        if not file.exists():
            return written.replace(file)
        if filecmp.cmp(written, file, shallow=False):
            return file
    raise AssertionError


def _stored_part(folder: Path, number: int) -> StoredPart:
    file = _report_file(folder, number)
    report = json.loads(file.read_text(encoding="utf-8"))
    _SEEN.add(file)
    return StoredPart(
        folder / report["file"],
        report["num_rows"],
        report["num_read"],
        report["digest"],
        tuple(Rejection(**rejection) for rejection in report["rejections"]),
        report["ignored"],
    )


def _columns(read: Iterable[Sample | Rejection], rejections: list[Rejection]) -> Iterator[dict[str, Any]]:
    """Samples as rows of ``SCHEMA``; what is rejected goes to ``rejections``."""
    for sample in read:
        if isinstance(sample, Rejection):
            rejections.append(sample)
            continue
        row = {
            "origin": _as_utf8(sample.origin),
            "id": _as_utf8(sample.id),
            "turns": [
                {
                    "role": turn.role,
                    "text": turn.text,
                    "type": turn.question_type,
                    "train": turn.train,
                    "reasoning": turn.reasoning,
                    "tool_calls": turn.tool_calls,
                }
                for turn in sample.turns
            ],
            "tools": sample.tools,
            "extra": json.dumps(sample.extra, ensure_ascii=True, default=str) if sample.extra else "",
            **_image_columns("images", sample.images),
            **_image_columns("videos", sample.videos),
        }
        if fault := _not_text(row):
            rejections.append(Rejection(sample.origin, f"not text: {fault} holds half of a surrogate pair"))
        else:
            yield row


def _image_columns(name: str, images: Sequence[ImageSource]) -> dict[str, Any]:
    """One column of paths or names, and one of contents."""
    stored = [isinstance(image, ImageBytes) for image in images]
    paths = [_name_bytes(image.name) if isinstance(image, ImageBytes) else os.fsencode(str(image)) for image in images]
    contents = [image.data if isinstance(image, ImageBytes) else None for image in images] if any(stored) else []
    cells = [{"path": path, "stored": is_stored} for path, is_stored in zip(paths, stored, strict=True)]
    return {name: cells, f"{name}_bytes": contents}


def _name_bytes(name: str) -> bytes:
    """What a stored picture is called; a row may give any name, also one that no file can have."""
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        return name.encode("utf-8", "replace")


def _as_utf8(name: str) -> str:
    """A name by which a row is found again; those of a tar's members need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _not_text(row: dict[str, Any]) -> str:
    """Name of the first text of a row that no UTF-8 can hold; '' if there is none."""
    texts = [("tools", row["tools"])]
    texts += [
        (f"the {turn['role']}", turn[key])
        for turn in row["turns"]
        for key in ("text", "reasoning", "type", "tool_calls")
    ]
    return next((name for name, text in texts if not text.isascii() and _has_surrogate(text)), "")


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Lists of rows, cut by number and by bytes, so that memory stays bounded."""
    while batch := list(islice(rows, 1)):
        size = _size(batch[0])
        while size <= _BYTES_AT_ONCE and len(batch) < _ROWS_AT_ONCE and (row := next(rows, None)) is not None:
            batch.append(row)
            size += _size(row)
        yield batch


def _size(row: dict[str, Any]) -> int:
    """Bytes of a row's images and videos, and characters of its texts."""
    contents = [*row["images_bytes"], *row["videos_bytes"], row["extra"], row["tools"]]
    contents += [turn[key] for turn in row["turns"] for key in ("text", "reasoning", "tool_calls")]
    return sum(len(content or b"") for content in contents)


def _update(digest: Any, row: dict[str, Any]) -> None:
    """Add a row to a digest that is the same wherever its files are: of a path its last name counts."""
    names = [os.path.basename(image["path"]) for image in (*row["images"], *row["videos"])]
    digest.update(repr((row["id"], row["turns"], row["tools"], row["extra"], names)).encode())
    for content in (*row["images_bytes"], *row["videos_bytes"]):
        digest.update(content or b"")


def _report_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.json"


def _parts_and_key(source: OpenSource, cache: Path) -> tuple[list[Part], str]:
    """The parts of a source, and the name of its table: all that its rows depend on, and its parts.

    Finding parts can take a pass over the text, so they are remembered for the content of its files.
    """
    digests = FileDigests(cache / "digests.json")
    content = [FORMAT, source.identity(), [digests(file) for file in source.files]]
    digests.save()
    remembered = cache / "parts" / f"{_digest([*content, row_files.PART_BYTES])}.json"
    try:
        parts = [Part.of(given) for given in json.loads(remembered.read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        parts = source.parts()
        remembered.parent.mkdir(exist_ok=True)
        write_atomically(remembered, json.dumps([asdict(part) for part in parts]))
    return parts, _digest([*content, [repr(part) for part in parts]])


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
