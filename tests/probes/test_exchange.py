"""Exchanges of labels: within pictures and of whole pictures, never across folds."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.probes.exchange import exchanged_rows, label_ids


def exchanged(labels_N: list[int], groups_N: list[int], draws: int = 200) -> torch.Tensor:
    """(B, N) labels after each exchange, all samples in one fold."""
    labels, groups = torch.tensor(labels_N), torch.tensor(groups_N)
    return labels[exchanged_rows(labels, groups, torch.zeros_like(labels), draws, 0)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_fold_keeps_its_labels(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups_N = torch.randint(12, (60,), generator=generator)
    labels_N, fold_N = torch.randint(3, (60,), generator=generator), groups_N % 3
    rows_BN = exchanged_rows(labels_N, groups_N, fold_N, 20, seed)
    assert torch.equal(rows_BN.sort(1).values, torch.arange(60).expand(20, -1))
    assert torch.equal(fold_N[rows_BN], fold_N.expand(20, -1))


def test_a_true_and_a_false_row_change_places_half_of_the_time() -> None:
    found_BN = exchanged([1, 0] * 10, [g for g in range(10) for _ in "ab"])
    assert (found_BN.view(200, 10, 2).sum(2) == 1).all(), "each picture keeps one true and one false row"
    # 2000 swaps: the standard deviation of their share is 0.011.
    assert abs(float(found_BN[:, ::2].float().mean()) - 0.5) < 0.05


def test_rows_of_a_label_stay_together() -> None:
    found_BN = exchanged([1, 1, 0, 0] * 6, [g for g in range(6) for _ in "abcd"]).view(200, 6, 4)
    assert (found_BN[..., 0] == found_BN[..., 1]).all()
    assert (found_BN[..., 2] == found_BN[..., 3]).all()
    assert (found_BN[..., 0] != found_BN[..., 2]).all()


def test_unequal_counts_are_permuted_singly() -> None:
    found_BN = exchanged([1, 0, 0] * 6, [g for g in range(6) for _ in "abc"]).view(200, 6, 3)
    assert (found_BN.sum(2) == 1).all()
    # Each of three rows is the true one a third of the time; 1200 draws have a standard deviation of 0.014.
    assert (found_BN.float().mean((0, 1)) - 1 / 3).abs().max() < 0.06


def test_groups_of_one_label_are_exchanged_as_wholes() -> None:
    found_BN = exchanged([0] * 6 + [1] * 6, [n // 2 for n in range(12)])
    assert (found_BN[:, ::2] == found_BN[:, 1::2]).all()
    assert (found_BN.sum(1) == 6).all()
    assert (found_BN.float().mean(0) - 0.5).abs().max() < 0.15


def test_labels_of_a_sample_stay_together() -> None:
    labels_AN = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 1]])
    ids_N = label_ids(labels_AN)
    assert ids_N[1] == ids_N[4]
    assert len(ids_N.unique()) == 4
