"""Mixtures: as many rows of each source as its share says, each row of it equally often, the same for all ranks."""

from collections import Counter
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch_samplers import EpochBatchSampler, LengthGroupedSampler, TokenBudgetSampler
from lightning_mm.data.dataloader import EpochSampler, ResumableDataLoader, training_loader
from lightning_mm.data.mixture import Mixture
from lightning_mm.data.readers.source import Source
from lightning_mm.data.token_lengths import TokenLengths


def mixture(sizes: list[int], temperature: float | None = None, seed: int = 0, **options: list[Any]) -> Mixture:
    columns = [{name: values[i] for name, values in options.items()} for i in range(len(sizes))]
    sources = [Source(f"{i}.json", f"s{i}", **column) for i, column in enumerate(columns)]
    return Mixture(sources, sizes, temperature, seed)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    sizes = draw(st.lists(st.integers(1, 25), min_size=1, max_size=4))
    positive = st.sampled_from([0.3, 0.5, 1.0, 1.7, 3.0])
    weights = draw(st.lists(st.one_of(st.just(0.0), positive), min_size=len(sizes), max_size=len(sizes)))
    repeats = draw(st.lists(positive, min_size=len(sizes), max_size=len(sizes)))
    weights = weights if any(weights) else [1.0] * len(sizes)
    temperature = draw(st.sampled_from([None, 0.5, 1.0, 2.0, inf]))
    return mixture(sizes, temperature, draw(st.integers(0, 3)), weight=weights, repeats=repeats)


def source_of(mixed: Mixture, rows: np.ndarray[Any, Any]) -> list[int]:
    starts = np.cumsum([0, *mixed.sizes])
    return np.bincount(np.searchsorted(starts, rows, side="right") - 1, minlength=len(mixed.sizes)).tolist()


@settings(deadline=None)
@given(mixed=mixtures(), epochs=st.integers(1, 6), first=st.integers(0, 1000))
def test_every_row_of_a_source_is_seen_equally_often(mixed: Mixture, epochs: int, first: int) -> None:
    seen: Counter[int] = Counter()
    for epoch in range(first, first + epochs):
        rows = mixed.rows(epoch)
        assert len(rows) == mixed.num_rows
        assert source_of(mixed, rows) == list(mixed.counts)
        assert (np.diff(rows) >= 0).all(), "in the order of the table"
        seen.update(rows.tolist())
    starts = np.cumsum([0, *mixed.sizes]).tolist()
    for start, size, count in zip(starts, mixed.sizes, mixed.counts, strict=False):
        times = [seen[row] for row in range(start, start + size)]
        assert min(times) == epochs * count // size
        assert max(times) == -(-epochs * count // size)


@settings(deadline=None)
@given(mixed=mixtures())
def test_rows_are_a_function_of_seed_and_epoch(mixed: Mixture) -> None:
    again = Mixture([Source("x", name, weight=1.0) for name in mixed.names], mixed.sizes, None, mixed._seed)
    again.counts, again.num_rows = mixed.counts, mixed.num_rows
    later = [again.rows(epoch) for epoch in (7, 2, 7)]
    assert np.array_equal(later[0], later[2])
    assert np.array_equal(mixed.rows(7), later[0])
    assert np.array_equal(mixed.rows(2), later[1])


@pytest.mark.parametrize("blocks", [4096, 3])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mixed=mixtures(), data=st.data())
def test_the_most_of_any_epoch_is_the_largest_of_all(
    blocks: int, mixed: Mixture, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks it is no less, and no more than all that the source gives."""
    monkeypatch.setattr("lightning_mm.data.mixture._BLOCKS", blocks)
    total = sum(mixed.sizes)
    classes = np.array(data.draw(st.lists(st.integers(0, 3), min_size=total, max_size=total)))
    found = mixed.most_below(classes, 4)
    for below in range(4):
        # Each source is round after as many epochs as it has rows.
        each = [source_of(mixed, rows[classes[rows] < below]) for rows in map(mixed.rows, range(max(mixed.sizes)))]
        largest = sum(max(column) for column in zip(*each, strict=True))
        assert found[below] == largest if blocks == 4096 else largest <= found[below] <= mixed.num_rows


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, (100, 900)),
        ({"weight": [2, 2]}, (100, 900)),
        ({"weight": [2, 1]}, (182, 818)),  # 200 : 900 of 1000
        ({"temperature": 2.0}, (250, 750)),  # 10 : 30
        ({"temperature": inf}, (500, 500)),
        ({"temperature": inf, "weight": [0.2, 0.8]}, (200, 800)),
        ({"repeats": [3, 1]}, (300, 900)),
        ({"repeats": [1, 0.5]}, (100, 450)),
        ({"weight": [0, 5]}, (0, 900)),
        ({"weight": [1, 1e-9]}, (1000, 1)),
    ],
    ids=str,
)
def test_shares(options: dict[str, Any], counts: tuple[int, ...]) -> None:
    mixed = mixture([100, 900], **options)
    assert mixed.counts == counts


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"weight": [1, 2]}, {"weight": [0, 2]}], ids=str)
def test_a_source_without_rows_gives_none(options: dict[str, Any]) -> None:
    """A source is refused elsewhere if none of its rows can be used; here nothing divides by their number."""
    mixed = mixture([0, 4], **options)
    assert mixed.counts == (0, 4)
    assert mixed.rows(1).tolist() == [0, 1, 2, 3]
    mixed.log()
    assert mixture([0, 0], **options).num_rows == 0


def test_half_of_the_rows_then_the_other_half() -> None:
    mixed = mixture([10], repeats=[0.5])
    assert not mixed.is_same_in_all_epochs
    assert sorted([*mixed.rows(0), *mixed.rows(1)]) == list(range(10))
    assert mixture([10], seed=1, repeats=[0.5]).rows(0).tolist() != mixed.rows(0).tolist()
    assert mixture([10], repeats=[2]).is_same_in_all_epochs


def test_without_a_mixture_the_order_is_what_it_always_was() -> None:
    """The numbers are of the sampler before there were mixtures."""
    for mixed in (None, mixture([4, 6]), mixture([4, 6], weight=[3, 3])):
        sampler = EpochSampler(10, 3, 1, 2, mixed)
        assert list(sampler) == [0, 9, 3, 7, 8]
        sampler.set_epoch(1)
        assert list(sampler) == [1, 4, 5, 0, 6]
        assert "mixture" not in sampler.identity()


def samplers(mixed: Mixture, lengths: TokenLengths, world: int) -> dict[str, list[EpochSampler]]:
    rows, ranks = sum(mixed.sizes), range(world)
    return {
        "plain": [EpochSampler(rows, 1, rank, world, mixed) for rank in ranks],
        "budget": [TokenBudgetSampler(lengths, 100, 1, rank, world, mixed) for rank in ranks],
        "grouped": [LengthGroupedSampler(lengths, 3, 1, rank, world, mixed) for rank in ranks],
    }


@settings(deadline=None)
@given(mixed=mixtures(), world=st.integers(1, 3), seed=st.integers(0, 5))
def test_ranks_share_the_rows_of_every_epoch(mixed: Mixture, world: int, seed: int) -> None:
    tokens = torch.randint(1, 120, (sum(mixed.sizes),), generator=torch.Generator().manual_seed(seed))
    lengths = TokenLengths(tokens, torch.zeros(len(tokens), dtype=torch.float64))
    for kind, ranks in samplers(mixed, lengths, world).items():
        for epoch in range(4):
            for sampler in ranks:
                sampler.set_epoch(epoch)
            shares = [list(sampler) for sampler in ranks]
            assert [len(share) for share in shares] == [len(ranks[0])] * world, "as many in every epoch"
            given: Any = shares if kind == "plain" else [row for share in shares for row in share]
            if kind == "budget":
                assert all(len(b) == 1 or len(b) * int(tokens[b].max()) <= 100 for b in given)
            counted = Counter(row for share in given for row in share)
            planned = Counter(mixed.rows(epoch).tolist())
            assert not planned - counted, "nothing is lost"
            assert (counted - planned).total() < world, "and what is twice fills the ranks"


@settings(deadline=None)
@given(mixed=mixtures(), skip=st.integers(0, 5), epoch=st.integers(0, 3))
def test_what_is_skipped_is_what_was_done(mixed: Mixture, skip: int, epoch: int) -> None:
    lengths = TokenLengths(torch.arange(sum(mixed.sizes)) + 1, torch.zeros(sum(mixed.sizes), dtype=torch.float64))
    for ranks in samplers(mixed, lengths, 1).values():
        (sampler,) = ranks
        sampler.set_epoch(epoch)
        whole: list[Any] = list(sampler)
        sampler.skip = skip
        assert list(sampler) == whole[skip:]


def test_a_budget_of_a_mixture_is_hardly_wasted() -> None:
    """Cuts hold for all epochs; on 4000 rows of which an epoch takes a quarter that costs little."""
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randn(4000, generator=generator).mul(0.7).exp() * 60).long() + 10
    lengths = TokenLengths(tokens, torch.zeros(4000, dtype=torch.float64))
    mixed = mixture([3000, 1000], repeats=[0.3, 1])
    sampler: EpochBatchSampler = TokenBudgetSampler(lengths, 4096, 0, mixture=mixed)
    used = [int(tokens[torch.from_numpy(mixed.rows(epoch))].sum()) / (4096 * len(sampler)) for epoch in range(5)]
    assert min(used) > 0.85  # 0.91 if each epoch were cut by itself
    assert all(len(b) * int(tokens[b].max()) <= 4096 for step in sampler.plan(3) for b in step)


def loader(mixed: Mixture) -> ResumableDataLoader:
    return training_loader(range(sum(mixed.sizes)), list, batch_size=2, seed=3, mixture=mixed)


def test_another_weight_is_refused_in_the_middle_of_an_epoch() -> None:
    before, after = loader(mixture([4, 8], weight=[2, 1])), loader(mixture([4, 8], weight=[1, 2]))
    batches = iter(before)
    next(batches)
    state = before.state_dict()
    with pytest.raises(UserError, match=r"mixture was s0 6 of 4, s1 6 of 8, is s0 2 of 4, s1 10 of 8") as caught:
        after.load_state_dict(state)
    assert "weights" in caught.value.fix
    list(batches)
    after.load_state_dict(before.state_dict())  # at the end of an epoch nothing is lost
    same = loader(mixture([4, 8], weight=[4, 2]))
    same.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": [-1, 1]}, "s0: weight is -1"),
        ({"weight": [nan, 1]}, "s0: weight is nan"),
        ({"weight": [1, inf]}, "s1: weight is inf"),
        ({"weight": ["much", 1]}, "s0: weight is 'much'"),
        ({"weight": [True, 1]}, "s0: weight is True"),
        ({"weight": [0, 0]}, "All weights of data.train are 0"),
        ({"repeats": [1, 0]}, "s1: repeats is 0"),
        ({"limit": [0, None]}, "s0: limit is 0"),
        ({"first": [None, -3]}, "s1: first is -3"),
        ({"limit": [2.5, None]}, "s0: limit is 2.5"),
        ({"temperature": 0.0}, "data.temperature is 0"),
        ({"temperature": nan}, "data.temperature is nan"),
    ],
    ids=str,
)
def test_a_mistake_is_one_clear_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        mixture([3, 4], **options)


def test_it_is_said_what_an_epoch_holds() -> None:
    decision_log().clear()
    mixture([3, 4]).log()
    assert not list(decision_log())
    mixture([3, 6, 5], weight=[3, 1, 0]).log()
    (said,) = map(str, decision_log())
    assert "9 rows an epoch" in said
    assert "s0: 5 of 3 rows, each 1.67 times, 55.6% of the epoch" in said
    assert "s1: 4 of 6 rows, all of them in 2 epochs" in said
    assert "s2: none of 5 rows, its weight is 0" in said
