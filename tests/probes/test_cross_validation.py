"""Parts, control labels and draws: decided by ids and seed alone, groups kept whole, labels spread."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.probes.cross_validation import (
    LearnableLabels,
    bootstrap_weights,
    control_labels,
    hash_uniform,
    layer_problems,
    num_groups,
    stratified_group_folds,
)

COUNTS = st.lists(st.integers(1, 4), min_size=10, max_size=40)


def test_hash_is_splitmix64() -> None:
    """The first outputs of the published generator, seeded with 0, are hashes of 1, 2, 3 but for the seed's offset."""
    offset = 0x632BE5AB
    golden = 0x9E3779B97F4A7C15

    def reference(z: int) -> float:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return ((z ^ (z >> 31)) >> 11) / 2**53

    ids = [0, 1, 2, 77, 2**40, -3]
    expected = [reference((golden * one + 4 * offset) % 2**64) for one in ids]
    assert hash_uniform(torch.tensor(ids), 3).tolist() == expected


def test_hash_is_uniform_and_seeds_are_independent() -> None:
    a, b = hash_uniform(torch.arange(20_000), 0), hash_uniform(torch.arange(20_000), 1)
    counts = torch.histc(a, 20, 0, 1)
    # Each count is binomial with sd 31: four of these.
    assert float((counts - 1000).abs().max()) < 124
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4 / 20_000**0.5


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 1000), parts=st.integers(2, 5))
def test_parts_hold_whole_groups_and_do_not_depend_on_order(counts: list[int], seed: int, parts: int) -> None:
    groups_N = torch.repeat_interleave(torch.arange(len(counts)) * 31 + 5, torch.tensor(counts))
    labels_N = (hash_uniform(torch.arange(len(groups_N)), seed) * 3).long()
    part_N = stratified_group_folds(labels_N, groups_N, parts, seed)
    for group in groups_N.unique():
        assert len(part_N[groups_N == group].unique()) == 1
    sizes = torch.bincount(part_N[torch.tensor([int((groups_N == g).nonzero()[0]) for g in groups_N.unique()])])
    assert int(sizes.max() - sizes.min()) <= 1
    order_N = torch.randperm(len(groups_N), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(stratified_group_folds(labels_N[order_N], groups_N[order_N], parts, seed), part_N[order_N])


def test_labels_are_spread_over_parts() -> None:
    groups_N = torch.arange(100)
    labels_N = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    part_N = stratified_group_folds(labels_N, groups_N, 5, 0)
    for label, expected in enumerate((12, 6, 2)):
        assert torch.bincount(part_N[labels_N == label]).tolist() == [expected] * 5
    generator = torch.Generator().manual_seed(0)
    labels_NK = (torch.rand(200, 3, generator=generator) < torch.tensor([0.5, 0.2, 0.05])).long()
    part_N = stratified_group_folds(labels_NK, torch.arange(200), 5, 0)
    rarest = torch.bincount(part_N[labels_NK[:, 2] == 1], minlength=5)
    assert int(rarest.max() - rarest.min()) <= 1


def test_another_seed_makes_other_parts() -> None:
    groups_N, labels_N = torch.arange(50), torch.arange(50) % 2
    assert not torch.equal(
        stratified_group_folds(labels_N, groups_N, 5, 0), stratified_group_folds(labels_N, groups_N, 5, 1)
    )


def test_control_labels_are_one_per_type_and_as_frequent() -> None:
    types_N = torch.arange(6000) // 2
    labels_N = torch.tensor([0, 0, 0, 1, 1, 2]).repeat(1000)
    control_N = control_labels(labels_N, types_N, 0)
    assert torch.equal(control_N[::2], control_N[1::2])
    share = torch.bincount(control_N) / 6000
    # 3000 draws: sd at most 0.0091, four of these.
    torch.testing.assert_close(share, torch.tensor([0.5, 1 / 3, 1 / 6]), rtol=0, atol=0.037)
    assert torch.equal(control_labels(labels_N, types_N, 0), control_N)
    # Independent of the true ones.
    assert abs(float(torch.corrcoef(torch.stack([labels_N, control_N]).double())[0, 1])) < 4 / 3000**0.5


def test_control_labels_of_a_multilabel_problem_are_true_rows() -> None:
    labels_NK = torch.tensor([[1, 1, 0], [0, 0, 1]]).repeat(30, 1)
    control_NK = control_labels(labels_NK, torch.arange(60), 0)
    assert {tuple(row) for row in control_NK.tolist()} == {(1, 1, 0), (0, 0, 1)}


def test_draws_take_whole_groups() -> None:
    groups_N = torch.tensor([4, 4, 9, 7, 7, 7])
    times_BN = bootstrap_weights(groups_N, 2000, 0)
    assert torch.equal(times_BN[:, 0], times_BN[:, 1])
    assert torch.equal(times_BN[:, 3], times_BN[:, 5])
    assert (times_BN[:, [0, 2, 3]].sum(1) == 3).all()
    # Each group is drawn once on average, with variance 1 - 1 / 3.
    assert float(times_BN[:, 2].mean()) == pytest.approx(1, abs=4 * (2 / 3 / 2000) ** 0.5)
    assert num_groups(groups_N) == 3


def test_unsound_layers() -> None:
    good_ND = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    broken_ND = good_ND.clone()
    broken_ND[[2, 5], 1] = torch.tensor([torch.nan, torch.inf])
    layers = torch.stack([good_ND, torch.full((10, 4), 3.3), broken_ND, 1e5 + 1e-3 * good_ND, 1e-20 * good_ND])
    assert layer_problems(layers) == [
        "",
        "constant: all 10 samples coincide",
        "not finite: 2 of 10 samples",
        "constant: all 10 samples coincide",
        "",
    ]


def subject(labels: torch.Tensor, groups: torch.Tensor | None = None) -> LearnableLabels:
    return LearnableLabels.of(labels, torch.arange(len(labels)) if groups is None else groups)


def test_rare_classes_are_left_out_aloud() -> None:
    found = subject(torch.tensor([3] * 12 + [8] * 4 + [40] * 7))
    assert found.problem == ""
    assert found.note == "left out: 4 samples, whose 1 classes are in fewer than 5 groups"
    assert found.labels.tolist() == [0] * 12 + [1] * 7
    assert found.rows.tolist() == [*range(12), *range(16, 23)]


def test_rare_and_ubiquitous_labels_are_left_out_aloud() -> None:
    labels_NK = torch.zeros(20, 3, dtype=torch.long)
    labels_NK[:8, 0], labels_NK[:4, 1], labels_NK[:17, 2] = 1, 1, 1
    found = subject(labels_NK)
    assert found.note == "left out: 2 of 3 labels, which are present or absent in fewer than 5 groups"
    assert torch.equal(found.labels, labels_NK[:, :1])


def test_what_cannot_be_learned_says_why() -> None:
    assert subject(torch.ones(20)).problem == "one class: nothing to tell apart"
    assert subject(torch.arange(8) % 2).problem == "too few: 8 groups, at least 10 are needed"
    assert subject(torch.arange(40) % 2, torch.arange(40) // 8).problem == "too few: 5 groups, at least 10 are needed"
    assert subject(torch.arange(30) // 3).problem == "too rare: nothing to tell apart is in 5 groups or more"
    assert subject(torch.zeros(30, 2)).problem == "one class: nothing to tell apart"
    assert subject((torch.arange(30) < 4)[:, None]).problem.startswith("too rare")
    assert subject(torch.zeros(0)).problem == "too few: 0 groups, at least 10 are needed"
    assert subject(torch.tensor([0] * 5 + [1] * 4 + [2])).problem.startswith("too rare")


def test_any_seed_is_taken() -> None:
    """Seeds count modulo 2^64; small ones give what they always gave."""
    ids_N = torch.arange(1000)
    for seed in (2**40, 2**63, 2**70 + 5):
        drawn = hash_uniform(ids_N, seed)
        assert 0.45 < float(drawn.mean()) < 0.55
        assert not torch.equal(drawn, hash_uniform(ids_N, seed + 1))
    torch.testing.assert_close(hash_uniform(ids_N, 2**64 + 3), hash_uniform(ids_N, 3), rtol=0, atol=0)
