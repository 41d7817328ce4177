"""I_dCor: the definition by loops of NumPy, its authors' cylinder, its null, its interval, and data without ratios."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mm.geometry.id_correlation import id_correlation
from lightning_mm.geometry.representations import Representations


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def two_nn(x: np.ndarray) -> float:
    """Facco et al. 2017: the line through the origin of -ln(1 - F) over ln(r2/r1), nine tenths of the samples."""
    ratios = []
    for i, row in enumerate(x):
        near = np.sort(np.linalg.norm(np.delete(x, i, 0) - row, axis=1))
        ratios.append(np.log(near[1] / near[0]))
    kept = np.sort(ratios)[: int(0.9 * len(x))]
    y = -np.log(1 - np.arange(1, len(kept) + 1) / len(x))
    return float(np.linalg.lstsq(kept[:, None], y, rcond=None)[0][0])


def test_as_defined() -> None:
    x, y = noise(2, 150, 5) * torch.tensor([1.0, 9.0, 0.1, 1.0, 1.0]) + 3, noise(2, 150, 3, seed=1)
    y[..., 0] += 2 * x[..., 0]
    found = id_correlation(Representations.of(x), Representations.of(y))
    for layer, each in enumerate(found):
        a, b = (z[layer].double().numpy() for z in (x, y))
        a, b = ((z - z.mean(0)) / z.std(0, ddof=1) for z in (a, b))
        first, second = two_nn(a), two_nn(b)
        expected = (first + second - two_nn(np.concatenate([a, b], 1))) / max(first, second)
        assert each.value == pytest.approx(expected, abs=2e-4)  # features come in float32
        assert each.low < expected < each.high  # type: ignore[operator]


def test_the_cylinder_of_its_authors() -> None:
    """Figure 1 of arXiv:2406.15812: of its surface, (x, y) has two dimensions and shares one with z: 0.5; (x, z) has
    one, and shares none with y. TwoNN is good to a tenth at 2,000 samples."""
    draw = torch.Generator().manual_seed(0)
    angle, y = 2 * torch.pi * torch.rand(2000, generator=draw), torch.rand(2000, generator=draw)
    x, z = angle.cos(), angle.sin()
    pairs = [(torch.stack([x, y], 1), z[:, None]), (torch.stack([x, z], 1), y[:, None])]
    shared, none = (id_correlation(Representations.of(p[None]), Representations.of(q[None]))[0] for p, q in pairs)
    assert shared.value == pytest.approx(0.5, abs=0.1)
    assert none.value == pytest.approx(0, abs=0.1)
    assert shared.value > shared.null_high  # type: ignore[operator]
    assert none.null_low < none.value < none.null_high  # type: ignore[operator]


def test_unrelated_data_lie_in_the_band_of_chance() -> None:
    """38 of 40 on average, less 4 binomial standard deviations; the intervals hold the mean as often."""
    found = id_correlation(Representations.of(noise(40, 100, 6)), Representations.of(noise(40, 100, 6, seed=1)))
    assert sum(e.null_low < e.value < e.null_high for e in found) >= 32  # type: ignore[operator]
    mean = sum(e.value or 0 for e in found) / 40
    assert sum(e.low < mean < e.high for e in found) >= 32  # type: ignore[operator]


def test_samples_in_one_place_have_no_dimension() -> None:
    copies = noise(1, 5, 3).repeat(1, 8, 1)
    found = id_correlation(Representations.of(copies), Representations.of(noise(1, 40, 3, seed=1)))[0]
    assert found.undefined == "too few: 0 distinct samples"
