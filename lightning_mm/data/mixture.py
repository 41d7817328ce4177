"""The mixture of several sources: how many rows each gives to an epoch, and which.

A source has M rows in use (after ``first`` and ``limit``), and counts as S = M * ``repeats`` rows. An epoch has N rows,
the sum of all S, whatever the weights are: these move rows between sources, and do not make an epoch longer. The share
of a source in it is proportional to ``weight`` * S^(1 / temperature), so that

- without weights and temperature each source gives S rows, and each row of it is seen ``repeats`` times;
- with temperature 1 each row of a source of weight 2 is seen twice as often as one of weight 1;
- with temperature inf the shares are the weights, whatever the sizes of the sources.

Which rows those are goes round: a source that gives k rows to an epoch gives the next k of one fixed random order, and
begins again at its end. After any number of epochs each of its rows was seen equally often, or once more; so a source
with a share below its size gives other rows to the next epoch until all were seen.

Data flow: sources and their numbers of rows -> ``Mixture`` -> the rows of an epoch, in the order of the table ->
samplers, which shuffle and deal them out. A pure function of (seed, epoch).

Shapes: K sources, M rows of a source, N rows of an epoch.
"""

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.order_seed import permutation
from lightning_mm.data.readers.source import Source

Rows = NDArray[np.int64]
_BLOCKS = 4096


class Mixture:
    """Which rows of a table an epoch holds.

    Args:
        sources: The K sources, in the order of the table.
        sizes: Rows in use of each, the first source's first in the table.
        temperature: Above 0; 1 (None): shares follow the sizes; the larger, the more equal they are.
        seed: Of the order in which rows of a source take turns.

    Attributes:
        counts: Rows of each source in every epoch.
        num_rows: N, their sum.

    Raises:
        UserError: A weight, a number of repeats or the temperature is no such number, or all weights are 0.
    """

    def __init__(
        self, sources: Sequence[Source], sizes: Sequence[int], temperature: float | None = None, seed: int = 0
    ) -> None:
        check_weights(sources)
        check_temperature(temperature)
        self.names = tuple(source.name for source in sources)
        self.sizes, self._seed = tuple(sizes), seed
        weights = [float(source.weight) for source in sources]
        counted = [size * source.repeats for size, source in zip(sizes, sources, strict=True)]
        self.counts = _counts(weights, counted, 1.0 if temperature is None else temperature)
        self.num_rows = sum(self.counts)
        self._starts = np.cumsum([0, *sizes]).tolist()
        self._order = lru_cache(maxsize=None)(self._drawn_order)

    @property
    def is_plain(self) -> bool:
        """Whether every epoch holds each row of the table once, as without a mixture."""
        return self.counts == self.sizes

    @property
    def is_same_in_all_epochs(self) -> bool:
        """Whether every epoch holds the same rows."""
        return all(count % max(1, size) == 0 for count, size in zip(self.counts, self.sizes, strict=True))

    def rows(self, epoch: int) -> Rows:
        """(N,) rows of an epoch, as indices into the table and in its order; a row may be there several times.

        Args:
            epoch: Number of the epoch, from 0.
        """
        if self.is_plain:
            return np.arange(self.num_rows, dtype=np.int64)
        return np.concatenate([self._rows_of(number, epoch) for number in range(len(self.sizes))])

    def _rows_of(self, number: int, epoch: int) -> Rows:
        size = self.sizes[number]
        whole, rest = divmod(self.counts[number], max(1, size))
        times = np.full(size, whole)
        if rest:
            turn = np.arange(rest, dtype=np.int64) + epoch * rest % size
            times[self._order(number).take(turn, mode="wrap")] += 1
        return np.repeat(np.arange(self._starts[number], self._starts[number + 1], dtype=np.int64), times)

    def _drawn_order(self, number: int) -> Rows:
        order: Rows = permutation(self.sizes[number], self._seed, "mixture", self.names[number]).numpy()
        return order

    def most_below(self, classes: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
        """(num_classes,) upper bound at c on the rows of classes below c in any epoch, repeated ones counted.

        Exact for sources of up to 4096 rows; of a larger one, rows in the same 4096th of its order are taken together.

        Args:
            classes: Class of each row of the table, from 0.
            num_classes: Number of classes.
        """
        parts = [classes[start:stop] for start, stop in pairwise(self._starts)]
        return sum(
            (self._most_below_of(number, part, num_classes) for number, part in enumerate(parts)),
            start=np.zeros(num_classes, dtype=np.int64),
        )

    def _most_below_of(self, number: int, classes: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
        size = self.sizes[number]
        whole, rest = divmod(self.counts[number], max(1, size))
        most = whole * _num_below(np.bincount(classes, minlength=num_classes))
        if not rest:
            return most
        width = -(-size // _BLOCKS)
        num_blocks = -(-size // width)
        cells = np.arange(size) // width * num_classes + classes[self._order(number)]
        below = _num_below(np.bincount(cells, minlength=num_blocks * num_classes).reshape(num_blocks, num_classes))
        # Blocks that hold all turns of an epoch, wherever they begin; the last block may be short.
        touched = min(num_blocks, -(-(rest - 1) // width) + 1 + (size % width > 0))
        before = np.cumsum(np.concatenate([np.zeros((1, num_classes), np.int64), below, below[:touched]]), axis=0)
        held = before[touched : touched + num_blocks] - before[:num_blocks]
        first = slice(0, None, math.gcd(size, rest) if width == 1 else 1)  # where the turns of an epoch can begin
        return most + np.minimum(held[first].max(0), rest)

    def __str__(self) -> str:
        """Rows of each source in an epoch, of how many: part of the order that a checkpoint is resumed with."""
        parts = zip(self.names, self.counts, self.sizes, strict=True)
        return ", ".join(f"{name} {count} of {size}" for name, count, size in parts)

    def log(self) -> None:
        """Say what an epoch holds, where that is not each row once."""
        if self.is_plain or not self.num_rows:
            return
        parts = zip(self.names, self.counts, self.sizes, strict=True)
        why = [f"{name}: {share_words(count, size, self.num_rows)}" for name, count, size in parts]
        log_decision("data.train mixture", f"{self.num_rows} rows an epoch", "; ".join(why))


def _num_below(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(..., C) number of rows in the classes before each, of (..., C) rows in each."""
    below = np.zeros_like(counts)
    np.cumsum(counts[..., :-1], axis=-1, out=below[..., 1:])
    return below


def share_words(count: int, size: int, total: int) -> str:
    """What a source gives to an epoch, in words.

    Example:
        >>> share_words(40, 20, 100)
        '40 of 20 rows, each 2 times, 40.0% of the epoch'
        >>> share_words(5, 20, 100)
        '5 of 20 rows, all of them in 4 epochs, 5.0% of the epoch'
    """
    if not count:
        return f"none of {size} rows, its weight is 0" if size else "it has none"
    if count < size:
        turns = f"all of them in {-(-size // count)} epochs"
    else:
        turns = "each once" if count == size else f"each {count / size:.3g} times"
    return f"{count} of {size} rows, {turns}, {count / total:.1%} of the epoch"


def check_weights(sources: Sequence[Source]) -> None:
    """Refuse what is no weight, no number of repeats or no limit.

    Args:
        sources: The sources of training.

    Raises:
        UserError: A number is out of its range, or all weights are 0.
    """
    for source in sources:
        if not _is_number(source.weight) or not 0 <= source.weight < math.inf:
            raise _bad(source, "weight", "It is 0 or more; with 0 a source gives no row.")
        if not _is_number(source.repeats) or not 0 < source.repeats < math.inf:
            raise _bad(source, "repeats", "It is more than 0: 2 for each row twice, 0.5 for half of the rows.")
        check_limit(source)
    if not any(source.weight for source in sources):
        raise UserError("All weights of data.train are 0.", "No row would be trained on.", "Give one a weight of 1.")


def check_temperature(temperature: float | None) -> None:
    """Refuse what is no temperature of a mixture, with a ``UserError``; None: not given."""
    if temperature is not None and not (_is_number(temperature) and temperature > 0):
        raise UserError(
            f"data.temperature is {temperature}.",
            "Shares follow size^(1 / temperature): 1 keeps the sizes, 2 and more makes shares more equal.",
            "Give a number above 0, or .inf (math.inf in Python) for shares that are the weights.",
        )


_SAMPLING = re.compile(r"(first|end|random):(?:(\d+)|(\d+)%|(0?\.\d+|[\d.]+e-\d+))")


def sampled_part(source: Source, total: int) -> tuple[str, int]:
    """Which rows the sampling of a source takes, and how many.

    Args:
        source: The source.
        total: Number of its rows that can be used.

    Returns:
        first, end or random, and a number up to ``total``, at least 1 where there are rows.

    Raises:
        UserError: It is no such sampling.
    """
    if source.sampling in (None, "all"):
        return "first", total
    match = _SAMPLING.fullmatch(str(source.sampling))
    if match is None or not float(next(filter(None, match.groups()[1:]))):
        raise _bad(source, "sampling", "It is all, first:N, end:N or random:N; N is 100, 10% or 0.1, and more than 0.")
    kind, number, percent, share = match.groups()
    wanted = int(number) if number else -(-int(percent) * total // 100) if percent else int(total * float(share))
    return kind, min(total, max(1, wanted))


def check_limit(source: Source) -> None:
    """Refuse numbers of rows in use that are none, with a ``UserError``."""
    sampled_part(source, 1)
    for option in ("first", "limit"):
        given = getattr(source, option)
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise _bad(source, option, "It is a number of rows, 1 or more.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bad(source: Source, option: str, why: str) -> UserError:
    return UserError(
        f"{source.name}: {option} is {getattr(source, option)!r}.", why, f"Change {option} of {source.path}."
    )


def _counts(weights: Sequence[float], counted: Sequence[float], temperature: float) -> tuple[int, ...]:
    """Whole numbers of rows by largest remainder; at least one of each source with a weight."""
    weights = [weight if size else 0.0 for weight, size in zip(weights, counted, strict=True)]
    if not any(weights):
        return tuple(0 for _ in weights)
    if len({weight for weight in weights if weight}) == 1 and temperature == 1:
        return tuple(max(1, round(size)) if weight else 0 for weight, size in zip(weights, counted, strict=True))
    wanted = [weight * size ** (1 / temperature) for weight, size in zip(weights, counted, strict=True)]
    total = max(1, round(sum(size for size, weight in zip(counted, weights, strict=True) if weight)))
    quotas = [total * each / sum(wanted) for each in wanted]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return tuple(max(count, 1) if weight else 0 for count, weight in zip(counts, weights, strict=True))
