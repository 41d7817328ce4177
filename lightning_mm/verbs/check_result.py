"""What a check has found of the data of a run, for people, for programs and as a page.

Data flow: ``verbs.check`` -> ``CheckResult`` -> ``check_tables`` (terminal), ``to_dict`` (JSON), ``report.check_page``.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_mm.core.decisions import Decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.duplicates import Overlap
from lightning_mm.data.row_meter import KINDS, Part, ShownRow
from lightning_mm.report.check_page import write_check_page
from lightning_mm.verbs.check_tables import check_tables
from lightning_mm.verbs.result import PrintedResult
from lightning_mm.verbs.rows import PathLike


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows of a source or split.

    Args:
        tokens: Kind (text, image, supervised, total) -> min, median, p95 and max. Text is all that is no image, the
            supervised tokens included.
        measured: Number of rows that were tokenized.
        cut: Fraction of them that loses its end to ``max_length``.
        dropped: Fraction of them that is dropped, since it is longer than ``max_length``.
    """

    tokens: dict[str, dict[str, float]]
    measured: int
    cut: float
    dropped: float


@dataclass(frozen=True)
class CheckedSource:
    """What was found of one source in one split.

    Args:
        split: train, val or test.
        name: Name of the source.
        path: Its path as given.
        shape: What its rows look like.
        read: Rows read.
        used: Rows that a fit trains, or evaluates.
        cut: Rows of these that are used in part.
        reasons: Category of a reason -> rows that are dropped for it.
        examples: Category -> ``origin: reason`` of the first such row.
        ignored: Column that is not read -> number of rows with it.
        lengths: In tokens; None: there is no model, or no row.
    """

    split: str
    name: str
    path: str
    shape: str
    read: int
    used: int
    cut: int
    reasons: dict[str, int]
    examples: dict[str, str]
    ignored: dict[str, int]
    lengths: Lengths | None

    @property
    def dropped(self) -> int:
        """Rows that are not used."""
        return self.read - self.used


@dataclass(frozen=True)
class CheckedSample:
    """One row as it is trained.

    Args:
        split: train, val or test.
        source: Name of its source.
        row: The row, rendered and tokenized.
    """

    split: str
    source: str
    row: ShownRow

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its text, cut into context, learned, and cut off."""
        return self.row.parts

    def to_dict(self) -> dict[str, Any]:
        """The sample for programs: ``prompt`` is all its text that is not supervised."""
        return {
            "id": self.row.sample.id,
            "split": self.split,
            "source": self.source,
            "origin": self.row.sample.origin,
            "prompt": "".join(text for kind, text in self.parts if kind == "context"),
            "supervised": [text for kind, text in self.parts if kind == "learned"],
            "cut": "".join(text for kind, text in self.parts if kind == "cut"),
            "images": [list(image.size) for image in self.row.images],
            "tokens": dict(zip(KINDS, self.row.tokens, strict=True)),
        }


@dataclass(frozen=True, eq=False, repr=False)
class CheckResult(PrintedResult):
    """What was found of the data; ``print`` shows its tables and samples.

    Args:
        sources: Each source of each split.
        lengths: Split -> lengths of its rows in tokens; empty without a model.
        repeated: Split -> number of rows that an earlier row of the split is equal to.
        overlaps: Held-out split -> what it shares with train.
        samples: Some rows of each source.
        max_length: Longest row in tokens; None: no limit, or no model.
        is_exact: Whether the tokens of each picture were measured at its own size, not at one within about 5 %.
        decisions: Automatic choices, with reasons.
        error: Why a fit on this data stops; None: it does not.
    """

    sources: tuple[CheckedSource, ...]
    lengths: dict[str, Lengths]
    repeated: dict[str, int]
    overlaps: dict[str, Overlap]
    samples: tuple[CheckedSample, ...]
    max_length: int | None
    is_exact: bool
    decisions: tuple[Decision, ...]
    error: UserError | None

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows read, used and dropped, over all splits."""
        return _totals(self.sources)

    def to_dict(self) -> dict[str, Any]:
        """Everything as ``lightning-mm check --json`` writes it; ``lengths`` is of the first split."""
        splits = {}
        for split in dict.fromkeys(source.split for source in self.sources):
            sources = [source for source in self.sources if source.split == split]
            lengths = self.lengths.get(split)
            splits[split] = {
                "rows": _totals(sources),
                "reasons": _sum(source.reasons for source in sources),
                "lengths": _lengths_dict(lengths),
            }
        return {
            "sources": [
                {**asdict(source), "dropped": source.dropped, "lengths": _lengths_dict(source.lengths)}
                for source in self.sources
            ],
            "rows": self.rows,
            "reasons": _sum(source.reasons for source in self.sources),
            "ignored_columns": sorted({column for source in self.sources for column in source.ignored}),
            "lengths": _lengths_dict(next(iter(self.lengths.values()), None)),
            "lengths_are_exact": self.is_exact,
            "max_length": self.max_length,
            "splits": splits,
            "duplicates": {
                "within": self.repeated,
                "with_train": {split: asdict(overlap) for split, overlap in self.overlaps.items()},
            },
            "samples": [sample.to_dict() for sample in self.samples],
            "error": None if self.error is None else str(self.error),
        }

    def tables(self) -> list[Table | Text | str]:
        """Rows, reasons, columns, lengths, duplicates and samples."""
        return check_tables(self)

    def write_html(self, path: PathLike) -> Path:
        """Write everything as one page that opens anywhere; returns its path.

        Args:
            path: The file to write.

        Raises:
            UserError: It cannot be written.
        """
        pictures = [list(sample.row.images) for sample in self.samples]
        return write_check_page(Path(path), self.to_dict(), [list(sample.parts) for sample in self.samples], pictures)


def _totals(sources: Iterable[CheckedSource]) -> dict[str, int]:
    counted = [(source.read, source.used, source.dropped) for source in sources]
    return {name: sum(each[i] for each in counted) for i, name in enumerate(("read", "used", "dropped"))}


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total.most_common())


def _lengths_dict(lengths: Lengths | None) -> dict[str, Any]:
    if lengths is None:
        return {}
    over = {"cut": lengths.cut, "dropped": lengths.dropped}
    return {**lengths.tokens, "measured": lengths.measured, "over_max_length": over}
