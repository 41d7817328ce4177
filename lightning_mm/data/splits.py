"""The rows of train, val, test and predict, each read when it is asked for.

Data flow: what each option names -> ``split.open_sources`` -> ``split.read_split`` -> ``RowTable`` and ``Mixture``, or
``streaming`` -> ``SampleStream`` -> ``datamodule``.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.mixture import Mixture
from lightning_mm.data.readers.source import OpenSource
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.row_table import RowTable
from lightning_mm.data.sample import Sample, most_frequent_answers
from lightning_mm.data.split import (
    Split,
    SplitOptions,
    on_all_ranks,
    open_sources,
    read_split,
    refuse_losses,
    rows_unchecked,
)
from lightning_mm.data.streaming import SampleStream


class Splits:
    """Rows by split.

    Args:
        paths: Split -> what is given for it; None for nothing.
        reading: How files are read; its seed also orders a stream.
        rejected: Takes what is not used.
        temperature: Of the mixture of training sources; None for 1.
        shuffle_buffer: Training rows are streamed, this number of them in memory; None: they are kept in a table.
    """

    def __init__(
        self,
        paths: Mapping[str, Any],
        reading: SplitOptions,
        rejected: RejectedSamples,
        temperature: float | None,
        shuffle_buffer: int | None,
    ) -> None:
        self.paths, self.reading, self.rejected = paths, reading, rejected
        self.temperature, self.shuffle_buffer = temperature, shuffle_buffer
        self._opened: dict[str, list[OpenSource]] = {}
        self._splits: dict[str, Split] = {}
        self._refuses_losses = True
        self._mixture: Mixture | None = None
        self._stream: SampleStream | None = None

    def reporting_to(self, rejected: RejectedSamples) -> "Splits":
        """A copy with what is read so far, which gives what it does not use from now on to another place."""
        made = copy.copy(self)
        made.rejected, made._splits, made._opened = rejected, dict(self._splits), dict(self._opened)
        return made

    def open(self, splits: Iterable[str]) -> None:
        """Look at the first rows of every source, so that a wrong path shows before the first split is read whole.

        A collective call of all ranks.

        Args:
            splits: Names of splits; those without a file are passed over.

        Raises:
            UserError: A source cannot be read, or has an option that is none.
        """
        for split in splits:
            if self.paths[split] is not None:
                on_all_ranks(partial(self._sources, split))

    def _sources(self, split: str) -> list[OpenSource]:
        if split not in self._opened:
            given, is_streamed = self.paths[split], self.is_streamed(split)
            self._opened[split] = open_sources(split, given, self.reading, must_exist=is_streamed)
        return self._opened[split]

    def samples(self, split: str) -> Sequence[Sample]:
        """The usable conversations of train, val, test or predict, in file order; empty without a file.

        Of a stream, the first rows of each source.
        """
        if self.paths[split] is None:
            return ()
        return self.stream.first if self.is_streamed(split) else self.split(split).samples

    def is_streamed(self, split: str) -> bool:
        """Whether no table of a split is kept."""
        return self.shuffle_buffer is not None and split == "train"

    @property
    def stream(self) -> SampleStream:
        """The training rows, where they are streamed."""
        if self._stream is None:
            self._stream = SampleStream(
                self._sources("train"), self.reading.seed, self.shuffle_buffer or 0, self.rejected
            )
        return self._stream

    @property
    def num_train_rows(self) -> int | None:
        """Number of different training rows; None where they are streamed."""
        return None if self.is_streamed("train") else len(self.samples("train"))

    def source_names(self, split: str) -> tuple[str, ...]:
        """Names of the sources of a split, in their order; empty without a file."""
        if self.paths[split] is None:
            return ()
        return self.stream.names if self.is_streamed(split) else self.table(split).sources

    def split(self, name: str) -> Split:
        if name not in self._splits:
            self.open([name])
            split = read_split(name, self._opened.pop(name), self.reading, self.rejected)
            if self._refuses_losses:
                refuse_losses(name, split, self.rejected, self.reading)
            self._splits[name] = split
            if name == "train" and self._refuses_losses:
                self.mixture.log()
        return self._splits[name]

    def without_limits(self, rejected: RejectedSamples) -> "Splits":
        """A copy that reads everything anew into tables, however few of the rows can be used: to look at them.

        Args:
            rejected: Takes what is not used.
        """
        if self.is_streamed("train"):
            log_decision("data.streaming", "not used here", "rows are read into a table, so that they can be counted")
        made = Splits(self.paths, self.reading, rejected, self.temperature, None)
        made._refuses_losses = False
        return made

    def table(self, split: str) -> RowTable:
        """The usable conversations of a split that is not streamed."""
        return self.split(split).samples

    @property
    def mixture(self) -> Mixture:
        """Which training rows an epoch holds."""
        if self._mixture is None:
            split = self.split("train")
            self._mixture = Mixture(split.sources, split.num_used, self.temperature, self.reading.seed)
        return self._mixture

    def mixture_of(self, sizes: Sequence[int]) -> Mixture:
        """The training mixture of other units than rows, such as groups of rows.

        Args:
            sizes: Units of each training source.
        """
        return Mixture(self.split("train").sources, sizes, self.temperature, self.reading.seed)

    def source_counts(self) -> list[dict[str, Any]]:
        """Rows read, dropped before training and in use of each source of train, val and test, as far as they are read.

        ``per_epoch``: rows that a training source gives to an epoch; None for others, and for a stream.
        """
        found = []
        for name, split in self._splits.items():
            counts: Sequence[int | None] = self.mixture.counts if name == "train" else [None] * len(split.sources)
            parts = zip(split.sources, split.tables, split.num_usable, split.num_used, counts, strict=True)
            found += [
                {"split": name, "name": source.name, "path": source.path, "read": table.num_read}
                | {"dropped": table.num_read - usable, "used": used, "per_epoch": count}
                for source, table, usable, used, count in parts
            ]
        if self._stream is not None:
            found += self._stream.source_counts()
        return found

    def majority_answers(self) -> dict[str, str]:
        """Question type -> most frequent training answer: the baseline that ignores the question.

        Training rows that are not in use otherwise are read without opening their pictures, and none of them counts as
        lost; empty, which is said, where none can be used.
        """
        if self.paths["train"] is None:
            log_decision("majority", "not computed", "data.train is not set")
            return {}
        if self.is_streamed("train"):
            log_decision("majority", "not computed", "data.streaming: the training rows are not read before")
            return {}
        try:
            table = self._splits["train"].samples if "train" in self._splits else self._unchecked()
            counts = table.answer_counts()
        except UserError as error:
            log_decision("majority", "not computed", f"data.train: {error.what}")
            return {}
        if not counts:
            log_decision("majority", "not computed", "no row of data.train can be used")
        return most_frequent_answers(counts)

    def _unchecked(self) -> RowTable:
        return rows_unchecked(self._sources("train"), self.reading)
