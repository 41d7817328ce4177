"""What the collator makes of each row, before a run: its tokens by kind, or why it is dropped.

Each row goes through the collator that trains it, with its pictures known by their sizes only (``size_processor``).

Data flow: ``RowTable`` -> ``measure_rows`` (in worker processes) -> ``MeasuredRows``; a Sample, decoded, ->
``RowMeter.show`` -> ``ShownRow``.

Shapes: N rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_mm.core.processes import run_in_processes
from lightning_mm.data import chat
from lightning_mm.data.collator import Collator
from lightning_mm.data.picture_check import Size, checked_part
from lightning_mm.data.row_table import RowTable
from lightning_mm.data.sample import Rejection, Sample
from lightning_mm.data.sample_encoder import RenderedSample
from lightning_mm.data.size_processor import SizeProcessor
from lightning_mm.models.encoding import Encoding
from lightning_mm.models.processor import ModelProcessor

_ROWS_OF_A_JOB = 128
_PROOFS = 2
KINDS = ("text", "image", "supervised", "total")
"""Tokens of a row: text is all that is no image, the supervised ones included."""


@dataclass(frozen=True)
class MeasuredRows:
    """Rows as the collator takes them.

    Args:
        tokens: (N, 4) tokens by ``KINDS``, before a row is cut; -1 where the row was dropped before it was tokenized.
        used: (N,) whether the row is trained.
        cut: (N,) whether it is trained without its end, which is beyond ``max_length``.
        too_long: (N,) whether it is dropped, since what it needs is beyond ``max_length``.
        rejections: Why rows are dropped or cut.
        is_exact: Whether each size of a picture was measured itself, not as another one within about 5 %.
    """

    tokens: NDArray[np.int64]
    used: NDArray[np.bool_]
    cut: NDArray[np.bool_]
    too_long: NDArray[np.bool_]
    rejections: tuple[Rejection, ...]
    is_exact: bool


Part = tuple[Literal["context", "learned", "cut"], str]


@dataclass(frozen=True)
class ShownRow:
    """A row as it is trained.

    Args:
        sample: The conversation.
        parts: Its text by the chat template, with one placeholder per picture, cut into what is context, what is
            learned, and what ``max_length`` cuts off.
        tokens: Tokens by ``KINDS``, before the row is cut.
        images: Its decoded pictures.
    """

    sample: Sample
    parts: tuple[Part, ...]
    tokens: tuple[int, ...]
    images: tuple[Image.Image, ...]


class RowMeter(Collator):
    """A collator that keeps the last row that it tokenized, and its lengths."""

    tokens: tuple[int, ...] = ()
    _last: tuple[RenderedSample, Encoding, int]

    @property
    def max_length(self) -> int | None:
        """Longest row in tokens; None: no limit."""
        return self.encoder.max_length

    def measure(self, sample: Sample, rejected: list[Rejection]) -> bool:
        """Whether a row is trained, with its pictures known by their sizes only.

        Args:
            sample: The row.
            rejected: Why it is dropped or cut is added to it.
        """
        self.tokens = ()
        return self.collate_valid([sample], rejected, blank_images=True) is not None

    def prove(self, sample: Sample, by_size: SizeProcessor) -> None:
        """Compare what a processor by sizes makes of a row with what the model's processor makes of it.

        Args:
            sample: The row.
            by_size: This collator's processor.
        """
        if row := self._row(sample, [], True):
            by_size.prove(row.rendered.text, [image.size for image in row.images])

    def show(self, sample: Sample) -> ShownRow | None:
        """A row with its decoded pictures; None where it is dropped."""
        if self.collate_valid([sample], []) is None:
            return None
        row, encoding, b = self._last
        return ShownRow(sample, self._parts(row, encoding, b), self.tokens, tuple(row.images))

    def _answers(self, row: RenderedSample, encoding: Encoding, b: int) -> list[int]:
        answer = super()._answers(row, encoding, b)
        num_images = int(self._is_image(encoding.inputs["input_ids"][b]).sum())
        total = int(encoding.inputs["attention_mask"][b].sum())
        self.tokens = (total - num_images, num_images, len(answer), total)
        self._last = row, encoding, b
        return answer

    def _parts(self, row: RenderedSample, encoding: Encoding, b: int) -> tuple[Part, ...]:
        """The rendered text, cut where tokens begin or cease to be learned."""
        text, offsets = row.rendered.text, encoding.offsets[b]
        spans = chat.locate_answer_spans(row.rendered, self.encoder.chat.placeholder, encoding.texts[b])
        end = len(text)
        limit = self.encoder.max_length
        if limit is not None and int(encoding.inputs["attention_mask"][b].sum()) > limit:
            # No image token is cut off, so that the text behind the last one is as it was rendered.
            end = max(0, int(offsets[limit, 0]) - len(encoding.texts[b]) + len(text))
        parts: list[Part] = []
        done = 0
        for (first, _), span in zip(row.rendered.spans, spans, strict=True):
            tokens = chat.tokens_of_span(span, offsets)
            if not tokens:
                continue
            start = max(done, int(offsets[tokens[0], 0]) - span[0] + first)
            stop = int(offsets[tokens[-1], 1]) - span[0] + first
            parts += [("context", text[done : min(start, end)]), ("learned", text[start : min(stop, end)])]
            done = min(stop, end)
        parts += [("context", text[done:end]), ("cut", text[end:])]
        return tuple(part for part in parts if part[1])


def measure_rows(
    samples: RowTable, processing: ModelProcessor, meter: Callable[[ModelProcessor], RowMeter], num_workers: int
) -> MeasuredRows:
    """Measure all rows of a table.

    Args:
        samples: N rows.
        processing: The model's processor.
        meter: Makes the collator of a processor.
        num_workers: Processes that measure; 0 and 1 measure in this one.
    """
    sizes = _picture_sizes(samples)
    by_size = SizeProcessor(processing, set().union(*sizes.values()))
    by_size.measure(sizes, num_workers)
    made = meter(by_size)
    for index in _rows_to_prove(samples):
        made.prove(samples[index], by_size)

    def measure(start: int) -> tuple[list[tuple[int, ...]], list[bool], list[Rejection]]:
        rejected: list[Rejection] = []
        tokens, used = [], []
        for sample in samples[start : start + _ROWS_OF_A_JOB]:
            own: list[Rejection] = []
            used.append(made.measure(sample, own))
            tokens.append(made.tokens or (-1,) * len(KINDS))
            rejected += [replace(each, source=sample.source) for each in own]
        return tokens, used, rejected

    starts = [(start,) for start in range(0, len(samples), _ROWS_OF_A_JOB)]
    parts = run_in_processes(measure, starts, num_workers, "tokenizing rows")
    tokens = np.array([row for part in parts for row in part[0]], np.int64).reshape(-1, len(KINDS))
    used = np.array([each for part in parts for each in part[1]], bool)
    limit = made.max_length
    is_long = np.zeros(len(used), bool) if limit is None else tokens[:, -1] > limit
    rejections = tuple(each for part in parts for each in part[2])
    return MeasuredRows(tokens, used, is_long & used, is_long & ~used, rejections, by_size.is_exact)


def _picture_sizes(samples: RowTable) -> dict[bool, set[Size]]:
    """Sizes of all pictures of rows with one picture (False), and of rows with several (True)."""
    found: dict[bool, set[Size]] = {False: set(), True: set()}
    for part, rows in samples.rows_by_part():
        checked = checked_part(part.file)
        counts = np.diff(checked.starts)
        for has_others, in_rows in ((False, counts == 1), (True, counts > 1)):
            chosen = np.zeros(len(counts), bool)
            chosen[rows] = in_rows[rows]
            sizes = np.unique(checked.sizes[np.repeat(chosen, counts)], axis=0)
            found[has_others] |= {(int(width), int(height)) for width, height in sizes}
    return found


def _rows_to_prove(samples: RowTable) -> list[int]:
    """Some rows without a picture, with one, and with several."""
    counts = np.minimum(samples.num_images(), 2)
    return [int(index) for count in range(3) for index in np.flatnonzero(counts == count)[:_PROOFS]]
