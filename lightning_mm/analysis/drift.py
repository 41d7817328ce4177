"""How far each layer has moved from the starting model on the same rows, picture and text apart.

Data flow: ``HiddenStates`` before the first step and now -> kNN overlap, CKA, Procrustes, cosine and intrinsic
dimension -> ``Findings``. Where no weight below a layer has changed, its representations are equal and every measure is
exactly that of equal data.

Shapes: T slices (embeddings and blocks), N samples, D hidden size.
"""

import torch

from lightning_mm.analysis.findings import Findings
from lightning_mm.analysis.geometry import gride_scales, num_neighbors
from lightning_mm.analysis.hidden_states import SITES, HiddenStates, common_samples
from lightning_mm.analysis.select_rows import select_rows
from lightning_mm.core.estimate import Estimate
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.geometry.block_influence import row_cosine
from lightning_mm.geometry.cka import cka
from lightning_mm.geometry.intrinsic_dimension import gride
from lightning_mm.geometry.knn_overlap import overlap
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.procrustes import procrustes
from lightning_mm.geometry.representations import Representations


def measure_drift(
    start: HiddenStates, now: HiddenStates, probe_set: ProbeSet, k: int, device: torch.device
) -> Findings:
    """Similarity of every layer with itself in the starting model.

    Args:
        start: Hidden states of the starting model.
        now: Hidden states of the current model.
        probe_set: The rows of both.
        k: Number of neighbors; fewer where there are fewer than ten times as many samples.
        device: Where to compute.
    """
    found = Findings(now.step)
    start, now, left_out = common_samples(start, now)
    if left_out:
        found.problems.append(f"drift: {left_out} rows are in one of the two readings only, and are left out")
    for site, position in SITES.items():
        before, after = select_rows(start, probe_set, position), select_rows(now, probe_set, position)
        if before is None or after is None:
            found.problems.append(f"drift of {site}: it was not read at both times")
            continue
        groups = after.groups.to(device)
        a, b = Representations.of(before.features.to(device)), Representations.of(after.features.to(device))
        near_a, near_b = Neighbors.of(a), Neighbors.of(b)
        found.add("drift", "drift_overlap", site, overlap(near_a, near_b, num_neighbors(k, len(after)), groups))
        found.add("drift", "drift_cka", site, cka(a, b, groups))
        found.add("drift", "drift_procrustes", site, procrustes(a, b, groups))
        found.add("drift", "drift_cosine", site, row_cosine(before.features, after.features, after.groups))
        then, today = (gride(each, *gride_scales(len(after)), groups=groups) for each in (near_a, near_b))
        found.add("drift", "drift_id", site, [_difference(*pair) for pair in zip(then, today, strict=True)])
    return found


def _difference(before: Estimate, after: Estimate) -> Estimate:
    """After minus before; the squared half widths of both intervals add up."""
    if before.value is None or after.value is None:
        return Estimate.undefined_because(before.undefined or after.undefined, after.n)
    width = sum(((e.high - e.low) / 2) ** 2 for e in (before, after) if e.high is not None and e.low is not None) ** 0.5
    change = after.value - before.value
    return Estimate.of(change, after.n, low=change - width, high=change + width, null=0.0)
