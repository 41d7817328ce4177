"""One measured number: its value, confidence interval, null (chance) level and sample count.

Data flow: ``geometry`` and ``probes`` return one ``Estimate`` per layer -> ``analysis.findings`` adds step, measure and
site, which makes each a ``layer_table.LayerRow`` -> layers.csv -> ``report``. A measurement that the data cannot
support has no value but a reason, never a made-up number.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

LEVEL = 0.05
"""Largest adjusted p-value of a value that is called clear of chance."""


@dataclass(frozen=True)
class Estimate:
    """One measured number. The order of the fields is that of the columns of layers.csv.

    Args:
        value: The number; None where it is undefined.
        low: Lower end of the 95 % confidence interval; None where there is none.
        high: Upper end of the 95 % confidence interval; None where there is none.
        null: Expected value under the null hypothesis (chance level); None where it is not known.
        null_low: Lower end of the band that holds 95 % of the null distribution; None where it is not known.
        null_high: Upper end of that band; None where it is not known.
        p_adjusted: Probability, if the null holds in all layers, of a value this far beyond it in any of them; None
            where it is not known.
        n: Number of samples; None only in rows of a file that does not say.
        k: Number of neighbors, classes or components it was computed with; None for a measure without such a number.
        undefined: Why there is no value; empty where there is one.
        notes: Caveats for the reader: ties, duplicates, a fallback.
    """

    value: float | None = None
    _: KW_ONLY
    low: float | None = None
    high: float | None = None
    null: float | None = None
    null_low: float | None = None
    null_high: float | None = None
    p_adjusted: float | None = None
    n: int | None = None
    k: int | None = None
    undefined: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert (self.value is None) == bool(self.undefined), "an estimate has a value or a reason for none"

    @classmethod
    def of(cls, value: float, n: int | None, **rest: float | tuple[str, ...] | None) -> "Estimate":
        """An estimate with a value; an undefined one if the value is not finite, so that no NaN is reported.

        Args:
            value: The number.
            n: Number of samples.
            **rest: The other fields; numbers that are not finite become None.
        """
        if not math.isfinite(value):
            return cls.undefined_because(f"not finite: the computation gave {value}", n)
        known = {
            key: None if isinstance(item, float) and not math.isfinite(item) else item for key, item in rest.items()
        }
        return cls(value, n=n, **known)  # type: ignore[arg-type]

    @classmethod
    def undefined_because(cls, reason: str, n: int | None) -> "Estimate":
        """An estimate without a value, and why (the field ``undefined``).

        Example:
            >>> Estimate.undefined_because("constant: all 240 samples coincide", 240).undefined
            'constant: all 240 samples coincide'
        """
        return cls(None, n=n, undefined=reason)

    @property
    def is_clear(self) -> bool | None:
        """Whether the value is clear of chance: over all layers together where that is known, else by itself.

        By itself it is clear where its interval and the band of the null are apart. None where there is no value, no
        null or no interval.
        """
        if self.value is None or self.null is None:
            return None
        if self.p_adjusted is not None:
            return self.p_adjusted <= LEVEL
        if self.low is None or self.high is None:
            return None
        null_low, null_high = (self.null if end is None else end for end in (self.null_low, self.null_high))
        return self.low > null_high or self.high < null_low

    def noted(self, *notes: str) -> "Estimate":
        """A copy with further notes; empty ones are left out."""
        return replace(self, notes=(*self.notes, *(note for note in notes if note)))


def values(estimates: Sequence[Estimate]) -> list[float]:
    """The values, NaN where undefined, for arithmetic that skips NaN."""
    return [math.nan if estimate.value is None else estimate.value for estimate in estimates]
