"""Overlap of neighborhoods and of labels: counts, chance values, bands and intervals."""

import itertools

import pytest
import torch
from scipy.stats import hypergeom
from torch import Tensor

from lightning_mm.core.estimate import Estimate, values
from lightning_mm.geometry.knn_overlap import chance_overlap, label_overlap, overlap, overlap_matrix
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.null_models import adjust_for_chance
from lightning_mm.geometry.representations import Representations


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(features: Tensor, k: int = 64) -> Neighbors:
    return Neighbors.of(Representations.of(features), k)


def by_hand(a: Neighbors, b: Neighbors, k: int) -> tuple[float, float]:
    """Mean overlap and mean Jaccard index of Python sets."""
    pairs = [(set(x[:k].tolist()), set(y[:k].tolist())) for x, y in zip(a.indices[0], b.indices[0], strict=True)]
    return sum(len(x & y) / k for x, y in pairs) / len(pairs), sum(len(x & y) / len(x | y) for x, y in pairs) / len(
        pairs
    )


def alone(near: Neighbors, layer: int) -> Neighbors:
    """One layer of it."""
    parts = (part[layer, None] for part in (near.indices, near.distances, near.beyond))
    return Neighbors(*parts, near.candidates, None, near.width, near.problems[layer : layer + 1])


def test_counts_of_sets() -> None:
    x = noise(1, 80, 6)
    a, b = near(x), near(x + 0.7 * noise(1, 80, 6, seed=1))
    for k in (1, 10, 30, 64):
        plain, jaccard = by_hand(a, b, k)
        assert overlap(a, b, k)[0].value == pytest.approx(plain, abs=1e-12)
        assert overlap(a, b, k, score="jaccard")[0].value == pytest.approx(jaccard, abs=1e-12)


def test_one_for_itself_whatever_scale_rotation_and_place() -> None:
    x = noise(2, 100, 8)
    rotation = torch.linalg.qr(noise(8, 8, seed=1)).Q
    for estimate in overlap(near(x), near(5 * x @ rotation - 2)):
        assert estimate.value == pytest.approx(1, abs=0.002)  # one neighbor in 1000 may fall otherwise in float32
    assert [each.value for each in overlap(near(x), near(x), 10)] == [1, 1]
    assert overlap(near(x), near(x), 10)[0].high == 1


def test_chance_is_exact() -> None:
    everyone = torch.full((2500,), 2499)
    assert chance_overlap(everyone, 30) == pytest.approx(30 / 2499, rel=1e-12)
    shared = range(31)
    jaccard = sum(hypergeom(2499, 30, 30).pmf(m) * m / (60 - m) for m in shared)
    assert chance_overlap(everyone, 30, "jaccard") == pytest.approx(jaccard, rel=1e-6)  # SciPy's own digits


def test_unrelated_data_are_within_the_band() -> None:
    """60 pairs: 95 % of them, 4 standard deviations of a binomial allowed; the mean within 4 standard errors."""
    a, b = near(noise(60, 150, 10)), near(noise(60, 150, 10, seed=1))
    for score in ("overlap", "jaccard"):
        found = overlap(a, b, 10, score=score)  # type: ignore[arg-type]
        inside = sum(e.null_low <= e.value <= e.null_high for e in found)
        assert inside >= 60 * 0.95 - 4 * (60 * 0.95 * 0.05) ** 0.5
        measured = torch.tensor(values(found))
        assert float(measured.mean()) == pytest.approx(found[0].null, abs=4 * float(measured.std()) / 60**0.5)
    assert overlap(a, b, 10)[0].null == pytest.approx(10 / 149, rel=1e-12)


def test_the_interval_holds_the_expectation() -> None:
    """95 % intervals, wider rather than narrower: at least 54 of 60, and no more than 2.5 times too wide."""
    x = noise(60, 150, 20)
    a, b = near(x + 0.5 * noise(60, 150, 20, seed=1)), near(x + 0.5 * noise(60, 150, 20, seed=2))
    for found in (overlap(a, b, 10), label_overlap(a, (noise(150, seed=3) > 0).long(), 10)):
        measured = torch.tensor(values(found))
        assert sum(e.low <= float(measured.mean()) <= e.high for e in found) >= 54
        width = sum(e.high - e.low for e in found) / 60
        assert width < 2.5 * 2 * 2.2 * float(measured.std())


def test_whole_pictures_change_places() -> None:
    """Five samples of each picture are neighbors in any reps: chance is what re-paired pictures give, not k/(N-1)."""
    groups = torch.arange(100) // 5
    a, b = (near(noise(1, 20, 6, seed=s)[:, groups] + 0.1 * noise(1, 100, 6, seed=s + 9)) for s in (0, 1))
    plain, grouped = overlap(a, b, 10)[0], overlap(a, b, 10, groups=groups)[0]
    assert plain.value == grouped.value
    assert plain.value > plain.null_high + 0.2, "the samples of a picture find each other"
    assert grouped.null_low < grouped.value < grouped.null_high
    barred = [
        Neighbors.of(each, 64, groups=groups)
        for each in (Representations.of(noise(1, 100, 6)), Representations.of(noise(1, 100, 6, seed=1)))
    ]
    assert overlap(*barred, 10)[0].null == pytest.approx(10 / 95, rel=1e-12)
    assert overlap(a, b, 10, groups=torch.arange(100))[0].null == plain.null, "groups of one are no groups"


def test_matrix_holds_every_pair() -> None:
    x = noise(1, 70, 5)
    a = near(torch.cat([x, x + 0.5 * noise(1, 70, 5, seed=1), torch.ones(1, 70, 5)]))
    b = near(torch.cat([x + noise(1, 70, 5, seed=2), x]))
    matrix = overlap_matrix(a, b, 10)
    assert matrix.shape == (3, 2)
    for i, j in itertools.product(range(2), range(2)):
        one, other = alone(a, i), alone(b, j)
        assert float(matrix[i, j]) == pytest.approx(by_hand(one, other, 10)[0], abs=1e-6)
    assert matrix[2].isnan().all()
    assert overlap_matrix(b, a, 10)[:, 2].isnan().all()


def test_label_overlap_by_hand() -> None:
    a, labels = near(noise(1, 90, 4)), torch.arange(90) % 7 // 3
    same = [float((labels[row[:10].long()] == labels[i]).double().mean()) for i, row in enumerate(a.indices[0])]
    sizes = torch.bincount(labels)
    plain, balanced = label_overlap(a, labels, 10)[0], label_overlap(a, labels, 10, balanced=True)[0]
    assert plain.value == pytest.approx(sum(same) / 90, abs=1e-9)
    assert plain.null == pytest.approx(float((sizes * (sizes - 1)).sum()) / (90 * 89), rel=1e-12)
    per_class = [sum(s for s, c in zip(same, labels.tolist(), strict=True) if c == k) / int(sizes[k]) for k in range(3)]
    assert balanced.value == pytest.approx(sum(per_class) / 3, abs=1e-9)
    assert balanced.null == pytest.approx(sum((int(s) - 1) / 89 for s in sizes) / 3, rel=1e-12)
    assert label_overlap(a, labels + 100, 10)[0].value == plain.value, "names of classes do not matter"


def test_random_labels_are_within_the_band_and_true_ones_are_not() -> None:
    x = noise(40, 150, 10)
    found = label_overlap(near(x), (noise(150, seed=5) > 0.4).long(), 10)
    assert sum(e.null_low <= e.value <= e.null_high for e in found) >= 33  # 95 % of 40, less 4 standard deviations
    true = label_overlap(near(x[:1]), (x[0, :, 0] > 0.4).long(), 10)[0]
    assert true.low > true.null_high
    assert (
        label_overlap(near(x[:1]), torch.zeros(150), 10)[0].undefined == "one class: all samples carry the same label"
    )


def test_calibrated_scale() -> None:
    a, b = near(noise(1, 80, 5)), near(noise(1, 80, 5) + noise(1, 80, 5, seed=1))
    raw = overlap(a, b, 10)[0]
    scaled = adjust_for_chance(raw)
    assert scaled.value == pytest.approx((raw.value - 10 / 79) / (1 - 10 / 79))
    assert scaled.null == 0
    assert (scaled.low < scaled.value < scaled.high, scaled.n, scaled.k) == (True, 80, 10)
    assert adjust_for_chance(overlap(a, a, 10)[0]).value == 1
    assert adjust_for_chance(Estimate(0.5, n=10)).undefined


def test_pictures_of_unequal_size_have_no_chance_level() -> None:
    """12 pictures of 1 to 12 near copies: no re-pairing moves any, and chance would be the value itself."""
    groups = torch.repeat_interleave(torch.arange(12), torch.arange(1, 13))
    a, b = (near(noise(1, 12, 8, seed=s)[:, groups] + 0.1 * noise(1, 78, 8, seed=s + 2)) for s in (0, 1))
    found = overlap(a, b, 10, groups)[0]
    assert (found.null, found.null_low, found.null_high) == (None, None, None)
    assert found.notes[-1].endswith("100% of the samples would stay")
    assert overlap(a, b, 10)[0].null == pytest.approx(10 / 77)
