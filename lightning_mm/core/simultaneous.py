"""Whether two estimates differ where the comparison is one of many, such as at a layer that was chosen for its value.

Data flow: two ``Estimate`` with intervals -> ``tell_apart`` -> the report's change at a peak, and its comparison of
runs.
"""

import math
from statistics import NormalDist

from lightning_mm.core.estimate import Estimate

_DOF = 11
"""Degrees of freedom that the tails are taken of: 12 jackknife blocks, the fewest behind most intervals."""


def student_quantile(dof: int, tests: int = 1) -> float:
    """Quantile of Student's t at 1 - 0.025/tests: two-sided 5 % over all tests (Abramowitz and Stegun 26.7.5).

    Within 1 % for dof >= 2 and one test, within 0.1 % for dof >= 11 and up to 100 tests.

    Args:
        dof: Degrees of freedom.
        tests: Number of comparisons that hold together (Bonferroni).

    Example:
        >>> round(student_quantile(11), 2), round(student_quantile(11, tests=32), 2)
        (2.2, 4.17)
    """
    z = NormalDist().inv_cdf(1 - 0.025 / tests)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / dof**power for power, term in enumerate(terms))


def tell_apart(one: Estimate, other: Estimate, tests: int = 1) -> bool:
    """Whether two values differ at 5 %, over ``tests`` comparisons together; False where an interval is missing.

    The half widths that face each other add in squares, as for independent values; where both are of the same samples
    and alike, that is too wide. They are widened by the ratio of two quantiles of Student's t.

    Args:
        one: With its 95 % interval.
        other: With its 95 % interval.
        tests: Number of comparisons that one was or could have been chosen from: the layers of a profile, for its peak.

    Example:
        >>> first, second = Estimate(0.5, n=9, low=0.4, high=0.6), Estimate(0.7, n=9, low=0.6, high=0.8)
        >>> tell_apart(first, second), tell_apart(first, second, tests=32)
        (True, False)
    """
    if one.value is None or other.value is None:
        return False
    below, above = sorted((one, other), key=lambda each: each.value or 0.0)
    if below.high is None or above.low is None or below.value is None or above.value is None:
        return False
    reach = math.hypot(below.high - below.value, above.value - above.low)
    return above.value - below.value > reach * student_quantile(_DOF, tests) / student_quantile(_DOF)
