"""What sums a profile up: its peak, its plateau, and how much of its upper half trains."""

import torch

from lightning_mm.analysis.findings import Findings
from lightning_mm.analysis.summary import summarize_profile, summary_metrics
from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.block_influence import angular_distance, block_influence, row_cosine


def found(values: list[float | None], measure: str = "overlap", null: float = 0.1) -> Findings:
    findings = Findings(7)
    estimates = [
        Estimate.undefined_because("constant: all coincide", 50)
        if v is None
        else Estimate(v, n=50, low=v - 0.05, high=v + 0.05, null=null)
        for v in values
    ]
    findings.add("geometry", measure, "last", estimates)
    return findings


def test_peak_plateau_and_half_height() -> None:
    """Slices are embeddings, block 0, block 1, ...: the fourth value is block 2's."""
    brief = summarize_profile(found([None, 0.1, 0.45, 0.5, 0.48, 0.2, 0.5]).profile("overlap", "last"))
    assert brief is not None
    assert brief.peak_layer == 2  # of equals, the lower layer
    assert brief.plateau == (1, 3)
    assert brief.half == (1, 3)
    assert brief.share_trained([2, 3, 4]) == 2 / 3


def test_a_peak_that_chance_gives_has_no_plateau() -> None:
    findings = found([None, 0.1, 0.13, 0.11])
    brief = summarize_profile(findings.profile("overlap", "last"))
    assert brief is not None
    assert brief.plateau is None
    told = summary_metrics(findings, [0])
    assert told["inside/overlap/last/peak_clear"] == 0
    assert not any("plateau" in key for key in told)


def test_a_peak_is_judged_over_all_layers_where_that_is_known() -> None:
    """Its interval is apart from chance, as that of the best of many layers often is."""
    findings = Findings(0)
    estimates = [
        Estimate(v, n=50, low=v - 0.05, high=v + 0.05, null=0.5, p_adjusted=p) for v, p in ((0.5, 1), (0.6, 0.2))
    ]
    findings.add("probing", "objects", "last", estimates)
    brief = summarize_profile(findings.profile("objects", "last"))
    assert brief is not None
    assert brief.plateau is None
    assert summary_metrics(findings, [0])["inside/objects/last/peak_clear"] == 0


def test_drift_peaks_where_least_is_left() -> None:
    brief = summarize_profile(found([1.0, 1.0, 0.4, 0.8], "drift_overlap").profile("drift_overlap", "last"))
    assert brief is not None
    assert brief.peak_layer == 1


def test_an_undefined_profile_has_no_headline_and_no_metric() -> None:
    findings = found([None, None])
    assert summarize_profile(findings.profile("overlap", "last")) is None
    assert summary_metrics(findings, [0]) == {}


def test_metrics_are_those_of_the_vocabulary() -> None:
    told = summary_metrics(found([None, 0.1, 0.45, 0.5]), [1, 2])
    assert told["inside/overlap/last/peak_clear"] == 1
    assert told["inside/overlap/last/plateau_high"] == 2
    assert told["inside/overlap/last/peak_layer"] == 2
    assert told["inside/overlap/last/in_trained_range"] == 1.0


def test_block_influence_by_hand() -> None:
    """Turned by 90 degrees: cosine 0; stretched: cosine 1. 1e-6: float32 norms."""
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 3.0], [-1.0, 0.0]], [[0.0, 9.0], [-5.0, 0.0]]])
    influence = block_influence(x)
    assert influence[0].undefined
    assert [round(e.value or 0, 6) for e in influence[1:]] == [1, 0]
    assert abs((angular_distance(x)[1].value or 0) - 0.5) < 1e-6


def test_what_has_not_moved_has_cosine_one_exactly() -> None:
    x = torch.randn(4, 50, 33, generator=torch.Generator().manual_seed(0)) * 1e3
    assert [e.value for e in row_cosine(x, x)] == [1.0] * 4
    moved = row_cosine(x, x + 1e-3)[0].value
    assert moved is not None
    assert moved < 1
