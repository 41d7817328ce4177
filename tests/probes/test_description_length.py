"""The online code against scikit-learn, closed forms, random labels and perfect ones."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lightning_mm.probes import description_length as module
from lightning_mm.probes.cross_validation import hash_uniform
from lightning_mm.probes.description_length import FRACTIONS, description_length

C_VALUES = [1e-3, 1e-2, 1e-1]


def blocks(n: int) -> list[int]:
    ends = sorted({max(1, round(fraction * n)) for fraction in FRACTIONS})
    return [end for end in ends if end >= 10]


def random_features(layers: int = 2, n: int = 400, d: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(layers, n, d, generator=torch.Generator().manual_seed(seed))


def told(
    x_LND: torch.Tensor, labels: torch.Tensor, classes: int = 2, c_values: list[float] | None = None
) -> list[float]:
    targets_AN = labels[None] if labels.ndim == 1 else labels
    groups_N = torch.arange(x_LND.shape[1])
    found = description_length(x_LND, targets_AN, classes, groups_N, c_values or C_VALUES, seed=0)
    assert all(one.low is not None and one.high is not None and one.low <= one.value <= one.high for one in found)
    return [one.value or 0.0 for one in found]


def test_equals_a_code_made_with_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOLERANCE", 1e-7)
    x_LND = random_features(1).double()
    labels_N = (x_LND[0, :, 0] + 0.5 * x_LND[0, :, 1] > 0.3).long() + (x_LND[0, :, 2] > 1).long()
    order = torch.argsort(hash_uniform(torch.arange(400), 0)).numpy()
    x, labels, ends = x_LND[0].numpy()[order], labels_N.numpy()[order], blocks(400)
    bits = ends[0] * math.log2(3)
    for start, end in pairwise(ends):
        assert len(set(labels[:start])) == 3, "scikit-learn needs all classes"
        scaler = StandardScaler().fit(x[:start])
        model = LogisticRegression(C=0.05, tol=1e-9, max_iter=5000).fit(scaler.transform(x[:start]), labels[:start])
        p = model.predict_proba(scaler.transform(x[start:end]))[np.arange(end - start), labels[start:end]]
        bits -= np.log2((start * p + 1 / 3) / (start + 1)).sum()
    assert told(x_LND, labels_N, 3, [0.05])[0] == pytest.approx(400 * math.log2(3) / bits, rel=1e-6)


def test_features_that_say_nothing_cost_what_frequencies_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOLERANCE", 1e-7)
    labels_N = (torch.arange(300) % 5 == 0).long()
    found = description_length(torch.zeros(1, 300, 3), labels_N[None], 2, torch.arange(300), [1.0], seed=0)
    # The closed form: a class that was k of n labels has probability (k + 1/2) / (n + 1).
    told_first, bits = blocks(300)[0], blocks(300)[0] * 1.0
    in_order = labels_N[torch.argsort(hash_uniform(torch.arange(300), 0))].tolist()
    for start, end in pairwise(blocks(300)):
        ones = (sum(in_order[:start]) + 0.5) / (start + 1)
        bits -= sum(math.log2(ones if label else 1 - ones) for label in in_order[start:end])
    assert told_first == 10
    assert found[0].null == pytest.approx(300 / bits, rel=1e-5)
    assert found[0].value == pytest.approx(found[0].null, rel=1e-4)


def test_random_labels_are_not_compressed() -> None:
    labels_N = torch.randint(2, (400,), generator=torch.Generator().manual_seed(1))
    for value in told(random_features(), labels_N):
        assert 0.9 < value < 1.03


def test_perfect_labels_are_compressed_to_their_first_block() -> None:
    labels_N = torch.arange(400) % 2
    x_LND = random_features(1) + 40.0 * labels_N[:, None]
    (value,) = told(x_LND, labels_N, 2, [1.0, 100.0])
    # 13 bits of the first block and about 0.72 per later block for the imaginary sample: N / n_1 = 31 is the bound.
    assert 18 < value < 400 / blocks(400)[0]


def test_the_vote_over_c_costs_at_most_its_logarithm() -> None:
    x_LND = random_features(1)
    labels_N = (x_LND[0, :, 0] > 0).long()
    alone = [400 / told(x_LND, labels_N, 2, [c])[0] for c in C_VALUES]
    together = 400 / told(x_LND, labels_N)[0]
    # What each C says is computed in float32, alone and together in different order.
    assert together <= min(alone) + math.log2(len(C_VALUES)) + 1e-4


def test_labels_of_several_tasks_are_averaged() -> None:
    x_LND = random_features()
    labels_AN = torch.stack([(x_LND[0, :, 0] > 0).long(), (x_LND[0, :, 1] > 1).long()])
    both, alone = told(x_LND, labels_AN), [told(x_LND, one) for one in labels_AN]
    for layer, value in enumerate(both):
        assert value == pytest.approx(2 / (1 / alone[0][layer] + 1 / alone[1][layer]), rel=1e-3)


def test_groups_are_not_torn_apart() -> None:
    groups_N = torch.arange(400) // 7
    order_N, ends = module._blocks(groups_N, 0)
    for end in ends[:-1]:
        assert groups_N[order_N[end - 1]] != groups_N[order_N[end]]
    assert ends[-1] == 400
    assert sorted(order_N.tolist()) == list(range(400))


def test_order_of_samples_changes_nothing() -> None:
    x_LND = random_features()
    labels_N, groups_N = (x_LND[0, :, 0] > 0).long(), torch.arange(400) // 2
    order_N = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    plain = description_length(x_LND, labels_N[None], 2, groups_N, C_VALUES, seed=0)
    moved = description_length(x_LND[:, order_N], labels_N[order_N][None], 2, groups_N[order_N], C_VALUES, seed=0)
    for a, b in zip(plain, moved, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-3)
        assert a.low == pytest.approx(b.low, rel=1e-3)
