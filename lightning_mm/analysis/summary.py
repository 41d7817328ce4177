"""The few numbers that sum up a layer profile: where it peaks, how broad that is, and how much of it trains.

Data flow: ``Findings`` -> ``Headline`` per measure and site -> metrics of the run, the printed summary.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lightning_mm.analysis.findings import Findings
from lightning_mm.core import metric_names
from lightning_mm.core.layer_table import LayerRow
from lightning_mm.core.measure_catalog import measure

MAIN = (
    ("entailment/random", "last"),
    ("entailment/hard", "last"),
    ("objects", "last"),
    ("objects", "image"),
    ("object_at_patches", "object"),
    ("global_minus_local", "last"),
    ("overlap", "last"),
    ("overlap", "image~text"),
    ("cka", "last"),
    ("cka", "image~text"),
    ("gap", "image~text"),
    ("gap_auc", "image~text"),
    ("id_gride", "picture"),
    ("drift_overlap", "picture"),
    ("drift_overlap", "text"),
)
"""The profiles whose peaks are logged as metrics: measure and site."""


@dataclass(frozen=True)
class Headline:
    """One profile in brief; layers are numbered as in ``Findings``.

    Args:
        peak_layer: Layer of the highest value, or the lowest, whichever is of interest (``measures.Measure.seek``).
        peak: Its row.
        plateau: First and last layer of the stretch around the peak whose intervals reach the peak's value.
        half: First and last layer of the stretch around the peak that keeps half of its height above chance (above
            the profile's lowest value where chance is not known).
    """

    peak_layer: int
    peak: LayerRow
    plateau: tuple[int, int]
    half: tuple[int, int]

    def share_trained(self, trained: Collection[int]) -> float:
        """Share of the half-height stretch, embeddings left out, that trains; 0 where it is the embeddings alone."""
        stretch = [layer for layer in range(self.half[0], self.half[1] + 1) if layer >= 0]
        return sum(layer in set(trained) for layer in stretch) / len(stretch) if stretch else 0.0


def headline(profile: Mapping[int, LayerRow]) -> Headline | None:
    """Sum up a profile; None where no layer of it is defined."""
    rows = {layer: row for layer, row in sorted(profile.items()) if row.value is not None}
    if not rows:
        return None
    sign = -1.0 if measure(next(iter(rows.values())).measure).seek == "min" else 1.0
    height = {layer: sign * value for layer, row in rows.items() if (value := row.value) is not None}
    peak_layer = max(height, key=lambda layer: (height[layer], -layer))
    peak = rows[peak_layer]
    floor = min(height.values()) if peak.null is None or sign < 0 else min(peak.null, height[peak_layer])
    half = floor + 0.5 * (height[peak_layer] - floor)

    def reach(layer: int) -> float:
        end = rows[layer].high if sign > 0 else rows[layer].low
        return height[layer] if end is None else sign * end

    plateau = _stretch(peak_layer, {layer for layer in rows if reach(layer) >= height[peak_layer]})
    return Headline(peak_layer, peak, plateau, _stretch(peak_layer, {x for x in rows if height[x] >= half}))


def scalars(found: Findings, trained: Collection[int]) -> dict[str, float]:
    """The metrics of one inspection: only those that are defined."""
    logged: dict[str, float] = {}
    for name, site in MAIN:
        brief = headline(found.profile(name, site))
        if brief is None or brief.peak.value is None:
            continue
        told: dict[metric_names.LayerFact, float] = {
            "peak_layer": float(brief.peak_layer),
            "peak": brief.peak.value,
            "plateau_low": float(brief.plateau[0]),
            "plateau_high": float(brief.plateau[1]),
            "in_trained_range": brief.share_trained(trained),
        }
        logged |= {metric_names.layer_metric(name, site, what): value for what, value in told.items()}
    return logged


def _stretch(start: int, members: Collection[int]) -> tuple[int, int]:
    """The run of consecutive members around ``start``."""
    low = high = start
    while low - 1 in members:
        low -= 1
    while high + 1 in members:
        high += 1
    return low, high
