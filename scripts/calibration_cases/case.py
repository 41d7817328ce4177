"""One simulated design: how its models are drawn, what the product says of each, and what is true.

Data flow: seed -> ``Case.draw`` -> made-up data -> ``Case.measure`` (functions of the product) -> ``Outcome``: one
``Reading`` per statistic -> ``records`` -> ``tally``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_mm.core.layer_table import LayerRow


@dataclass(frozen=True)
class Reading:
    """What the product says of one statistic of one model.

    Args:
        statistic: Name of the row in the table.
        value: The number; None where it is undefined.
        low: Lower end of its 95 % interval; None where there is none.
        high: Upper end.
        null: What chance gives, as told.
        null_low: Lower end of the band of chance; None where there is none.
        null_high: Upper end.
        truth: What the interval should cover, where that is known; None: the mean of the value over all models.
        profile: Name of the profile whose mean over all models, at ``layer``, is the truth; '' for ``truth``.
        layer: Index into that profile.
        found: Whether the product calls this something that is there; None where it says neither.
    """

    statistic: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    null: float | None = None
    null_low: float | None = None
    null_high: float | None = None
    truth: float | None = None
    profile: str = ""
    layer: int = 0
    found: bool | None = None


@dataclass(frozen=True)
class Outcome:
    """What the product says of one model.

    Args:
        readings: One per statistic.
        profiles: Values of all layers, for truths at a layer that each model chooses.
    """

    readings: list[Reading]
    profiles: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A design.

    Args:
        name: ``family/size/design/null`` or ``.../planted``: the last part says whether there is something to find.
        about: The design in words.
        draw: Seed -> the data of one model.
        measure: The data -> what the product says.
        rests_on: Rooms and modules of the package that the outcome depends on: where they change, it is drawn anew.
        is_small: Whether it takes about a second per model or less.
    """

    name: str
    about: str
    draw: Callable[[int], Any]
    measure: Callable[[Any], Outcome]
    rests_on: tuple[str, ...]
    is_small: bool = True

    @property
    def is_null(self) -> bool:
        """Whether there is nothing to find."""
        return self.name.endswith("/null")


def reading_of(row: LayerRow, statistic: str = "", **rest: Any) -> Reading:
    """The numbers of a row of layers.csv.

    Args:
        row: The row.
        statistic: Its name here; '' for that of the measure.
        **rest: Further fields.
    """
    numbers = {name: getattr(row, name) for name in ("value", "low", "high", "null", "null_low", "null_high")}
    found = None if row.value is None or row.null is None or row.low is None else is_clear(row)
    return Reading(statistic or row.measure, **numbers, **{"found": found, **rest})


def is_clear(row: LayerRow) -> bool:
    """Whether the product calls it clear of chance; where a row says nothing itself: interval and band lie apart."""
    told = getattr(row, "is_clear", None)
    if told is not None or row.null is None or row.low is None or row.high is None:
        return bool(told)
    null_low, null_high = (row.null if end is None else end for end in (row.null_low, row.null_high))
    return row.low > null_high or row.high < null_low
