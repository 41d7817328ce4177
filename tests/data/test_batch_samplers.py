"""Plans by token budget and by length: nothing lost, nothing over, equal work on every rank, and taken up exactly."""

import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch_samplers import (
    EpochBatchSampler,
    LengthGroupedSampler,
    TokenBudgetSampler,
    length_batched_loader,
    padding_share,
)
from lightning_mm.data.dataloader import EpochSampler, ResumableDataLoader, training_loader
from lightning_mm.data.token_lengths import TokenLengths


def lengths_of(tokens: list[int] | Tensor, vision: Tensor | None = None) -> TokenLengths:
    tokens = torch.as_tensor(tokens)
    return TokenLengths(tokens, torch.zeros(len(tokens), dtype=torch.float64) if vision is None else vision)


def drawn(num: int, seed: int = 0) -> TokenLengths:
    """Lengths as of chats: most short, some long, half with a picture."""
    generator = torch.Generator().manual_seed(seed)
    text = (torch.randn(num, generator=generator).mul(0.7).exp() * 60).long() + 10
    has_image = torch.rand(num, generator=generator) < 0.5
    return lengths_of(text + 64 * has_image, has_image.double() * 40)


def batches_of(sampler: EpochBatchSampler, epoch: int = 0) -> list[list[int]]:
    return [batch for step in sampler.plan(epoch) for batch in step]


Tokens = st.lists(st.integers(1, 60), min_size=1, max_size=50)


@settings(deadline=None)
@given(tokens=Tokens, budget=st.integers(1, 300), world=st.integers(1, 5), seed=st.integers(0, 3))
def test_a_budget_is_kept_and_nothing_is_lost(tokens: list[int], budget: int, world: int, seed: int) -> None:
    lengths = lengths_of(tokens)
    samplers = [TokenBudgetSampler(lengths, budget, seed, rank, world) for rank in range(world)]
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert [len(share) for share in shares] == [len(samplers[0])] * world  # the same in every epoch
        batches = [batch for share in shares for batch in share]
        assert all(len(b) == 1 or len(b) * int(lengths.tokens[b].max()) <= budget for b in batches)
        counts = Counter(index for batch in batches for index in batch)
        assert set(counts) == set(range(len(tokens)))
        assert sum(counts.values()) - len(tokens) == samplers[0].num_repeated
        assert samplers[0].num_repeated == 0 or all(len(batch) == 1 for batch in batches)
    assert samplers[0].num_repeated <= -len(tokens) % world


@settings(deadline=None)
@given(tokens=Tokens, size=st.integers(1, 7), world=st.integers(1, 4), seed=st.integers(0, 3))
def test_groups_have_the_batches_of_the_plain_order(tokens: list[int], size: int, world: int, seed: int) -> None:
    samplers = [LengthGroupedSampler(lengths_of(tokens), size, seed, rank, world) for rank in range(world)]
    shares = [list(sampler) for sampler in samplers]
    plain = -(-len(EpochSampler(len(tokens), seed, 0, world)) // size)
    assert [len(share) for share in shares] == [plain] * world == [len(sampler) for sampler in samplers]
    counts = Counter(index for share in shares for batch in share for index in batch)
    assert set(counts) == set(range(len(tokens)))
    assert sum(counts.values()) == len(tokens) + -len(tokens) % world
    assert max(counts.values()) <= (1 if len(tokens) % world == 0 else max(2, -(-world // len(tokens))))
    sizes = [len(batch) for share in shares for batch in share]
    assert all(one <= size for one in sizes)
    assert sum(one < size for one in sizes) <= world  # one short step


def test_a_budget_is_used_up_without_padding() -> None:
    lengths = drawn(2000)
    batches = batches_of(TokenBudgetSampler(lengths, 4096, seed=0))
    at_random = torch.randperm(2000).split(2000 // len(batches))
    assert padding_share(lengths.tokens, batches) < 0.05
    assert padding_share(lengths.tokens, [batch.tolist() for batch in at_random]) > 0.4
    assert int(lengths.tokens.sum()) / (4096 * len(batches)) > 0.9


def test_grouping_saves_padding() -> None:
    lengths = drawn(2000)
    grouped = batches_of(LengthGroupedSampler(lengths, 8, seed=0))
    at_random = torch.randperm(2000).split(8)
    assert padding_share(lengths.tokens, grouped) < 0.1
    assert padding_share(lengths.tokens, [batch.tolist() for batch in at_random]) > 0.4


def test_padding_is_what_a_batch_would_hold() -> None:
    assert padding_share(torch.tensor([4, 2, 3]), [[0, 1], [2]]) == pytest.approx(2 / 11)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_slowest_rank_is_hardly_slower_than_the_mean(world: int) -> None:
    lengths = drawn(3000)

    def excess(steps: list[list[list[int]]]) -> float:
        costs = torch.tensor([[float(lengths.costs[batch].sum()) for batch in step] for step in steps])
        return float(costs.amax(1).sum() / costs.mean(1).sum() - 1)

    budget = TokenBudgetSampler(lengths, 4096, seed=0, world_size=world).plan(0)
    dealt = [torch.randperm(3000)[: 8 * world].split(8) for _ in range(100)]
    assert excess(budget) < 0.05
    assert excess(LengthGroupedSampler(lengths, 8, seed=0, world_size=world).plan(0)) < 0.06
    assert excess([[batch.tolist() for batch in step] for step in dealt]) > 0.08


def test_vision_counts_in_the_balance() -> None:
    vision = torch.tensor([0.0, 900.0] * 50, dtype=torch.float64)
    for step in TokenBudgetSampler(lengths_of([100] * 100, vision), 100, seed=0, world_size=2).plan(0):
        assert len({index % 2 for batch in step for index in batch}) == 1


@pytest.mark.parametrize("kind", ["budget", "group"])
def test_each_epoch_and_seed_has_an_order_of_its_own(kind: str) -> None:
    lengths = drawn(300)

    def plan(seed: int, epoch: int) -> list[list[int]]:
        made = TokenBudgetSampler(lengths, 1024, seed) if kind == "budget" else LengthGroupedSampler(lengths, 4, seed)
        return batches_of(made, epoch)

    orders = {str(plan(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert plan(1, 2) == plan(1, 2)
    longest = [int(lengths.tokens[batch].max()) for batch in plan(0, 0)]
    ascents = sum(a < b for a, b in pairwise(longest)) / len(longest)
    assert 0.3 < ascents < 0.7  # short and long take turns
    together = [{frozenset(batch) for batch in plan(0, epoch)} for epoch in range(2)]
    assert len(together[0] & together[1]) < 0.2 * len(together[0])  # in other company, but for the very longest


def ids(rows: list[int]) -> list[int]:
    return rows


def loader(num: int = 40, num_workers: int = 0, seed: int = 3, **changes: Any) -> ResumableDataLoader:
    options = {"max_tokens": 400, **changes}
    return length_batched_loader(range(num), ids, drawn(num, 1), seed=seed, num_workers=num_workers, **options)


KINDS: list[dict[str, Any]] = [{}, {"max_tokens": None, "batch_size": 4}]


@pytest.mark.parametrize("options", KINDS, ids=["budget", "group"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_is_taken_up_where_it_stopped(options: dict[str, Any], workers: int) -> None:
    whole = loader(**options)
    whole.sampler.set_epoch(1)  # type: ignore[attr-defined]
    expected = list(whole)
    assert len(expected) == len(whole)
    for done in (1, 4, len(expected)):
        first, second = loader(num_workers=workers, **options), loader(num_workers=workers, **options)
        first.sampler.set_epoch(1)  # type: ignore[attr-defined]
        batches = iter(first)
        assert [next(batches) for _ in range(done)] == expected[:done]
        second.load_state_dict(first.state_dict())
        assert list(second) == expected[done:]


def test_another_plan_is_refused_in_the_middle_of_an_epoch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    source = loader()
    batches = iter(source)
    next(batches)
    state = source.state_dict()
    plain = training_loader(range(40), ids, batch_size=4, seed=3)
    with pytest.raises(UserError, match="max_tokens was 400, is 500"):
        loader(max_tokens=500).load_state_dict(state)
    with pytest.raises(UserError, match=r"lengths was .* is None"):
        plain.load_state_dict(state)
    with pytest.raises(UserError, match="group_by_length was None, is 1"):
        loader(max_tokens=None, batch_size=4).load_state_dict(state)
    half = iter(plain)
    next(half)
    with pytest.raises(UserError, match="group_by_length was None, is 1"):
        loader(max_tokens=None, batch_size=4).load_state_dict(plain.state_dict())
    longer = length_batched_loader(range(40), ids, drawn(40, 2), max_tokens=400, seed=3)
    with pytest.raises(UserError, match="lengths was"):
        longer.load_state_dict(state)
    with monkeypatch.context() as other:
        other.setattr("lightning_mm.data.batch_samplers.rank_and_world_size", lambda: (0, 2))
        of_two_ranks = loader()
    with pytest.raises(UserError, match="world_size was 1, is 2"):
        of_two_ranks.load_state_dict(state)
    list(batches)
    of_two_ranks.load_state_dict(source.state_dict())


def test_what_is_planned_is_told() -> None:
    decision_log().clear()
    length_batched_loader(range(5), ids, lengths_of([10, 10, 10, 10, 300]), max_tokens=40)
    loader(max_tokens=None, batch_size=4)
    told = {(each.name, each.value) for each in decision_log()}
    assert ("data.max_tokens", "2 steps an epoch, 2.5 samples each") in told
    assert ("data.max_tokens", "1 samples are batches of their own") in told
    assert any(name == "data.group_by_length" and value.startswith("padding is") for name, value in told)


def test_few_samples_are_repeated_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mm.data.batch_samplers.rank_and_world_size", lambda: (3, 4))
    decision_log().clear()
    lone = length_batched_loader(range(3), ids, lengths_of([10, 10, 10]), max_tokens=1000)
    assert [len(batch) for batch in lone] == [1]
    assert "1 samples are seen twice in each epoch" in {each.value for each in decision_log()}


@pytest.mark.parametrize("options", KINDS, ids=["budget", "group"])
def test_nothing_touches_the_global_generators(options: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    list(loader(num_workers=1, **options))
    assert torch.equal(torch.get_rng_state(), before)


def test_lightning_can_overfit(tmp_path: Path) -> None:
    class Seen(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []  # type: ignore[var-annotated]

        def training_step(self, batch: list[int], batch_idx: int) -> Tensor:
            self.seen.append(batch)
            return self.weight * len(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Seen()
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=2,
        overfit_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You requested to overfit")
        trainer.fit(module, loader())
    assert module.seen == [[0], [1]] * 2
