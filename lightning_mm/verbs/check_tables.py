"""The tables of a check: rows, reasons, columns, lengths, duplicates, and samples as they are trained.

Data flow: ``CheckResult`` -> tables, sentences and texts for the console. Whatever is from the data is no markup.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lightning_mm.data.row_meter import KINDS
from lightning_mm.data.shown_text import LEARNED, described, shown_text
from lightning_mm.report.figures.figure import printable

if TYPE_CHECKING:
    from lightning_mm.verbs.check_result import CheckResult, Lengths

_LONGEST_REASON = 160


def check_tables(found: "CheckResult") -> list[Table | Text | str]:
    """All of it, in order."""
    shown: list[Table | Text | str] = [_rows(found)]
    if any(source.reasons for source in found.sources):
        shown.append(_reasons(found))
    shown += _columns(found)
    if found.lengths:
        shown.append(_lengths(found))
    shown += map(Text, duplicate_words(found))
    shown += _samples(found)
    return shown


def _rows(found: "CheckResult") -> Table:
    table = Table(title="Rows")
    for name in ("split", "source"):
        table.add_column(name, overflow="fold")
    for name in ("read", "used", "dropped", "cut"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("shape", overflow="fold")
    for source in found.sources:
        counts = [f"{count:,}" for count in (source.read, source.used, source.dropped, source.cut)]
        table.add_row(source.split, _cell(source.name), *counts, _cell(source.shape))
    if not found.lengths and any(source.used for source in found.sources):  # with a model, what is used has lengths
        table.caption = "read only: what the model's template and length drop is known with a model"
    return table


def _reasons(found: "CheckResult") -> Table:
    table = Table(title="Why rows are dropped", show_lines=False)
    for name in ("split", "source", "reason"):
        table.add_column(name, overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("the first of them", overflow="fold")
    for source in found.sources:
        for reason, count in source.reasons.items():
            first = source.examples[reason]
            shortened = first if len(first) <= _LONGEST_REASON else f"{first[:_LONGEST_REASON]}..."
            table.add_row(source.split, _cell(source.name), _cell(reason), f"{count:,}", _cell(shortened))
    return table


def _columns(found: "CheckResult") -> Iterator[Text]:
    for source in found.sources:
        if source.ignored:
            columns = ", ".join(f"{name} ({count:,})" for name, count in sorted(source.ignored.items()))
            yield _cell(f"Columns not read of {source.name} ({source.split}), with the number of rows: {columns}")


def _lengths(found: "CheckResult") -> Table:
    table = Table(title="Lengths in tokens")
    for name in ("split", "tokens"):
        table.add_column(name)
    for name in ("min", "median", "p95", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for split, lengths in found.lengths.items():
        for kind in KINDS:
            values = lengths.tokens[kind]
            table.add_row(split, kind, *(f"{values[name]:,.0f}" for name in ("min", "median", "p95", "max")))
    table.caption = "; ".join(limit_words(split, lengths, found.max_length) for split, lengths in found.lengths.items())
    if not found.is_exact:
        table.caption += "; sizes of pictures within 5 % are measured as one"
    return table


def limit_words(split: str, lengths: "Lengths", max_length: int | None) -> str:
    """The share of rows over ``max_length``, in words."""
    if max_length is None:
        return f"{split}: data.max_length sets no limit"
    over = f"{lengths.cut + lengths.dropped:.1%} over data.max_length {max_length:,}"
    return f"{split}: {over} ({lengths.cut:.1%} cut, {lengths.dropped:.1%} dropped)"


def duplicate_words(found: "CheckResult") -> list[str]:
    """What is in the data twice, in words."""
    words = [
        f"Repeated in {split}: {count:,} rows have the text and the pictures of an earlier one."
        for split, count in found.repeated.items()
        if count
    ]
    for split, overlap in found.overlaps.items():
        examples = "".join(f"; {printable(mine)} is {printable(other)}" for mine, other in overlap.examples)
        words.append(
            f"In {split} and train: {overlap.rows:,} of {overlap.num_rows:,} rows of {split} are rows of train too, "
            f"{overlap.pictures:,} have a picture of train{examples}."
        )
    return words or ["No row is there twice."]


def _samples(found: "CheckResult") -> Iterator[Text | str]:
    if found.samples:
        yield f"Samples, as the model reads them; it learns what stands between {' '.join(LEARNED)}"
    for sample in found.samples:
        yield Text(f"\n{sample.split} {printable(sample.source)}, {described(sample.row)}", "bold")
        yield shown_text(sample.row)


def _cell(text: str) -> Text:
    """Text of the data as it is: no markup, and on one line."""
    return Text(printable(text.replace("\n", " ")))
