"""The note of layers.csv that says between which layers the peak of a profile lies: written and read here.

Data flow: ``analysis`` notes it on the row of the peak -> layers.csv -> the report's headlines, the console, W&B.
"""

import re
from collections.abc import Iterable

PEAK_NOTE = re.compile(r"the peak is at layer (-?\d+) to (-?\d+)")


def peak_note(first: int, last: int) -> str:
    """What is noted; layer -1 is the embeddings.

    Example:
        >>> peak_note(-1, 3)
        'the peak is at layer -1 to 3 in 95 % of resamples'
    """
    return f"the peak is at layer {first} to {last} in 95 % of resamples"


def noted_peak_range(notes: Iterable[str]) -> tuple[int, int] | None:
    """First and last layer that the notes of a row give; None where they give none.

    Example:
        >>> noted_peak_range(("3 ties", peak_note(-1, 3)))
        (-1, 3)
    """
    found = PEAK_NOTE.search("; ".join(notes))
    return (int(found[1]), int(found[2])) if found else None
