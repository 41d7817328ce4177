"""One split of the data (train, val, test or predict): its sources read, its pictures checked, its usable rows.

Data flow: paths as given -> ``readers`` -> ``table`` (one per source) -> ``picture_check`` -> ``RowTable`` of the rows
in use; what is not used goes to ``RejectedSamples``.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import rank_and_world_size, run_on_all_ranks
from lightning_mm.core.errors import UserError
from lightning_mm.data.image_source import open_arrow
from lightning_mm.data.picture_check import check_pictures, checked_part, is_checked
from lightning_mm.data.readers.source import ReadOptions, Source, open_source, parse_sources
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.row_table import RowTable, TablePart
from lightning_mm.data.sample import Rejection
from lightning_mm.data.table import StoredTable, cache_folder, store_table


@dataclass(frozen=True)
class SplitOptions:
    """How files are read.

    Args:
        image_root: Folder that image paths are relative to and may not leave; None: that of each file.
        follow_links: Whether links may lead out of it.
        fetch: Whether images are downloaded.
        cache: Folder of the tables; None: as ``cache_folder``.
        max_megapixels: Largest picture that is decoded.
    """

    image_root: str | Path | None = None
    follow_links: bool = False
    fetch: bool = False
    cache: str | Path | None = None
    max_megapixels: float = 40.0


@dataclass(frozen=True)
class Split:
    """The usable rows of a split, and where they are from.

    Args:
        samples: Rows in use.
        sources: As given, in their order.
        tables: The table of each source.
    """

    samples: RowTable
    sources: tuple[Source, ...]
    tables: tuple[StoredTable, ...]


def open_split(name: str, given: Any, options: SplitOptions, rejected: RejectedSamples) -> Split:
    """Read a split; every rank reads the same.

    Args:
        name: train, val, test or predict.
        given: Path, paths or sources, as the data module takes them.
        options: How files are read.
        rejected: Takes what is not used, and the number of rows read.

    Raises:
        UserError: A source cannot be read, none of its rows can be used, or too many rows cannot.
    """
    sources, tables = _read(name, given, options)
    _check_all_pictures(tables, options.max_megapixels)
    unused: list[Rejection] = []
    rows = []
    for source, table in zip(sources, tables, strict=True):
        used, faults = _usable_rows(table, options.max_megapixels)
        rows += used
        dropped = [replace(each, split=name, source=source.path) for each in (*table.rejections, *faults)]
        _check_any(source, table, sum(map(len, used)), dropped)
        _log_source(name, source, table, sum(map(len, used)), dropped)
        unused += dropped
    rejected.num_rows[name] += sum(table.num_read for table in tables)
    rejected.add(unused)
    rejected.check(cache_folder(options.cache) / f"rejected-{name}.jsonl")
    parts = _parts(tables)
    starts = np.cumsum([0, *(part.num_rows for part in parts)])
    in_use = np.concatenate([np.zeros(0, np.int64), *(start + each for start, each in zip(starts, rows, strict=False))])
    return Split(RowTable(parts, in_use), sources, tables)


def rows_unchecked(name: str, given: Any, options: SplitOptions) -> RowTable:
    """The rows of a split whose pictures nobody looks at; arguments and errors as of ``open_split``."""
    return RowTable(_parts(_read(name, given, options)[1]))


def _read(name: str, given: Any, options: SplitOptions) -> tuple[tuple[Source, ...], tuple[StoredTable, ...]]:
    cache = cache_folder(options.cache)
    reading = ReadOptions(
        answers_required=name != "predict",
        follow_links=options.follow_links,
        fetch=options.fetch,
        cache=cache / "fetched",
        split={"val": "validation"}.get(name, name),
        must_exist=False,
    )
    sources = parse_sources(given, options.image_root)
    opened = [open_source(source, reading) for source in sources]
    return sources, tuple(store_table(source, cache, _num_processes()) for source in opened)


def _parts(tables: Sequence[StoredTable]) -> list[TablePart]:
    return [TablePart(part.file, table.name, part.num_rows, part.digest) for table in tables for part in table.parts]


def _num_processes() -> int:
    return len(os.sched_getaffinity(0))


def _check_all_pictures(tables: Sequence[StoredTable], max_megapixels: float) -> None:
    """Check pictures on rank 0, and on other ranks where they do not see its files."""
    files = [part.file for table in tables for part in table.parts]

    def check() -> None:
        with FileLock(tables[0].folder / "lock"):
            check_pictures(files, _num_processes(), max_megapixels)

    is_first = rank_and_world_size()[0] == 0
    _, failure = run_on_all_ranks(lambda: check() if is_first else None)
    if failure:
        raise failure if isinstance(failure, UserError) else RuntimeError(failure)
    if not all(map(is_checked, files)):
        check()


def _usable_rows(table: StoredTable, max_megapixels: float) -> tuple[list[np.ndarray[Any, Any]], list[Rejection]]:
    """Rows of each part whose pictures can be used, and why the others cannot."""
    rows, rejections = [], []
    for part in table.parts:
        faults = checked_part(part.file).row_faults(max_megapixels)
        origins = open_arrow(part.file)["origin"]
        rejections += [Rejection(origins[row].as_py(), fault) for row, fault in sorted(faults.items())]
        rows.append(np.delete(np.arange(part.num_rows, dtype=np.int64), sorted(faults)))
    return rows, rejections


def _check_any(source: Source, table: StoredTable, num_used: int, rejections: Sequence[Rejection]) -> None:
    if num_used:
        return
    if not table.num_read:
        raise UserError(f"{source.path} is empty.", "It holds no row.", "Name a file with at least one conversation.")
    first = "\n    ".join(f"{each.origin}: {each.reason}" for each in rejections[:5])
    raise UserError(
        f"None of the {table.num_read} rows of {source.path} can be used.",
        f"The first of them:\n    {first}",
        'Rows look like {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, '
        '{"from": "gpt", "value": "A cat."}]}.',
    )


def _log_source(split: str, source: Source, table: StoredTable, used: int, rejections: Sequence[Rejection]) -> None:
    reasons = Counter(each.reason.partition(":")[0] for each in rejections if each.kind == "dropped").most_common()
    unread = ", ".join(sorted(table.ignored))
    why = [table.shape, *(f"{count} x {reason}" for reason, count in reasons)]
    why += [f"columns not read: {unread}"] if unread else []
    log_decision(f"data.{split} {table.name}", f"{used} of {table.num_read} rows", "; ".join(why))
