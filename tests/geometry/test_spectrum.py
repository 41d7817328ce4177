"""Spectra: closed forms, NumPy's singular values, U-statistics by enumeration, isotropic noise, intervals."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mm.core.estimate import values
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.spectrum import (
    Spectrum,
    alpha_req,
    effective_rank,
    entropy,
    marchenko_pastur_eigenvalues,
    participation_ratio,
    rankme,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_eigenvalues(eigenvalues: Tensor, n: int) -> Tensor:
    """(1, N, R) float64, centered, whose covariance (over N) has exactly these eigenvalues."""
    basis = noise(n, len(eigenvalues)).double()
    basis = torch.linalg.qr(basis - basis.mean(0)).Q
    return (basis * (eigenvalues.double() * n).sqrt())[None] @ torch.linalg.qr(
        noise(*[len(eigenvalues)] * 2, seed=1).double()
    ).Q


def entropy_of(weights: np.ndarray) -> float:
    share = weights[weights > 0] / weights.sum()
    return float(-(share * np.log(share)).sum())


@pytest.mark.parametrize(("n", "d"), [(90, 20), (20, 90)])
def test_as_numpy_has_the_singular_values(n: int, d: int) -> None:
    x = noise(2, n, d) + 3 * noise(d, seed=1)
    reps = Representations.of(x)
    for layer, each in enumerate(x.double().numpy()):
        centered, raw = (np.linalg.svd(part, compute_uv=False) for part in (each - each.mean(0), each))
        spectrum = Spectrum.of(reps)
        assert effective_rank(spectrum)[layer].value == pytest.approx(math.exp(entropy_of(centered)), rel=1e-5)
        assert entropy(spectrum)[layer].value == pytest.approx(entropy_of(centered**2) / math.log(min(n, d)), rel=1e-5)
        shares = raw / raw.sum() + 1e-7
        assert rankme(reps)[layer].value == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
        biased = (centered**2).sum() ** 2 / (centered**4).sum()
        assert participation_ratio(reps, debiased=False)[layer].value == pytest.approx(biased, rel=1e-5)


def test_dataset_entropy_of_unit_rows() -> None:
    """Palacios et al.: centre, unit rows, eigenvalues of the Gram matrix; its negative entries are not clamped."""
    x = noise(1, 60, 12)
    unit = torch.nn.functional.normalize(Representations.of(x).centered[0].double(), dim=1).numpy()
    expected = entropy_of(np.linalg.svd(unit, compute_uv=False) ** 2) / math.log(12)
    assert entropy(Spectrum.of(Representations.of(x), unit_rows=True))[0].value == pytest.approx(expected, rel=1e-5)
    clamped = np.linalg.eigvalsh((unit @ unit.T).clip(min=0)).clip(min=0)
    assert abs(entropy_of(clamped) / math.log(12) - expected) > 0.1, "clamping entries would show"


def test_flat_single_and_decaying_spectra() -> None:
    flat, single = with_eigenvalues(torch.ones(16), 100), with_eigenvalues(torch.tensor([1.0]), 50)
    assert effective_rank(Spectrum.of(Representations.of(flat)))[0].value == pytest.approx(16, rel=1e-9)
    assert entropy(Spectrum.of(Representations.of(flat)))[0].value == pytest.approx(1, rel=1e-9)
    assert participation_ratio(Representations.of(flat), debiased=False)[0].value == pytest.approx(16, rel=1e-9)
    assert effective_rank(Spectrum.of(Representations.of(single)))[0].value == pytest.approx(1, rel=1e-9)
    assert participation_ratio(Representations.of(single), debiased=False)[0].value == pytest.approx(1, rel=1e-9)
    for alpha in (0.5, 1.0, 2.0):
        found = alpha_req(Spectrum.of(Representations.of(with_eigenvalues(torch.arange(1, 151.0) ** -alpha, 300))))[0]
        assert found.value == pytest.approx(alpha, rel=1e-6)
        assert found.notes == ("R^2 1.000 over eigenvalues 11 to 100",)


def test_the_range_of_the_line_matters_and_is_said() -> None:
    """True decay 1 in 4096 dimensions reads as 0.95 on the first 100 and far steeper on all."""
    x = noise(1, 400, 600) * torch.arange(1, 601.0) ** -0.5
    spectrum = Spectrum.of(Representations.of(x))
    first, whole = alpha_req(spectrum, 11, 60)[0], alpha_req(spectrum, 11, 399)[0]
    assert first.value == pytest.approx(1, abs=0.12)
    assert whole.value > first.value + 0.2
    short = alpha_req(Spectrum.of(Representations.of(noise(1, 60, 40))))[0]
    assert short.notes[0].endswith("11 to 40")
    assert alpha_req(Spectrum.of(Representations.of(noise(1, 60, 15))))[0].undefined.startswith(
        "too few: 15 eigenvalues"
    )
    assert alpha_req(Spectrum.of(Representations.of(noise(1, 60, 4) @ noise(4, 80))))[0].undefined.startswith(
        "too few: 4 "
    )


def test_participation_ratio_is_a_ratio_of_u_statistics() -> None:
    """Enumerated over all quadruples: E ||x1-x2||^2 ||x3-x4||^2 / 4 and E (x1-x2).(x3-x4) squared / 4."""
    x = noise(1, 7, 3).double()
    squared = Representations.of(x).squared_distances(0)
    traces, products = [], []
    for i, j, k, m in itertools.permutations(range(7), 4):
        traces.append(float(squared[i, j] * squared[k, m]) / 4)
        products.append(float(((x[0, i] - x[0, j]) @ (x[0, k] - x[0, m])) ** 2) / 4)
    assert participation_ratio(Representations.of(x))[0].value == pytest.approx(sum(traces) / sum(products), rel=1e-9)


def test_participation_ratio_of_noise() -> None:
    """Biased (N-1)D/(N-1+D), debiased D, both within 4 standard errors of 30 clouds."""
    reps = Representations.of(noise(30, 120, 80))
    for debiased, expected in ((False, 119 * 80 / 199), (True, 80.0)):
        found = participation_ratio(reps, debiased)
        assert found[0].null == pytest.approx(expected)
        measured = torch.tensor(values(found))
        assert float(measured.mean()) == pytest.approx(expected, abs=4 * float(measured.std()) / 30**0.5 + 0.1)


def test_isotropic_spectrum_gives_the_known_nulls() -> None:
    """Measured on noise, 2500 x 4096: participation 1551.8, effective rank 2263, von Neumann 1842."""
    expected = marchenko_pastur_eigenvalues(2500, 4096)
    assert float(expected.sum() ** 2 / expected.square().sum()) == pytest.approx(1551.8, rel=1e-3)
    assert math.exp(entropy_of(expected.sqrt().numpy())) == pytest.approx(2263, rel=1e-3)
    assert math.exp(entropy_of(expected.numpy())) == pytest.approx(1842, rel=1e-3)


@pytest.mark.parametrize(("n", "d"), [(200, 60), (80, 200)])
def test_noise_is_at_its_null(n: int, d: int) -> None:
    """The law is asymptotic: 1 % at these sizes, 10 % for the slope, which reads single eigenvalues."""
    reps = Representations.of(noise(1, n, d))
    spectrum = Spectrum.of(reps)
    for found in (effective_rank(spectrum), entropy(spectrum), rankme(reps)):
        assert found[0].value == pytest.approx(found[0].null, rel=0.01)
    assert alpha_req(spectrum, last=50)[0].value == pytest.approx(alpha_req(spectrum, last=50)[0].null, rel=0.1)


def test_scale_and_rotation_do_not_matter_and_place_only_to_rankme() -> None:
    x = noise(1, 80, 30).double() * torch.arange(1, 31.0) ** -0.5
    moved = 7 * x @ torch.linalg.qr(noise(30, 30, seed=1).double()).Q
    pairs = [(Representations.of(x), Representations.of(moved)), (Representations.of(x), Representations.of(moved + 5))]
    for a, b in pairs:
        for measure in (effective_rank, entropy, alpha_req):
            assert measure(Spectrum.of(b))[0].value == pytest.approx(measure(Spectrum.of(a))[0].value, rel=1e-9)
        assert participation_ratio(b)[0].value == pytest.approx(participation_ratio(a)[0].value, rel=1e-6)
    assert rankme(pairs[0][1])[0].value == pytest.approx(rankme(pairs[0][0])[0].value, rel=1e-9)
    assert rankme(pairs[1][1])[0].value < rankme(pairs[1][0])[0].value - 1


@pytest.mark.parametrize(("n", "d"), [(200, 60), (80, 150)])
def test_intervals_are_of_the_right_width(n: int, d: int) -> None:
    """Against the spread of 100 clouds with a decaying spectrum; the spread itself is known to a tenth."""
    reps = Representations.of(noise(100, n, d) * torch.arange(1, d + 1.0) ** -0.4)
    spectrum = Spectrum.of(reps)
    for found in (effective_rank(spectrum), entropy(spectrum), participation_ratio(reps), rankme(reps)):
        spread = float(torch.tensor(values(found)).std())
        width = sum(e.high - e.low for e in found) / 100 / (2 * 2.05)
        assert 0.7 < width / spread < 1.5


def test_groups_count_as_one() -> None:
    x = noise(1, 50, 20).repeat_interleave(4, 1) + 0.01 * noise(1, 200, 20, seed=1)
    groups = torch.arange(200) // 4
    plain, grouped = (effective_rank(Spectrum.of(Representations.of(x)), g)[0] for g in (None, groups))
    assert grouped.value == plain.value
    assert grouped.high - grouped.low == pytest.approx(2 * (plain.high - plain.low), rel=0.1)  # sqrt(4)
