"""The gap between modalities and the match of what belongs together."""

import pytest
import torch
from torch import Tensor

from lightning_mm.core.estimate import values
from lightning_mm.geometry.modality_gap import alignment, matched_cosine, modality_gap, swap_signs, token_cosine
from lightning_mm.geometry.representations import Representations

PAIRED = (alignment, matched_cosine, token_cosine)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.double(), dim=-1)


def test_by_hand() -> None:
    x, y = noise(1, 40, 6) + 0.5, noise(1, 40, 6, seed=1) + noise(1, 40, 6)
    a, b, u, v = Representations.of(x), Representations.of(y), unit(x[0]), unit(y[0])
    own = (u * v).sum(1)
    different = (u @ v.T)[~torch.eye(40, dtype=torch.bool)].mean()
    assert alignment(a, b)[0].value == pytest.approx(float((u - v).square().sum(1).mean()), abs=1e-6)
    assert matched_cosine(a, b)[0].value == pytest.approx(float(own.mean() - different), abs=1e-6)
    assert token_cosine(a, b)[0].value == pytest.approx(float(own.quantile(0.5)), abs=1e-6)
    gap = (u.mean(0) - v.mean(0)).norm()
    assert modality_gap(a, b)[0].value == pytest.approx(float(gap), abs=1e-6)
    within = torch.stack([torch.cdist(w, w).square().sum() / (40 * 39) for w in (u, v)]).mean().sqrt()
    assert modality_gap(a, b, relative=True)[0].value == pytest.approx(float(gap / within), abs=1e-6)


def test_identical_banks() -> None:
    a = Representations.of(noise(1, 50, 8))
    assert alignment(a, a)[0].value == pytest.approx(0, abs=1e-6)
    assert token_cosine(a, a)[0].value == pytest.approx(1, abs=1e-6)
    assert modality_gap(a, a)[0].value == 0
    assert matched_cosine(a, a)[0].low > 0.8


@pytest.mark.parametrize("measure", PAIRED)
def test_unrelated_banks_are_within_the_band(measure) -> None:  # type: ignore[no-untyped-def]
    """In a cone with a gap, which shifts the cosines but not what chance gives: 54 of 60 (95 % less 2 sd)."""
    found = measure(Representations.of(noise(60, 80, 10) + 1), Representations.of(noise(60, 80, 10, seed=1) - 0.5))
    assert sum(e.null_low <= e.value <= e.null_high for e in found) >= 51


def test_the_matched_cosine_sees_through_cone_and_gap() -> None:
    """A plain cosine of unrelated data in a narrow cone is 0.97; the difference from mismatched pairs is 0."""
    x, y = noise(1, 200, 30), noise(1, 200, 30, seed=1)
    unrelated = matched_cosine(Representations.of(x + 6), Representations.of(y + 6))[0]
    assert token_cosine(Representations.of(x + 6), Representations.of(y + 6))[0].value > 0.95
    assert unrelated.low < 0 < unrelated.high
    related = matched_cosine(Representations.of(x + 6), Representations.of(x + 0.5 * y + 6))[0]
    assert related.low > related.null_high


@pytest.mark.parametrize("measure", [*PAIRED, modality_gap, lambda a, b: modality_gap(a, b, relative=True)])
def test_intervals_hold_the_expectation(measure) -> None:  # type: ignore[no-untyped-def]
    """95 of 100, less 4 standard deviations; at most half too wide."""
    x = noise(100, 80, 12)
    found = measure(Representations.of(x + 0.3), Representations.of(x + noise(100, 80, 12, seed=1) - 0.3))
    mean = sum(values(found)) / 100
    assert sum(e.low <= mean <= e.high for e in found) >= 86
    assert sum(e.high - e.low for e in found) / 100 / 4 < 1.5 * float(torch.tensor(values(found)).std())


def test_the_matched_interval_knows_samples_that_fit_everything() -> None:
    """Samples near the axis of the cone match all others too: that is no news about the match of their own."""
    toward = torch.rand(100, 80, 1, generator=torch.Generator().manual_seed(3)) * 6
    found = matched_cosine(
        Representations.of(noise(100, 80, 12) + toward), Representations.of(noise(100, 80, 12, seed=1) + toward)
    )
    mean = sum(values(found)) / 100
    assert sum(e.low <= mean <= e.high for e in found) >= 86
    assert sum(e.high - e.low for e in found) / 100 / 4 < 1.3 * float(torch.tensor(values(found)).std())


def test_the_gap_of_one_law_is_at_its_null() -> None:
    found = modality_gap(Representations.of(noise(60, 100, 20)), Representations.of(noise(60, 100, 20, seed=1)))
    assert sum(e.null_low <= e.value <= e.null_high for e in found) >= 51
    apart = modality_gap(Representations.of(noise(1, 100, 20)), Representations.of(noise(1, 100, 20, seed=1) + 0.5))[0]
    assert apart.low > apart.null_high


def test_samples_of_one_picture_are_not_different() -> None:
    """Four captions of one picture agree among themselves: they are no example of a mismatch, nor of chance."""
    groups = torch.arange(120) // 4
    x = noise(1, 30, 8)[:, groups]
    a, b = (
        Representations.of(x + 0.1 * noise(1, 120, 8, seed=1)),
        Representations.of(x + 0.1 * noise(1, 120, 8, seed=2)),
    )
    plain, grouped = matched_cosine(a, b)[0], matched_cosine(a, b, groups=groups)[0]
    u, v = unit(a.features[0]), unit(b.features[0])
    mismatched = (u @ v.T)[groups[:, None] != groups].mean()
    assert grouped.value == pytest.approx(float((u * v).sum(1).mean() - mismatched), abs=1e-6)
    assert grouped.value > plain.value
    assert grouped.high - grouped.low > 1.5 * (plain.high - plain.low)
    assert matched_cosine(a, b, groups=torch.zeros(120))[0].undefined == "one group: no two samples are different"


def test_swaps_keep_groups_together() -> None:
    groups = torch.tensor([7, 7, 3, 3, 3, 9])
    signs = swap_signs(6, 200, groups, seed=0)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(signs[:, 0], signs[:, 1])
    assert torch.equal(signs[:, 2], signs[:, 4])
    assert not torch.equal(signs[:, 0], signs[:, 5])


def test_scale_does_not_matter() -> None:
    x, y = noise(1, 60, 6), noise(1, 60, 6, seed=1)
    for measure in (*PAIRED, modality_gap):
        scaled = measure(Representations.of(1e3 * x), Representations.of(1e-3 * y))[0].value
        assert scaled == pytest.approx(measure(Representations.of(x), Representations.of(y))[0].value, abs=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_to_any_power(alpha: float) -> None:
    x, y = noise(1, 40, 6), noise(1, 40, 6) + noise(1, 40, 6, seed=1)
    expected = (unit(x[0]) - unit(y[0])).norm(dim=1).pow(alpha).mean()
    assert alignment(Representations.of(x), Representations.of(y), alpha=alpha)[0].value == pytest.approx(
        float(expected), rel=1e-6
    )
    assert alignment(Representations.of(x), Representations.of(x), alpha=alpha)[0].value == 0


@pytest.mark.parametrize("groups", [None, torch.arange(12), torch.arange(12) // 2])
def test_random_partners_are_strangers(groups: Tensor | None) -> None:
    """Of 12 samples one meets itself in a random pairing, and would lend chance a twelfth of the match."""
    x = noise(30, 12, 400) + 1
    a = Representations.of(x)
    found = [measure(a, a, groups) for measure in (alignment, token_cosine)]
    cosine = torch.stack([unit(layer) @ unit(layer).T for layer in x])
    others = ~torch.eye(12, dtype=torch.bool) if groups is None else groups[:, None] != groups
    expected = float(cosine[:, others].mean())
    assert sum(e.null for e in found[0]) / 30 == pytest.approx(2 - 2 * expected, abs=0.01)
    assert sum(e.null for e in found[1]) / 30 == pytest.approx(expected, abs=0.01)


def test_the_median_of_chance_is_interpolated_as_that_of_the_value() -> None:
    """Cosines of 1 and -1, as many of each: the lower of the two in the middle would be -1, and chance below 0."""
    x = torch.tensor([1.0] * 6 + [-1.0] * 6)[None, :, None]
    y = torch.tensor(([1.0] * 3 + [-1.0] * 3) * 2)[None, :, None]
    nulls = torch.tensor(
        [token_cosine(Representations.of(x), Representations.of(y), seed=seed)[0].null for seed in range(20)]
    )
    assert float(nulls.mean()) == pytest.approx(0, abs=0.1)
