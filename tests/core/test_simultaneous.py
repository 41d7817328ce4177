"""Comparisons that are chosen among many: quantiles against SciPy, and how often equal profiles are told apart."""

import numpy as np
import pytest
from scipy import stats

from lightning_mm.core.estimate import Estimate
from lightning_mm.core.simultaneous import student_quantile, tell_apart


@pytest.mark.parametrize("dof", [11, 30, 200])
@pytest.mark.parametrize("tests", [1, 13, 32, 80])
def test_quantiles_as_scipy_has_them(dof: int, tests: int) -> None:
    assert student_quantile(dof, tests) == pytest.approx(stats.t.ppf(1 - 0.025 / tests, dof), rel=1e-3)


def test_a_difference_at_the_peak_is_not_found_by_choosing_it() -> None:
    """Two independent readings of equal layers: at the first's peak by chance in 5 % at most; 4 sd of 400 are 4.4 %."""
    draw, layers, found = np.random.default_rng(0), 31, {"chosen": 0, "any": 0, "unadjusted": 0}
    for _ in range(400):
        blocks = draw.standard_normal((2, 12, layers))
        value, half = blocks.mean(1), stats.t.ppf(0.975, 11) * blocks.std(1, ddof=1) / 12**0.5
        rows = [
            [Estimate.of(float(v), 12, low=float(v - h), high=float(v + h)) for v, h in zip(*side, strict=True)]
            for side in zip(value, half, strict=True)
        ]
        peak = int(value[0].argmax())
        found["chosen"] += tell_apart(rows[0][peak], rows[1][peak], layers)
        found["any"] += any(tell_apart(*pair, layers) for pair in zip(*rows, strict=True))
        found["unadjusted"] += tell_apart(rows[0][peak], rows[1][peak])
    assert found["chosen"] <= found["any"] <= 0.05 * 400 + 17
    assert found["unadjusted"] > 0.2 * 400


def test_what_has_no_interval_is_not_told_apart() -> None:
    known = Estimate.of(0.5, 9, low=0.4, high=0.6)
    assert not tell_apart(known, Estimate.of(9.0, 9))
    assert not tell_apart(Estimate.undefined_because("constant", 9), known)
    assert tell_apart(known, Estimate.of(9.0, 9, low=8.9, high=9.1), tests=32)
