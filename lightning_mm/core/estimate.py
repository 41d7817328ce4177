"""What a measurement says: its value, how sure it is, what chance would give, and on how much it rests.

Data flow: ``geometry`` and ``probes`` return Estimates, one per layer; ``analysis`` puts them in tables; the dashboards
draw them. A measurement that its data cannot support is ``undefined`` with the reason, never a made-up number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Estimate:
    """One measured number.

    Args:
        value: The number; None where it is undefined.
        low: Lower end of the 95 % interval; None where there is none.
        high: Upper end.
        null: What chance would give.
        null_low: Lower end of the band that 95 % of chance results fall in.
        null_high: Upper end.
        n: Samples it rests on.
        k: Neighbours, classes or components it was computed with; None where it has no such number.
        undefined: Why there is no value; empty where there is one.
        notes: What a reader must know: ties, duplicates, a fall-back.
    """

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    null: float | None = None
    null_low: float | None = None
    null_high: float | None = None
    k: int | None = None
    undefined: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert (self.value is None) == bool(self.undefined), "an estimate has a value or a reason for none"

    def noted(self, *notes: str) -> "Estimate":
        """The same with more notes; empty ones are left out."""
        return replace(self, notes=(*self.notes, *(note for note in notes if note)))


def undefined(reason: str, n: int) -> Estimate:
    """No number, and why.

    Example:
        >>> undefined("constant: all 240 samples coincide", 240).undefined
        'constant: all 240 samples coincide'
    """
    return Estimate(None, n, undefined=reason)


def finite(value: float, n: int, **rest: object) -> Estimate:
    """An estimate, or an undefined one if the number is not finite: no NaN passes for a measurement."""
    if not math.isfinite(value):
        return undefined(f"not finite: the computation gave {value}", n)
    kept = {key: None if isinstance(item, float) and not math.isfinite(item) else item for key, item in rest.items()}
    return replace(Estimate(value, n), **kept)  # type: ignore[arg-type]


def values(estimates: Sequence[Estimate]) -> list[float]:
    """The plain numbers, NaN where undefined: for arithmetic that skips them."""
    return [math.nan if estimate.value is None else estimate.value for estimate in estimates]
