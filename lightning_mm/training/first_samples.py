"""One row of each source as it is trained, shown when a fit starts: a template or mark that is wrong is seen at once.

Data flow: data module -> the first row of each source that the collator takes -> texts for the console.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from rich.text import Text

from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.row_table import RowTable
from lightning_mm.data.sample import Sample
from lightning_mm.data.shown_text import LEARNED, described, shown_text
from lightning_mm.report.figures.figure import printable

_MOST_SOURCES, _MOST_LINES, _TRIALS = 8, 12, 8


def first_samples(data: MMDataModule) -> Iterator[Text]:
    """A heading and the rendered text of one row of each source of train; nothing with more than 8 sources.

    Args:
        data: The data module of a fit, read; one without training rows gives nothing.
    """
    if data.paths["train"] is None:
        return
    names = data.rows.source_names("train")
    if len(names) > _MOST_SOURCES:
        return
    with torch.device("cpu"):
        meter = data.row_meter(data.processing)
        for name in names:
            tried = map(meter.show, islice(_rows_of(data, name), _TRIALS))
            if (row := next((each for each in tried if each is not None), None)) is not None:
                words = f"A row of {printable(name)}, learned between {' '.join(LEARNED)}: {described(row)}"
                yield Text(words, "bold")
                yield shown_text(row, max_lines=_MOST_LINES)


def _rows_of(data: MMDataModule, name: str) -> Iterator[Sample]:
    """Training rows of a source, from the first on; of a stream, those that stand for all."""
    samples = data.samples("train")
    if not isinstance(samples, RowTable):
        yield from (sample for sample in samples if sample.source == name)
        return
    for row in np.flatnonzero(samples.source_of_rows() == samples.sources.index(name)):
        yield samples[int(row)]
