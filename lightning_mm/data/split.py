"""One split of the data (train, val, test or predict): its sources read, its pictures checked, its usable rows.

Data flow: paths as given -> ``readers`` -> ``table`` (one per source) -> ``picture_check`` -> ``RowTable`` of the rows
in use; what is not used goes to ``RejectedSamples``.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import all_gather_object, rank_and_world_size, run_on_all_ranks
from lightning_mm.core.errors import UserError
from lightning_mm.core.processes import num_processes
from lightning_mm.data.image_source import open_arrow
from lightning_mm.data.mixture import check_limit, check_weights, sampled_part
from lightning_mm.data.order_seed import permutation
from lightning_mm.data.picture_check import COLUMNS, check_pictures, check_state, checked_part
from lightning_mm.data.readers.opened import check_any
from lightning_mm.data.readers.questions import OTHER_TEXTS
from lightning_mm.data.readers.source import OpenSource, ReadOptions, Source, open_source, parse_sources
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.row_table import RowTable, TablePart
from lightning_mm.data.sample import Rejection
from lightning_mm.data.table import StoredTable, cache_folder, store_table

PartRows = NDArray[np.int64]


@dataclass(frozen=True)
class SplitOptions:
    """How files are read.

    Args:
        image_root: Folder that image paths are relative to and may not leave; None: that of each file.
        follow_links: Whether links may lead out of it.
        fetch: Whether images are downloaded.
        cache: Folder of the tables; None: as ``cache_folder``.
        max_megapixels: Largest picture that is decoded.
        seed: Draws the rows of a source with a limit.
    """

    image_root: str | Path | None = None
    follow_links: bool = False
    fetch: bool = False
    cache: str | Path | None = None
    max_megapixels: float = 40.0
    seed: int = 0


@dataclass(frozen=True)
class Split:
    """The usable rows of a split, and where they are from.

    Args:
        samples: Rows in use.
        sources: As given, in their order.
        tables: The table of each source.
        num_usable: Rows of each that can be used, before its limit.
    """

    samples: RowTable
    sources: tuple[Source, ...]
    tables: tuple[StoredTable, ...]
    num_usable: tuple[int, ...] = ()

    @property
    def num_used(self) -> list[int]:
        """Rows in use of each source."""
        found: list[int] = np.bincount(self.samples.source_of_rows(), minlength=len(self.sources)).tolist()
        return found


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
    opened = on_all_ranks(lambda: open_sources(name, given, options))
    split = read_split(name, opened, options, rejected)
    refuse_losses(name, split, rejected, options)
    return split


def read_split(name: str, opened: Sequence[OpenSource], options: SplitOptions, rejected: RejectedSamples) -> Split:
    """Read a split however many of its rows can be used.

    Args:
        name: As of ``open_split``, like ``options`` and ``rejected``.
        opened: Of ``open_sources``.
        options: How files are read.
        rejected: Takes what is not used, and the number of rows read.

    Raises:
        UserError: A source cannot be read.
    """
    sources, tables = on_all_ranks(lambda: _read(opened, options))
    _check_all_pictures(tables, options.max_megapixels)
    rows, num_usable = [], list[int]()
    for source, table in zip(sources, tables, strict=True):
        usable, faults = _usable_rows(table, options.max_megapixels)
        used = _limited(usable, source, options.seed)
        rows += used
        num_usable.append(sum(map(len, usable)))
        dropped = [replace(each, split=name, source=source.path) for each in (*table.rejections, *faults)]
        _log_source(name, source, table, sum(map(len, used)), dropped)
        rejected.add(dropped)
    rejected.num_rows[name] = sum(table.num_read for table in tables)
    samples = RowTable(_parts(tables), _over_all_parts(tables, rows))
    _refuse_others(name, samples)
    return Split(samples, sources, tables, tuple(num_usable))


def _refuse_others(name: str, samples: RowTable) -> None:
    """Stop where ranks hold other rows than the first, of which each would train its share of another order."""
    found = all_gather_object((len(samples), samples.fingerprint))
    if others := [rank for rank, rows in enumerate(found) if rows != found[0]]:
        raise UserError(
            f"Rank {others[0]} reads other rows of data.{name} than rank 0.",
            f"It has {found[others[0]][0]} rows in use, rank 0 has {found[0][0]}.",
            "Give all machines the same files of rows and pictures.",
        )


def refuse_losses(name: str, split: Split, rejected: RejectedSamples, options: SplitOptions) -> None:
    """Stop where no row of a source, or too few rows of the split, can be used; arguments as of ``open_split``."""
    for source, table, num_used in zip(split.sources, split.tables, split.num_used, strict=True):
        its_own = [each for each in rejected if (each.split, each.source) == (name, source.path)]
        check_any(source.path, num_used > 0, its_own, table.num_read)
    rejected.check(cache_folder(options.cache) / f"rejected-{name}.jsonl")


def rows_unchecked(opened: Sequence[OpenSource], options: SplitOptions) -> RowTable:
    """The rows of a split whose pictures nobody looks at; arguments and errors as of ``read_split``."""
    sources, tables = _read(opened, options)
    everything = [[np.arange(part.num_rows, dtype=np.int64) for part in table.parts] for table in tables]
    limited = [_limited(rows, source, options.seed) for rows, source in zip(everything, sources, strict=True)]
    return RowTable(_parts(tables), _over_all_parts(tables, [part for rows in limited for part in rows]))


def _over_all_parts(tables: Sequence[StoredTable], rows: Sequence[PartRows]) -> PartRows:
    """Rows of each part, counted over all parts."""
    starts = np.cumsum([0, *(part.num_rows for part in _parts(tables))])
    return np.concatenate([np.zeros(0, np.int64), *(start + each for start, each in zip(starts, rows, strict=False))])


def _limited(rows: list[PartRows], source: Source, seed: int) -> list[PartRows]:
    """Rows of each part that are in use, the same in every epoch: sampled, the first, and some drawn with the seed."""
    total = sum(map(len, rows))
    kind, number = sampled_part(source, total)
    used = np.arange(total)[:number] if kind == "first" else np.arange(total)[total - number :]
    if kind == "random":
        used = np.sort(permutation(total, seed, "sampling", source.name)[:number].numpy())
    used = used[: source.first]
    if source.limit is not None and source.limit < len(used):
        used = used[permutation(len(used), seed, "limit", source.name)[: source.limit].numpy()]
    kept = np.zeros(total, dtype=bool)
    kept[used] = True
    return [each[mask] for each, mask in zip(rows, np.split(kept, np.cumsum([*map(len, rows)])[:-1]), strict=True)]


def _read(opened: Sequence[OpenSource], options: SplitOptions) -> tuple[tuple[Source, ...], tuple[StoredTable, ...]]:
    tables = tuple(store_table(each, cache_folder(options.cache), num_processes()) for each in opened)
    return tuple(each.source for each in opened), tables


def open_sources(name: str, given: Any, options: SplitOptions, *, must_exist: bool = False) -> list[OpenSource]:
    """The sources of a split, their options checked and their first rows looked at.

    Args:
        name: As of ``open_split``, like the next two.
        given: Paths or sources.
        options: How files are read.
        must_exist: Whether a row is rejected for a picture that is missing; if not, pictures are checked later.

    Raises:
        UserError: A source cannot be read, or has an option that is none.
    """
    reading = ReadOptions(
        answers_required=name != "predict",
        follow_links=options.follow_links,
        fetch=options.fetch,
        cache=cache_folder(options.cache) / "fetched",
        split={"val": "validation"}.get(name, name),
        must_exist=must_exist,
    )
    sources = parse_sources(given, options.image_root)
    for source in sources:
        check_limit(source)
    if name == "train":
        check_weights(sources)
    else:
        _log_unmixed(name, sources)
    return [open_source(source, reading) for source in sources]


def _log_unmixed(split: str, sources: Sequence[Source]) -> None:
    """Say where a source outside of training has a weight or repeats."""
    if given := [source.name for source in sources if source.weight != 1 or source.repeats != 1]:
        why = "only training is mixed: each row is evaluated once"
        log_decision(f"data.{split}", f"weight and repeats of {', '.join(given)} are not used", why)


def _parts(tables: Sequence[StoredTable]) -> list[TablePart]:
    return [TablePart(part.file, table.name, part.num_rows, part.digest) for table in tables for part in table.parts]


def _check_all_pictures(tables: Sequence[StoredTable], max_megapixels: float) -> None:
    """Check pictures on rank 0, and on other ranks where they do not see its files."""
    files = [part.file for table in tables for part in table.parts]

    def check() -> None:
        with FileLock(tables[0].folder / "lock"):
            check_pictures(files, num_processes(), max_megapixels)

    rank = rank_and_world_size()[0]
    on_all_ranks(lambda: check() if rank == 0 else None)
    states = all_gather_object([check_state(file) for file in files])
    on_all_ranks(lambda: check() if states[rank] != states[0] else None)


_Made = TypeVar("_Made")


def on_all_ranks(attempt: Callable[[], _Made]) -> _Made:
    """What a call without collectives returns; a failure of one rank is raised on all."""
    if rank_and_world_size()[1] == 1:
        return attempt()
    made, failure = run_on_all_ranks(attempt)
    if failure:
        raise failure if isinstance(failure, UserError) else RuntimeError(failure)
    return cast(_Made, made)


def _usable_rows(table: StoredTable, max_megapixels: float) -> tuple[list[PartRows], list[Rejection]]:
    """Rows of each part whose pictures and videos can be used, and why the others cannot."""
    rows, rejections = [], []
    for part in table.parts:
        faults: dict[int, str] = {}
        for column in COLUMNS:
            faults = {**checked_part(part.file, column).row_faults(max_megapixels), **faults}
        origins = open_arrow(part.file)["origin"]
        rejections += [Rejection(origins[row].as_py(), fault) for row, fault in sorted(faults.items())]
        rows.append(np.delete(np.arange(part.num_rows, dtype=np.int64), sorted(faults)))
    return rows, rejections


def _log_source(split: str, source: Source, table: StoredTable, used: int, rejections: Sequence[Rejection]) -> None:
    reasons = Counter(each.reason.partition(":")[0] for each in rejections if each.kind == "dropped").most_common()
    others = [f"{count} {name}" for name, count in table.ignored.items() if name.startswith(OTHER_TEXTS)]
    unread = ", ".join(sorted(name for name in table.ignored if not name.startswith(OTHER_TEXTS)))
    why = [table.shape, *(f"{count} x {reason}" for reason, count in reasons)]
    why += [f"limit {source.limit}, drawn with data.seed"] if source.limit == used else []
    why += [f"sampling {source.sampling}"] if source.sampling is not None else []
    why += [f"the first {source.first}"] if source.first is not None else []
    why += [f"columns not read: {unread}"] if unread else []
    why += [f"left out, since one is learned: {', '.join(others)}"] if others else []
    log_decision(f"data.{split} {table.name}", f"{used} of {table.num_read} rows", "; ".join(why))
