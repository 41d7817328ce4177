"""Intervals have the length that theory gives them, and samples of one picture are never torn apart."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.resampling import (
    clustered_mean_interval,
    group_jackknife,
    jackknife_blocks,
    jackknife_error,
    jackknife_interval,
    permutation_problem,
    permutations,
    swap_problem,
    t_quantile,
    without_null,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 15), st.integers(1, 20), st.integers(0, 3))
def test_blocks_are_a_partition_that_cuts_no_group(n: int, blocks: int, pictures: int, seed: int) -> None:
    groups = torch.randint(0, pictures, (n,), generator=torch.Generator().manual_seed(seed))
    for given_groups in (None, groups):
        cut = jackknife_blocks(n, given_groups, blocks, seed)
        assert torch.cat(cut).sort().values.tolist() == list(range(n))
        assert len(cut) <= blocks
        if given_groups is not None:
            owners = [set(groups[block].tolist()) for block in cut]
            assert sum(map(len, owners)) == len(set().union(*owners))


def test_blocks_are_as_many_as_asked_and_of_one_size() -> None:
    assert {len(block) for block in jackknife_blocks(120, blocks=12)} == {10}
    assert [len(block) for block in jackknife_blocks(100, torch.arange(100) // 5, blocks=10)] == [10] * 10


def test_leaving_out_single_samples_gives_the_textbook_error_of_a_mean() -> None:
    """1e-6: float32 sums."""
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    error, dof = group_jackknife(lambda kept: x[kept].mean(), 50, blocks=50)
    assert dof == 49
    assert float(error) == pytest.approx(float(x.std()) / math.sqrt(50), rel=1e-5)


def test_the_jackknife_covers_a_non_linear_statistic() -> None:
    """The interval of log variance holds the truth in 95 % of 400 data sets; 0.91 to 0.98 is 3 sd of that count."""
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        x = torch.randn(200, generator=generator)
        left_out = torch.stack([x.var().log(), *(_without(x, block).var().log() for block in jackknife_blocks(200))])
        low, high = jackknife_interval(left_out)
        held += bool(low <= 0 <= high)
    assert 0.91 < held / 400 < 0.98


def _without(x: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    return x[~torch.isin(torch.arange(len(x)), block)]


def test_few_parts_give_no_interval() -> None:
    assert jackknife_error(torch.zeros(2)).isnan()
    assert all(end.isnan() for end in jackknife_interval(torch.zeros(3)))
    assert all(end.isnan() for end in clustered_mean_interval(torch.zeros(1, 2))[1:])


def test_an_interval_stays_in_the_range_that_is_possible() -> None:
    low, high = jackknife_interval(torch.tensor([0.9, 0.5, 1.0, 0.7]), 0.0, 1.0)
    assert (float(low), float(high)) == (0.0, 1.0)


@pytest.mark.parametrize("dof", [2, 3, 5, 11, 40, 1000])
def test_t_quantiles(dof: int) -> None:
    assert t_quantile(dof) == pytest.approx(scipy.stats.t.ppf(0.975, dof), rel=0.01)


def test_an_interval_of_a_mean_is_that_of_scipy() -> None:
    """2e-3: the t quantile's series."""
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for row, mean, low, high in zip(x, *clustered_mean_interval(x), strict=True):
        expected = scipy.stats.t.interval(0.95, 39, loc=float(row.mean()), scale=scipy.stats.sem(row.numpy()))
        assert (float(low), float(high)) == pytest.approx(expected, rel=2e-3)
        assert float(mean) == pytest.approx(float(row.mean()), abs=1e-6)


def test_copies_of_a_sample_do_not_narrow_the_interval() -> None:
    """Every picture four times over carries no more than once."""
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        clustered_mean_interval(x.repeat_interleave(4, 1), torch.arange(160) // 4), clustered_mean_interval(x)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_groups_change_places_whole_and_with_their_like(n: int, pictures: int, seed: int) -> None:
    groups = torch.randint(0, pictures, (n,), generator=torch.Generator().manual_seed(seed))
    for order in permutations(n, 3, seed, groups):
        assert sorted(order.tolist()) == list(range(n))
        for picture in groups.unique():
            arrived = groups[order[groups == picture]]
            assert len(arrived.unique()) == 1
            assert (groups == arrived[0]).sum() == (groups == picture).sum()


def test_permutations_differ_and_repeat_with_their_seed() -> None:
    drawn = permutations(30, 5)
    assert len({tuple(order.tolist()) for order in drawn}) == 5
    assert torch.equal(drawn, permutations(30, 5))
    assert not torch.equal(drawn, permutations(30, 5, seed=1))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    permutations(30, 5)
    jackknife_blocks(30)
    assert torch.equal(before, torch.get_rng_state())


def test_sums_of_groups_are_those_of_a_product() -> None:
    """As a dense N x G product gives them; order and names of groups do not matter."""
    generator = torch.Generator().manual_seed(0)
    x, groups = torch.randn(2, 500, generator=generator), torch.randint(0, 70, (500,), generator=generator) * 7 - 100
    residual = x.double() - x.double().mean(1, keepdim=True)
    sums = residual @ torch.nn.functional.one_hot(torch.unique(groups, return_inverse=True)[1]).double()
    count = sums.shape[1]
    width = t_quantile(count - 1) * (sums.square().sum(1) * count / (count - 1)).sqrt() / 500
    mean, low, high = clustered_mean_interval(x, groups)
    torch.testing.assert_close(high - mean, width, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean - low, width, rtol=1e-12, atol=0)


def test_many_groups_take_no_more_memory_than_their_samples() -> None:
    """A one-hot product of 20000 samples was 3.2 GB."""
    x = torch.zeros(1, 20000)
    for groups in (torch.arange(20000), torch.arange(20000) // 2):
        with torch.profiler.profile(profile_memory=True) as profiled:
            clustered_mean_interval(x, groups)
        assert max(event.self_cpu_memory_usage for event in profiled.events()) < 4 << 20


@pytest.mark.parametrize("groups", [torch.zeros(30), torch.tensor([0] * 29 + [1])])
def test_a_statistic_is_not_asked_about_nothing(groups: torch.Tensor) -> None:
    def statistic(kept: torch.Tensor) -> torch.Tensor:
        assert len(kept) == 30, "what one or two groups leave is nothing to go by"
        return torch.zeros(2)

    error, dof = group_jackknife(statistic, 30, groups)
    assert error.isnan().tolist() == [True, True]
    assert dof < 2


def test_groups_that_cannot_change_places_are_no_chance() -> None:
    assert (
        permutation_problem(None)
        == permutation_problem(torch.arange(7))
        == permutation_problem(torch.arange(60) // 3)
        == ""
    )
    unique = torch.repeat_interleave(torch.arange(12), torch.arange(1, 13))
    assert permutation_problem(unique).startswith("chance is not drawn: ")
    twins = torch.repeat_interleave(torch.arange(12), torch.arange(12) // 2 + 1)
    assert "50% of the samples would stay" in permutation_problem(twins), "of two groups of a size one stays on average"
    mixed = torch.cat([torch.zeros(3), 1 + torch.arange(100) // 2])
    assert permutation_problem(mixed) == "", "a few may stay"


def test_few_groups_are_no_swaps() -> None:
    assert swap_problem(None) == swap_problem(torch.arange(60) // 10) == ""
    assert swap_problem(torch.zeros(30)).endswith("as good as 1.0 groups")
    assert swap_problem(torch.tensor([0] * 50 + list(range(1, 11)))).endswith("as good as 1.4 groups")


def test_without_chance_there_is_a_note() -> None:
    one = Estimate(0.5, n=10, null=0.1, null_low=0.0, null_high=0.2)
    assert without_null([one], "") == [one]
    bare, known = without_null([one], "why")[0], without_null([one], "why", exact=True)[0]
    assert (bare.null, bare.null_low, bare.null_high, bare.notes) == (None, None, None, ("why",))
    assert (known.null, known.null_low, known.null_high, known.notes) == (0.1, None, None, ("why",))
    assert without_null([Estimate.undefined_because("constant", 5)], "why")[0] == Estimate.undefined_because(
        "constant", 5
    )
