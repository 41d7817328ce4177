"""How far each layer has moved from the starting model, on the same rows, picture and text apart.

Data flow: the first reading and a later one -> kNN overlap, CKA, Procrustes, cosine, dimension -> ``Findings``.
Where the weights below a layer have not moved, its representations are the same, and every measure says so exactly.
"""

import torch

from lightning_mm.analysis.findings import Findings
from lightning_mm.analysis.geometry import SITES, scales
from lightning_mm.analysis.hidden_states import Reading, shared
from lightning_mm.analysis.select_rows import select
from lightning_mm.core.estimate import Estimate
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.geometry.block_influence import row_cosine
from lightning_mm.geometry.cka import cka
from lightning_mm.geometry.dimension import gride
from lightning_mm.geometry.knn_overlap import overlap
from lightning_mm.geometry.neighbors import Neighbours
from lightning_mm.geometry.procrustes import procrustes
from lightning_mm.geometry.representations import Bank


def drift(start: Reading, now: Reading, probe_set: ProbeSet, k: int, device: torch.device) -> Findings:
    """Compare two readings of one probe set.

    Args:
        start: Of the starting model.
        now: Of the model as it is.
        probe_set: The rows of both.
        k: Neighbours; fewer where there are fewer than ten times as many samples.
        device: Where to compute.
    """
    found = Findings(now.step)
    start, now, left_out = shared(start, now)
    if left_out:
        found.problems.append(f"drift: {left_out} rows are in one of the two readings only, and are left out")
    for site, place in SITES.items():
        before, after = select(start, probe_set, place), select(now, probe_set, place)
        if before is None or after is None:
            found.problems.append(f"drift of {site}: it was not read at both times")
            continue
        groups = after.groups.to(device)
        a, b = Bank.of(before.features.to(device)), Bank.of(after.features.to(device))
        near_a, near_b = Neighbours.of(a), Neighbours.of(b)
        near = max(1, min(k, len(after) // 10))
        found.add("drift", "drift_overlap", site, overlap(near_a, near_b, near, groups))
        found.add("drift", "drift_cka", site, cka(a, b, groups))
        found.add("drift", "drift_procrustes", site, procrustes(a, b, groups))
        found.add("drift", "drift_cosine", site, row_cosine(before.features, after.features, after.groups))
        dimensions = (gride(each, *scales(len(after)), groups=groups) for each in (near_a, near_b))
        found.add("drift", "drift_id", site, _differences(*dimensions))
    return found


def _differences(before: list[Estimate], after: list[Estimate]) -> list[Estimate]:
    """After minus before, with the errors of both."""
    return [_difference(a, b) for a, b in zip(before, after, strict=True)]


def _difference(before: Estimate, after: Estimate) -> Estimate:
    if before.value is None or after.value is None:
        return Estimate.undefined_because(before.undefined or after.undefined, after.n)
    width = sum(((e.high - e.low) / 2) ** 2 for e in (before, after) if e.high is not None and e.low is not None) ** 0.5
    change = after.value - before.value
    return Estimate.of(change, after.n, low=change - width, high=change + width, null=0.0)
