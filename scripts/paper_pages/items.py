"""What a page is made of, and sentences about profiles that say what their intervals carry and no more.

Data flow: a folder that ``inspect``, ``trace`` or ``edit`` wrote -> ``Profile`` by layer -> ``Item``: what was
published, its counterpart here as charts and tables, and words.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_mm.core.layer_table import LayerRow, read_layers

Z = 1.96


@dataclass(frozen=True)
class Item:
    """One figure or table of a paper and its counterpart.

    Args:
        name: What it is called here, after what the paper calls it or shows.
        published: What the paper says, and where that is known from.
        words: What was found, in sentences.
        charts: SVG documents.
        tables: (head, rows) of text.
        files: Where the numbers are.
        deviations: What differs from the published protocol.
    """

    name: str
    published: str
    words: Sequence[str]
    charts: Sequence[str] = ()
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]] = ()
    files: Sequence[Path] = ()
    deviations: Sequence[str] = ()


@dataclass(frozen=True)
class Profile:
    """One measure at one site of one model, by layer; undefined layers are left out.

    Args:
        label: What it is called in charts and sentences.
        rows: Layer -> its row, of layers.csv.
    """

    label: str
    rows: Mapping[int, LayerRow] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def peak(self) -> LayerRow:
        """The highest value; the lower layer where two are equal."""
        return max(self.rows.values(), key=lambda row: (row.value or 0.0, -row.layer))

    @property
    def lowest(self) -> LayerRow:
        return min(self.rows.values(), key=lambda row: (row.value or 0.0, row.layer))

    @property
    def top(self) -> LayerRow:
        return self.rows[max(self.rows)]

    def depth(self, row: LayerRow) -> float:
        """Where a layer is: 0 the first block, 1 the last."""
        return max(0, row.layer) / max(1, max(self.rows))


class Readings:
    """The rows of a run's layers.csv.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.file = run, run / "layers.csv"
        self.rows = read_layers(self.file)[0]

    def profile(self, measure: str, site: str, label: str = "", step: int = 0) -> Profile:
        """A profile; empty where it was not measured or is undefined everywhere."""
        found = [r for r in self.rows if (r.measure, r.site, r.step) == (measure, site, step) and r.value is not None]
        return Profile(label or f"{measure} {site}", {row.layer: row for row in found})

    def matrix(self, measure: str, site: str, step: int = 0) -> dict[str, Any] | None:
        """A matrix of matrices.json; None where there is none."""
        file = self.run / "matrices.json"
        found = json.loads(file.read_text()) if file.is_file() else []
        wanted = (measure, site, step)
        return next((each for each in found if (each["measure"], each["site"], each["step"]) == wanted), None)


def told(row: LayerRow, null: str = "chance", digits: int = 3) -> str:
    """A value with its interval and its null.

    Args:
        row: The value.
        null: What its null is of, such as chance or isotropic noise.
        digits: Significant ones.
    """
    text = f"{row.value:.{digits}g}"
    if row.low is not None and row.high is not None:
        text += f" ({row.low:.{digits}g} to {row.high:.{digits}g})"
    return text + (f", {null} {row.null:.{digits}g}" if row.null is not None else "")


def error(row: LayerRow) -> float:
    """Standard error of a value, from its interval; infinite where it has none."""
    return math.inf if row.low is None or row.high is None else (row.high - row.low) / 2 / Z


def clear_of_null(row: LayerRow, tries: int) -> bool:
    """Whether a peak over so many layers is above its null: one-sided, 5 % over all of them (Bonferroni).

    The spread is the larger of the value's own and that of its chance band.
    """
    if row.value is None or row.null is None:
        return False
    band = 0.0 if row.null_high is None else (row.null_high - row.null) / Z
    spread = max(error(row), band)
    return bool(spread > 0) and upper_tail((row.value - row.null) / spread) * tries < 0.05


def differ(one: LayerRow, other: LayerRow, tries: int) -> bool:
    """Whether two values differ, as if they were independent, which is cautious for layers of one model."""
    gap = abs((one.value or 0.0) - (other.value or 0.0))
    spread = math.hypot(error(one), error(other))
    return math.isfinite(spread) and spread > 0 and 2 * upper_tail(gap / spread) * tries < 0.05


def upper_tail(z: float) -> float:
    """Probability that a standard normal number is larger."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def peak_words(profile: Profile) -> str:
    """Where a profile peaks, and whether that is clear of chance."""
    if not profile:
        return f"{profile.label}: not measured."
    peak, layers = profile.peak, len(profile.rows)
    clear = clear_of_null(peak, layers)
    sure = f"clear of chance over {layers} layers" if clear else f"not clear of chance over {layers} layers"
    where = "the embeddings" if peak.layer < 0 else f"layer {peak.layer} of {max(profile.rows) + 1}"
    return f"{profile.label}: highest at {where}, {told(peak)}; {sure}."


def drop_words(profile: Profile) -> str:
    """Whether a profile falls from its peak to the top layer."""
    if not profile:
        return ""
    peak, top = profile.peak, profile.top
    if peak.layer == top.layer:
        return f"{profile.label}: the peak is the top layer."
    fall = (peak.value or 0.0) - (top.value or 0.0)
    sure = "clear" if differ(peak, top, len(profile.rows)) else "within its error"
    return f"{profile.label}: from its peak to the top layer it falls by {fall:.3g}, {sure}."
