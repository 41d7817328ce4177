"""Summary of a measure's profile over the layers: where it peaks, how broad the peak is, how much of it trains.

Data flow: ``Findings`` -> ``ProfileSummary`` per measure and site -> metrics of the run, the printed summary.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lightning_mm.analysis.findings import Findings
from lightning_mm.core import metric_names
from lightning_mm.core.layer_table import LayerRow
from lightning_mm.core.measure_catalog import measure
from lightning_mm.core.peak_note import noted_peak_range

MAIN_PROFILES = (
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
class ProfileSummary:
    """One profile in brief; layer -1 is the embeddings.

    Args:
        peak_layer: Layer of the highest value, or of the lowest where ``measure_catalog.Measure.seek`` is min.
        peak: Its row.
        plateau: First and last layer of the run of layers around the peak whose intervals reach the peak's value; None
            where the peak is not clear of chance: a maximum that chance gives has no plateau.
        half: First and last layer of the run around the peak that keeps half of its height above chance (above the
            profile's lowest value where chance is not known).
    """

    peak_layer: int
    peak: LayerRow
    plateau: tuple[int, int] | None
    half: tuple[int, int]

    @property
    def peak_range(self) -> tuple[int, int] | None:
        """First and last layer that the peak may be at, in 95 % of resamples; None where that is not known."""
        return noted_peak_range(self.peak.notes)

    def share_trained(self, trained: Collection[int]) -> float:
        """Share of the half-height layers, embeddings left out, that train; 0 where it is the embeddings alone.

        Args:
            trained: The layers that train.
        """
        layers = [layer for layer in range(self.half[0], self.half[1] + 1) if layer >= 0]
        return sum(layer in set(trained) for layer in layers) / len(layers) if layers else 0.0


def summarize_profile(profile: Mapping[int, LayerRow]) -> ProfileSummary | None:
    """Peak, plateau and half-height range of a profile; None where no layer of it is defined.

    Args:
        profile: One measure at one site by layer, as ``Findings.profile`` returns it.
    """
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

    plateau = None
    if peak.is_clear is not False:
        plateau = _consecutive(peak_layer, {layer for layer in rows if reach(layer) >= height[peak_layer]})
    return ProfileSummary(peak_layer, peak, plateau, _consecutive(peak_layer, {x for x in rows if height[x] >= half}))


def summary_metrics(found: Findings, trained: Collection[int]) -> dict[str, float]:
    """Metrics of one inspection by key, only those that are defined.

    Args:
        found: What the inspection measured.
        trained: The layers that train.
    """
    metrics: dict[str, float] = {}
    for name, site in MAIN_PROFILES:
        summary = summarize_profile(found.profile(name, site))
        if summary is None or summary.peak.value is None:
            continue
        facts: dict[metric_names.LayerFact, float] = {
            "peak_layer": float(summary.peak_layer),
            "peak": summary.peak.value,
            "in_trained_range": summary.share_trained(trained),
        }
        if summary.plateau is not None:
            facts |= {"plateau_low": float(summary.plateau[0]), "plateau_high": float(summary.plateau[1])}
        if summary.peak.is_clear is not None:
            facts["peak_clear"] = float(summary.peak.is_clear)
        if summary.peak_range is not None:
            facts |= {"peak_low": float(summary.peak_range[0]), "peak_high": float(summary.peak_range[1])}
        metrics |= {metric_names.layer_metric(name, site, what): value for what, value in facts.items()}
    return metrics


def _consecutive(start: int, members: Collection[int]) -> tuple[int, int]:
    """First and last of the consecutive members around ``start``."""
    low = high = start
    while low - 1 in members:
        low -= 1
    while high + 1 in members:
        high += 1
    return low, high
