"""Training rows read as they are needed, without a table of them: for what does not fit a disk, or for a first look.

The stream of an epoch is a pure function of (seed, epoch): the parts of a source in random order, the rows of a part in
theirs, sources interleaved at random, and all of it through a shuffle buffer, of which each row that comes in pushes
out a random one. Every rank reads the whole stream in its main process and keeps every W-th row, so that no row is lost
or doubled, whatever the number of workers; these decode pictures and make batches. What a resumed run skips is read,
but nothing is decoded.

Sources without weights are each read once, in proportion to the bytes of their files. With weights, the weights are the
shares; a source at its end begins again until each has been read once, which ends the epoch.

Data flow: ``OpenSource`` parts -> rows (those that cannot be used are counted) -> ``SampleStream`` -> shuffle buffer ->
``StreamSampler`` (this rank's batches of Samples) -> workers -> ``ResumableDataLoader``.

Shapes: W ranks.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, cast

import lightning as L
from torch.utils.data import Dataset

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import rank_and_world_size
from lightning_mm.core.errors import UserError
from lightning_mm.data.dataloader import Collate, EpochSampler, ResumableDataLoader, loader_options
from lightning_mm.data.mixture import check_weights
from lightning_mm.data.order_seed import order_seed
from lightning_mm.data.readers.opened import OpenSource, Part, PartReport, check_any
from lightning_mm.data.rejected_samples import MIN_ROWS, RejectedSamples
from lightning_mm.data.sample import Rejection, Sample
from lightning_mm.data.table import FORMAT

_FIRST_ROWS = 64


@dataclass
class SourceCounts:
    """What was read of one source in the epoch that has read most of it.

    Args:
        read: Rows.
        dropped: Those that cannot be used.
    """

    read: int = 0
    dropped: int = 0


class SampleStream:
    """The rows of several sources, epoch by epoch.

    Args:
        sources: What to read.
        seed: Of the order, together with the epoch.
        shuffle_buffer: Number of rows among which the next one is drawn; 0 and 1 keep the order.
        rejected: Takes the rows that cannot be used, and the number of rows read.

    Attributes:
        counts: What was read of each source.
        first: Some rows from the beginning of each source, for what looks at rows before the run.

    Raises:
        UserError: A source gives no row that can be used, or has an option that needs the number of its rows.
    """

    def __init__(
        self, sources: Sequence[OpenSource], seed: int, shuffle_buffer: int, rejected: RejectedSamples
    ) -> None:
        self.sources, self._seed, self._buffer, self._rejected = tuple(sources), seed, shuffle_buffer, rejected
        check_streamed([each.source for each in sources])
        rejected.is_counted["train"] = False
        self.counts = [SourceCounts() for _ in sources]
        self._parts: list[list[Part]] = [each.parts() for each in sources]
        weights = [each.source.weight for each in sources]
        self._is_weighted = len(set(weights)) > 1
        size = [sum(file.stat().st_size for file in each.files) for each in sources]
        self._pace = weights if self._is_weighted else size
        self.first = tuple(sample for number, pace in enumerate(self._pace) if pace for sample in self._first(number))
        self._log()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources."""
        return tuple(each.source.name for each in self.sources)

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """What the order of rows depends on: files by name, size and time, how they are read, and the options.

        Looked up once: each optimizer step asks for it.
        """
        weights = [f"{each.source.name} {each.source.weight:g}" for each in self.sources]
        files = [
            [_reading(each), [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in each.files]]
            for each in self.sources
        ]
        digest = hashlib.sha256(json.dumps([FORMAT, files], sort_keys=True, default=str).encode()).hexdigest()
        return {"files": digest[:16], "weights": ", ".join(weights), "shuffle_buffer": self._buffer}

    def source_counts(self) -> list[dict[str, Any]]:
        """What was read of each source, as ``MMDataModule.source_counts`` has it."""
        return [
            {"split": "train", "name": each.source.name, "path": each.source.path, "read": counts.read}
            | {"dropped": counts.dropped, "used": counts.read - counts.dropped, "per_epoch": None}
            for each, counts in zip(self.sources, self.counts, strict=True)
        ]

    def samples(self, epoch: int) -> Iterator[Sample]:
        """All samples of an epoch in their order, the same on every rank.

        Args:
            epoch: Number of the epoch, from 0.

        Raises:
            UserError: Too many rows cannot be used.
        """
        draw = random.Random(order_seed(self._seed, epoch, "buffer"))
        held: list[Sample] = []
        for sample in self._interleaved(epoch):
            if len(held) < max(1, self._buffer):
                held.append(sample)
                continue
            place = draw.randrange(len(held))
            yield held[place]
            held[place] = sample
        draw.shuffle(held)
        yield from held

    def _interleaved(self, epoch: int) -> Iterator[Sample]:
        """Samples of all sources, before the buffer."""
        draw = random.Random(order_seed(self._seed, epoch, "sources"))
        counts = [SourceCounts() for _ in self.sources]
        streams = [self._pass(number, epoch, 0, counts[number]) for number in range(len(self.sources))]
        passes = [0 if pace else 1 for pace in self._pace]  # a source of weight 0 is at its end
        going = [number for number, pace in enumerate(self._pace) if pace]
        while going:
            number = going[0] if len(going) == 1 else draw.choices(going, [self._pace[each] for each in going])[0]
            if (sample := next(streams[number], None)) is not None:
                yield sample
                self._count(counts)
                continue
            passes[number] += 1
            if self._is_weighted and not all(passes):
                streams[number] = self._pass(number, epoch, passes[number], SourceCounts())
            else:
                going = [] if self._is_weighted else [each for each in going if each != number]
        self._count(counts, is_whole=True)

    def _pass(self, number: int, epoch: int, turn: int, counts: SourceCounts) -> Iterator[Sample]:
        """The usable samples of one source, its parts in random order."""
        source, parts = self.sources[number], list(self._parts[number])
        random.Random(order_seed(self._seed, epoch, "parts", source.source.name, turn)).shuffle(parts)
        for part in parts:
            for row in source.read(part, PartReport()):
                if isinstance(row, Sample):
                    counts.read += 1
                    yield row
                    continue
                counts.read += row.kind == "dropped"
                counts.dropped += row.kind == "dropped"
                self._rejected.add([self._named(row, source)])
        check_any(source.source.path, counts.read > counts.dropped, self._rejected, counts.read)

    def _named(self, rejection: Rejection, source: OpenSource) -> Rejection:
        return replace(rejection, split="train", source=source.source.path)

    def _count(self, counts: list[SourceCounts], is_whole: bool = False) -> None:
        """Keep the counts of the epoch that has read most; now and then see whether too many rows were dropped."""
        read, before = sum(each.read for each in counts), self._rejected.num_rows["train"]
        if read > before:
            self.counts = counts
            self._rejected.num_rows["train"] = read
        if is_whole:
            self._rejected.is_counted["train"] = True
        if is_whole or (read > before and read // MIN_ROWS > before // MIN_ROWS):
            self._rejected.check()

    def _first(self, number: int) -> list[Sample]:
        source, found, rejections = self.sources[number], list[Sample](), list[Rejection]()
        for row in (row for part in self._parts[number] for row in source.read(part, PartReport())):
            if isinstance(row, Sample):
                found.append(row)
            else:
                rejections.append(row)
            if len(found) == _FIRST_ROWS:
                break
        check_any(source.source.path, bool(found), rejections, len(found) + len(rejections))
        return found

    def _log(self) -> None:
        total = sum(self._pace)
        shares = ", ".join(f"{name} {pace / total:.1%}" for name, pace in zip(self.names, self._pace, strict=True))
        rule = "their weights" if self._is_weighted else "the bytes of their files, each row once an epoch"
        why = f"drawn among {self._buffer} rows in memory (data.shuffle_buffer), parts of files in random order"
        if len(self.sources) > 1:
            why += f"; sources by {rule}: {shares}"
        log_decision("data.streaming", "rows are read as they are needed", why)
        log_decision(
            "data.streaming",
            f"the first {len(self.first)} rows stand for all",
            "where rows are looked at before or beside training (checks of the step, layers: auto, causal analyses)",
        )


class StreamSampler(EpochSampler):
    """One rank's batches of a stream, as lists of samples.

    Every W-th sample is this rank's. At the end of an epoch batches may be smaller; where fewer samples than ranks are
    left, some are seen twice, since all ranks need as many batches.

    Args:
        stream: The samples.
        batch_size: Samples per batch of one rank.
        seed: That of the stream.
        rank: Rank of this process.
        world_size: Number of ranks.
    """

    def __init__(self, stream: SampleStream, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(0, seed, rank, world_size)
        self.stream, self.batch_size = stream, batch_size
        self._whole: dict[int, int] = {}

    def __len__(self) -> int:
        raise TypeError("the number of batches of a stream is not known")

    def num_batches(self, batch_size: int | None, epoch: int) -> int:
        """Batches of an epoch once its end was reached, else -1."""
        return self._whole.get(epoch, -1)

    def __iter__(self) -> Iterator[list[Sample]]:  # type: ignore[override]  # batches, where the base has samples
        epoch, done = self.epoch, 0
        samples = self.stream.samples(epoch)
        while step := list(islice(samples, self.batch_size * self.world_size)):
            done += 1
            if len(step) < self.world_size:
                why = f"{len(step)} are left for {self.world_size} ranks, and all ranks need as many batches"
                log_decision("data.train", f"{self.world_size - len(step)} samples are seen twice in this epoch", why)
            if done > self.skip:
                yield step[self.rank :: self.world_size] or [step[self.rank % len(step)]]
        self._whole[epoch] = done

    def identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "world_size": self.world_size,
            "batch_size": self.batch_size,
            **self.stream.identity,
        }


def streaming_loader(
    stream: SampleStream, collate: Collate, *, batch_size: int, seed: int = 0, num_workers: int = 0
) -> ResumableDataLoader:
    """The training loader of this rank (of torch.distributed) for a stream; its length is not known.

    Args:
        stream: The samples.
        collate: Makes a batch of a list of samples.
        batch_size: Samples per batch of one rank.
        seed: That of the stream.
        num_workers: Number of worker processes.
    """
    sampler = StreamSampler(stream, batch_size, seed, *rank_and_world_size())
    return ResumableDataLoader(**loader_options(cast(Any, _Given()), collate, sampler, None, num_workers))


class _Given(Dataset[list[Sample]]):
    """Passes on the samples that it is asked for: workers get them from the main process, which reads the stream."""

    def __getitem__(self, samples: list[Sample]) -> list[Sample]:
        return samples


def _reading(source: OpenSource) -> dict[str, Any]:
    """How a source is read, wherever its pictures are."""
    identity = source.identity()
    named = {key: value for key, value in identity["source"].items() if key != "image_root"}
    return {**{key: value for key, value in identity.items() if key != "image_root"}, "source": named}


def check_streamed(sources: Sequence[Any]) -> None:
    """Refuse options of a source that need the number of its rows.

    Args:
        sources: The sources of training.

    Raises:
        UserError: A source has ``first``, ``limit``, ``sampling`` or ``repeats``, or its weight is none.
    """
    check_weights(sources)
    ends = "Leave it out; trainer.max_steps ends the run."
    for source in sources:
        for option, fix in (("first", ends), ("limit", ends), ("sampling", ends), ("repeats", "Give a weight.")):
            if getattr(source, option) not in (None, 1):
                raise UserError(
                    f"{source.name}: {option} does not go with data.streaming.",
                    "It needs the number of rows, which is not known before all are read.",
                    fix,
                )


def refuse_with_streaming(options: dict[str, tuple[bool, str]]) -> None:
    """Refuse options of the data module that need the number or the lengths of all rows.

    Args:
        options: Name of the option -> whether it is given, and what to do instead.

    Raises:
        UserError: One is given.
    """
    for name, (is_given, fix) in options.items():
        if is_given:
            why = "It needs the number or the lengths of all rows, which are not known before they are read."
            raise UserError(f"{name} does not go with data.streaming.", why, fix)


def check_streaming_trainer(trainer: L.Trainer) -> None:
    """Refuse a trainer that counts in parts of an epoch, or has no last step.

    Args:
        trainer: About to fit.

    Raises:
        UserError: ``max_steps`` is not given, or an option is a share of an epoch.
    """
    if trainer.max_steps < 1:
        raise UserError(
            "data.streaming needs trainer.max_steps.",
            "The number of rows is not known, so neither is the number of steps, which the learning rate follows.",
            "Give --trainer.max_steps N.",
        )
    shares: dict[str, Any] = {
        "val_check_interval": trainer.val_check_interval,
        "limit_train_batches": trainer.limit_train_batches,
    }
    for name, value in shares.items():
        if isinstance(value, float) and value != 1.0:
            raise UserError(
                f"trainer.{name} {value} does not go with data.streaming.",
                "The number of batches of an epoch is not known.",
                f"Give --trainer.{name} a number of batches.",
            )
    if trainer.val_check_interval == 1.0 and trainer.limit_val_batches:
        why = (
            "an epoch of a stream is one pass through its rows; trainer.val_check_interval N validates every N batches"
        )
        log_decision("trainer.val_check_interval", "at the end of each epoch", why)
    if trainer.overfit_batches:  # type: ignore[attr-defined]  # set by its data connector
        raise UserError(
            "trainer.overfit_batches does not go with data.streaming.",
            "It takes the rows of a table by their number.",
            "Leave data.streaming out.",
        )
