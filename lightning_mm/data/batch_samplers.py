"""Batches of conversations of similar length: by a budget of tokens, or of a fixed number.

The plan of an epoch depends only on the lengths, (seed, epoch) and the number of ranks; every rank makes the whole plan
and takes its part. Every epoch has equally many batches, so that schedules and progress are exact, and contains each
sample once (a few twice, where samples do not divide by the ranks).

By budget (``TokenBudgetSampler``): samples, longest first, fall into buckets of lengths within 5 % of each other; each
epoch shuffles within buckets and cuts at the same positions. Batches of similar cost make a step, since the slowest
rank determines its duration; steps are in random order. Where a mixture gives other samples to other epochs, the cuts
are made for the longest that the n-th longest sample of any epoch can be.
By number (``LengthGroupedSampler``): the epoch's permutation is cut into windows, each sorted by length; steps within a
window are in random order.

Data flow: ``TokenLengths`` -> plan of an epoch's steps, one batch per rank -> this rank's batches ->
``ResumableDataLoader``.

Shapes: M samples of the dataset, N samples of an epoch (as many, without a mixture), W ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import rank_and_world_size
from lightning_mm.data.dataloader import Collate, EpochSampler, ResumableDataLoader, loader_options, log_repeated
from lightning_mm.data.mixture import Mixture
from lightning_mm.data.order_seed import order_seed
from lightning_mm.data.token_lengths import TokenLengths

BatchPlan = list[list[int]]
_MIN_BUCKET_RATIO = 0.95
_WINDOW = 32
_LEVEL_RATIO = 0.98
"""Of neighboring lengths at which the longest possible samples of an epoch are counted."""


class EpochBatchSampler(EpochSampler):
    """One rank's batches of an epoch's plan, as lists of sample indices.

    Args:
        lengths: Lengths of all M samples.
        seed: Random seed of the order, together with the epoch.
        rank: Rank of this process.
        world_size: Number of ranks.
        mixture: Which samples an epoch holds; None: each once.
    """

    def __init__(
        self, lengths: TokenLengths, seed: int, rank: int = 0, world_size: int = 1, mixture: Mixture | None = None
    ) -> None:
        super().__init__(len(lengths), seed, rank, world_size, mixture)
        self.lengths = lengths

    def plan(self, epoch: int) -> list[BatchPlan]:
        """All steps of an epoch, each with one batch per rank."""
        return self._steps(self.rows(epoch), torch.Generator().manual_seed(order_seed(self.seed, epoch)))

    def _steps(self, rows: Tensor, generator: torch.Generator) -> list[BatchPlan]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]  # batches, where the base has samples
        for step in self.plan(self.epoch)[self.skip :]:
            yield step[self.rank]

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "lengths": self.lengths.digest}


class TokenBudgetSampler(EpochBatchSampler):
    """Batches of as many samples as fit: number of rows times the longest length is at most ``max_tokens``.

    A sample that is longer than that is a batch of its own.

    Args:
        lengths: Lengths of all M samples.
        max_tokens: Limit on the tokens of a batch, padding included.
        seed: Random seed of the order, together with the epoch.
        rank: Rank of this process.
        world_size: Number of ranks.
        mixture: Which samples an epoch holds; None: each once.
    """

    def __init__(
        self,
        lengths: TokenLengths,
        max_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        mixture: Mixture | None = None,
    ) -> None:
        super().__init__(lengths, seed, rank, world_size, mixture)
        self.max_tokens = max_tokens
        self._bucket_of, self._cuts = _buckets(self._longest_possible().tolist(), max_tokens)
        _split_until_divisible(self._cuts, world_size)
        self.num_repeated = -len(self._cuts) % world_size  # not 0 only where every batch is of one sample

    def __len__(self) -> int:
        return -(-len(self._cuts) // self.world_size)

    def _longest_possible(self) -> Tensor:
        """(N,) longest first: the n-th longest sample of an epoch is at most that long, in tokens."""
        tokens = self.lengths.tokens
        if self.mixture is None or self.mixture.is_same_in_all_epochs:
            return tokens[self.rows(0)].sort(descending=True).values
        longest, shortest = int(tokens.max()), int(tokens.min())
        num_levels = 1 + int(np.log(shortest / longest) / np.log(_LEVEL_RATIO))
        levels = np.unique(np.ceil(longest * _LEVEL_RATIO ** np.arange(num_levels)).astype(np.int64))
        classes = len(levels) - 1 - np.searchsorted(levels, tokens.numpy())
        num_longer = self.mixture.most_below(classes, len(levels))
        place = np.searchsorted(num_longer, np.arange(self.num_samples), side="right") - 1
        return torch.from_numpy(levels[::-1][place])

    def _steps(self, rows: Tensor, generator: torch.Generator) -> list[BatchPlan]:
        noise = torch.rand(self.num_samples, generator=generator, dtype=torch.float64)
        longest_first = rows[torch.argsort(self.lengths.tokens[rows], descending=True, stable=True)]
        order = longest_first[torch.argsort(self._bucket_of + noise, stable=True)]
        batches = [order[start:end].tolist() for start, end in self._cuts]
        batches += [batches[i % len(batches)] for i in range(self.num_repeated)]
        costs = torch.stack([self.lengths.costs[batch].sum() for batch in batches])
        alike = torch.argsort(costs, descending=True, stable=True).reshape(-1, self.world_size)
        steps = alike[torch.randperm(len(alike), generator=generator)].tolist()
        return [[batches[number] for number in step] for step in steps]

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "batch_size": 0, "max_tokens": self.max_tokens}


class LengthGroupedSampler(EpochBatchSampler):
    """Batches of a fixed number of samples of similar length.

    Args:
        lengths: Lengths of all M samples.
        batch_size: Samples per batch of one rank.
        seed: Random seed of the order, together with the epoch.
        rank: Rank of this process.
        world_size: Number of ranks.
        mixture: Which samples an epoch holds; None: each once.
    """

    def __init__(
        self,
        lengths: TokenLengths,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        mixture: Mixture | None = None,
    ) -> None:
        super().__init__(lengths, seed, rank, world_size, mixture)
        self.batch_size = batch_size
        self.num_repeated = -self.num_samples % world_size

    def __len__(self) -> int:
        return -(-super().__len__() // self.batch_size)

    def _steps(self, rows: Tensor, generator: torch.Generator) -> list[BatchPlan]:
        order = rows[torch.randperm(self.num_samples, generator=generator)]
        order = order[torch.arange(self.num_samples + self.num_repeated) % self.num_samples]
        steps: list[BatchPlan] = []
        for window in order.split(_WINDOW * self.world_size * self.batch_size):
            alike = window[torch.argsort(self.lengths.tokens[window], descending=True, stable=True)]
            chunks = alike.split(self.world_size * self.batch_size)
            drawn = torch.randperm(len(chunks), generator=generator).tolist()
            # Every W-th sample: the ranks' parts are similar in length and cost.
            steps += [[chunks[i][rank :: self.world_size].tolist() for rank in range(self.world_size)] for i in drawn]
        return steps

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "batch_size": self.batch_size, "group_by_length": 1}


def _buckets(tokens: Sequence[int], max_tokens: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Buckets of similar length, and where batches begin and end in the order from long to short.

    Args:
        tokens: Lengths in tokens, longest first.
        max_tokens: Limit on the tokens of a batch.

    Returns:
        (N,) float64 bucket of each position, and (start, end) of each batch.
    """
    bucket, longest = 0, tokens[0]
    buckets, longests = [], []
    for length in tokens:
        if length < _MIN_BUCKET_RATIO * longest:
            bucket, longest = bucket + 1, length
        buckets.append(bucket)
        longests.append(longest)
    cuts, start = [], 0
    while start < len(tokens):
        end = min(len(tokens), start + max(1, max_tokens // longests[start]))
        cuts.append((start, end))
        start = end
    return torch.tensor(buckets, dtype=torch.float64), cuts


def _split_until_divisible(cuts: list[tuple[int, int]], world_size: int) -> None:
    """Halve the largest batches in place until their number divides by the ranks, or each has one sample."""
    while len(cuts) % world_size:
        largest = max(range(len(cuts)), key=lambda i: (cuts[i][1] - cuts[i][0], i))
        start, end = cuts[largest]
        if end - start == 1:
            return
        middle = (start + end) // 2
        cuts[largest : largest + 1] = [(start, middle), (middle, end)]


def length_batched_loader(
    dataset: Sequence[Any],
    collate: Collate,
    lengths: TokenLengths,
    *,
    max_tokens: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    num_workers: int = 0,
    fingerprint: int = 0,
    mixture: Mixture | None = None,
) -> ResumableDataLoader:
    """The training loader of this rank (of torch.distributed), with batches by length.

    Args:
        dataset: M samples.
        collate: Makes a batch of a list of samples.
        lengths: Lengths of the samples.
        max_tokens: Limit on the tokens of a batch; None makes batches of ``batch_size``.
        batch_size: Samples per batch; not used with ``max_tokens``.
        seed: Random seed of the order.
        num_workers: Number of worker processes.
        fingerprint: Digest of the content of the dataset, which a checkpoint is resumed with; 0: not known.
        mixture: Which samples an epoch holds; None: each once.
    """
    rank, world_size = rank_and_world_size()
    sampler: TokenBudgetSampler | LengthGroupedSampler
    if max_tokens is not None:
        sampler = TokenBudgetSampler(lengths, max_tokens, seed, rank, world_size, mixture)
        _log_token_budget(sampler)
    else:
        sampler = LengthGroupedSampler(lengths, batch_size, seed, rank, world_size, mixture)
        _log_grouping(sampler)
    log_repeated(sampler.num_repeated, sampler)
    loader = ResumableDataLoader(**loader_options(_BatchDataset(dataset), collate, sampler, None, num_workers))
    loader.fingerprint = fingerprint
    return loader


class _BatchDataset(Dataset[list[Any]]):
    """A dataset indexed by whole batches; by single samples with Lightning's overfit_batches."""

    def __init__(self, dataset: Sequence[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int | list[int]) -> list[Any]:
        return [self._dataset[i] for i in ([index] if isinstance(index, int) else index)]


def _log_token_budget(sampler: TokenBudgetSampler) -> None:
    tokens, batches = sampler.lengths.tokens, [batch for step in sampler.plan(0) for batch in step]
    size = sampler.num_samples / len(batches)
    used = int(tokens[sampler.rows(0)].sum()) / (len(batches) * sampler.max_tokens)
    log_decision(
        "data.max_tokens",
        f"{len(sampler)} steps an epoch, {size:.1f} samples each",
        f"{used:.0%} of {sampler.max_tokens} tokens are used, "
        f"padding is {padding_share(tokens, batches):.1%} of a batch",
    )
    if over := int((tokens > sampler.max_tokens).sum()):
        log_decision("data.max_tokens", f"{over} samples are batches of their own", "they are longer than the budget")


def _log_grouping(sampler: LengthGroupedSampler) -> None:
    tokens, batches = sampler.lengths.tokens, [batch for step in sampler.plan(0) for batch in step]
    generator = torch.Generator().manual_seed(0)
    shuffled = sampler.rows(0)[torch.randperm(sampler.num_samples, generator=generator)].split(sampler.batch_size)
    before = padding_share(tokens, [batch.tolist() for batch in shuffled])
    after = padding_share(tokens, batches)
    log_decision("data.group_by_length", f"padding is {after:.1%} of a batch", f"{before:.1%} in random order")


def padding_share(tokens: Tensor, batches: Sequence[Sequence[int]]) -> float:
    """Padding as a share of all positions of right-padded batches.

    Args:
        tokens: (N,) lengths.
        batches: Sample indices of each batch.
    """
    rows = [tokens[list(batch)] for batch in batches]
    positions = sum(len(row) * int(row.max()) for row in rows)
    return 1 - sum(int(row.sum()) for row in rows) / positions
