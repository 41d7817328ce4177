"""The linear cut between modalities, against scikit-learn."""

import pytest
import torch
from scipy.stats import binomtest
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_mm.core.estimate import values
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.resampling import jackknife_blocks
from lightning_mm.geometry.separability import cross_val_ridge_scores, separability


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [12, 200])
def test_as_scikit_learn(width: int) -> None:
    """More rows than features and fewer: the same lines and areas, whatever the way they are solved."""
    x, y = noise(50, width).double(), (noise(50, width, seed=1) + 0.3).double()
    rows = torch.cat([x, y]) - (x.mean(0) + y.mean(0)) / 2
    target, parts = torch.tensor([-1.0] * 50 + [1.0] * 50).double(), jackknife_blocks(50, None, 5)
    penalty = float(rows.square().sum(1).mean())
    found = cross_val_ridge_scores(rows, target[:, None], parts, ridge=1.0)[:, 0]
    areas = 0.0
    for part in parts:
        test = torch.cat([part, 50 + part])
        train = torch.tensor([i for i in range(100) if i not in set(test.tolist())])
        line = Ridge(alpha=penalty, fit_intercept=False).fit(rows[train].numpy(), target[train].numpy())
        assert found[test].numpy() == pytest.approx(line.predict(rows[test].numpy()), abs=1e-4)
        areas += roc_auc_score(target[test].numpy(), line.predict(rows[test].numpy())) * len(part) / 50
    assert separability(Representations.of(x[None]), Representations.of(y[None]))[0].value == pytest.approx(
        areas, abs=1e-9
    )


@pytest.mark.parametrize("width", [10, 150])
def test_one_law_is_not_separable(width: int) -> None:
    """Also with more features than samples, where any training set parts perfectly: 95 % of 40, less 4 sd."""
    found = separability(Representations.of(noise(40, 60, width)), Representations.of(noise(40, 60, width, seed=1)))
    assert sum(e.null_low <= e.value <= e.null_high for e in found) >= 32
    measured = torch.tensor(values(found))
    assert float(measured.mean()) == pytest.approx(0.5, abs=4 * float(measured.std()) / 40**0.5)
    assert sum(e.low <= 0.5 <= e.high for e in found) >= 32


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("alike", [0.0, 0.8])
def test_the_interval_counts_the_training(alike: float, shift: float) -> None:
    """Also where both readings of a sample are alike: 114 of 120 intervals hold the mean, less 4 binomial sd."""
    shared = alike**0.5 * noise(120, 60, 12, seed=3)
    x, y = (shared + (1 - alike) ** 0.5 * noise(120, 60, 12, seed=seed) for seed in (4, 5))
    y[..., 0] += shift
    found = separability(Representations.of(x), Representations.of(y))
    mean = sum(values(found)) / 120
    assert sum(e.low <= mean <= e.high for e in found) >= 105


def test_a_gap_is_found_where_it_is() -> None:
    x, y = noise(2, 100, 40), noise(2, 100, 40, seed=1)
    y[1, :, 5] += 8
    mixed, parted = separability(Representations.of(x), Representations.of(y))
    assert mixed.low < 0.5 < mixed.high
    assert (parted.value, parted.high) == (pytest.approx(1, abs=1e-3), 1)
    assert parted.low > parted.null_high
    offset = separability(Representations.of(x[:1]), Representations.of(x[:1] + 0.001))[0]
    assert offset.value < 0.6, "an offset that is small against the spread is no cut"


def test_groups_stay_in_one_fold() -> None:
    """Copies of a picture in training and test would let a line know the test rows."""
    groups = torch.arange(120) // 6
    x = noise(1, 20, 200)[:, groups] + 0.01 * noise(1, 120, 200, seed=1)
    y = noise(1, 20, 200, seed=2)[:, groups] + 0.01 * noise(1, 120, 200, seed=3)
    leaking, sound = (
        separability(Representations.of(x), Representations.of(y))[0],
        separability(Representations.of(x), Representations.of(y), groups)[0],
    )
    assert leaking.value > 0.95
    assert sound.low < 0.5 < sound.high
    assert separability(Representations.of(x), Representations.of(y), torch.zeros(120))[0].undefined.startswith(
        "one group"
    )


@pytest.mark.parametrize("scale", [1e-3, 1e-4])
def test_a_gap_that_dwarfs_the_spread_with_more_features_than_rows(scale: float) -> None:
    """The Gram matrix of the rows has one eigenvalue of M and the rest below its rounding."""
    x, y = scale * noise(1, 300, 650), scale * noise(1, 300, 650, seed=1) + 1
    found = separability(Representations.of(x), Representations.of(y))[0]
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(binomtest(300, 300).proportion_ci(method="exact").low), "no fault in 300 trials"
    rows = torch.cat([x[0], y[0]]) - torch.cat([x[0], y[0]]).mean(0)
    target, parts = torch.tensor([-1.0] * 300 + [1.0] * 300)[:, None], jackknife_blocks(300, None, 5)
    exact = cross_val_ridge_scores(rows.double(), target.double(), parts, 1.0)
    assert cross_val_ridge_scores(rows, target, parts, 1.0).numpy() == pytest.approx(exact.numpy(), abs=1e-4)


@pytest.mark.parametrize("width", [12, 200])
def test_what_cannot_be_computed_is_told(width: int) -> None:
    """Squares beyond float32."""
    found = separability(
        Representations.of(1e25 * noise(1, 50, width)), Representations.of(1e25 * noise(1, 50, width, seed=1))
    )[0]
    assert found.undefined == "no line: the products of the rows overflow or lose their digits"
