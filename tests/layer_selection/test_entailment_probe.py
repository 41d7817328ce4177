"""The closed-form probe behind the entailment criterion: what it reads, and what it must not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_mm.core.estimate import Estimate
from lightning_mm.layer_selection import entailment_probe
from lightning_mm.layer_selection.entailment_probe import entailment_gains, leave_group_out_accuracy


def test_a_feature_that_is_constant_but_for_rounding_has_no_say() -> None:
    """Its rounding happens to spell the labels; scaled to variance 1 it would read them perfectly."""
    generator = torch.Generator().manual_seed(0)
    groups, labels = torch.arange(80) // 2, torch.arange(80) % 2
    plain = torch.randn(1, 80, 4, generator=generator)
    rounded = torch.full((1, 80, 1), 1000.0) + 6e-5 * labels[None, :, None]
    assert len(rounded.unique()) == 2
    found = leave_group_out_accuracy(torch.cat([plain, rounded], 2), labels, groups)[0]
    assert found == leave_group_out_accuracy(torch.cat([plain, torch.full_like(rounded, 7.0)], 2), labels, groups)[0]
    signal = plain + 3.0 * labels[None, :, None]
    assert leave_group_out_accuracy(signal, labels, groups)[0].low > 0.8


def test_layers_that_are_all_unsound_have_their_reasons() -> None:
    features = torch.ones(2, 40, 3)
    features[1, 0, 0] = torch.nan
    found = leave_group_out_accuracy(features, torch.arange(40) % 2, torch.arange(40) // 2)
    assert [one.undefined for one in found] == ["constant: all 40 samples coincide", "not finite: 1 of 40 samples"]


def gains(monkeypatch: pytest.MonkeyPatch, seed: int, strength: float) -> list[list[Estimate]]:
    """Of 48 pictures with a true and a false caption, in 6 slices that keep some of each other; signal in the last."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> torch.Tensor:
        shared = torch.randn(48, 32, generator=generator).repeat_interleave(2, 0)
        return shared + 0.7 * torch.randn(96, 32, generator=generator)

    slices = [drawn()]
    for _ in range(5):
        slices.append(0.7 * slices[-1] + 0.7 * drawn())
    labels, features = torch.arange(96) % 2, torch.stack(slices)
    features[-1, :, 0] += strength * (labels - 0.5)
    rows = [SimpleNamespace(sample=SimpleNamespace(images=n // 2), span=str(n)) for n in range(96)]
    chosen = SimpleNamespace(features=features, groups=torch.arange(96) // 2, rows=rows)
    monkeypatch.setattr(entailment_probe, "_entailment_rows", lambda inputs: (chosen, labels))
    inputs: Any = SimpleNamespace(probe_set=SimpleNamespace(rows=[]))
    return entailment_gains(inputs)


def test_a_gain_over_an_estimated_rival_is_told_at_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without signal no layer gains over the first block, and that over itself nothing, exactly."""
    first = [gains(monkeypatch, seed, 0.0)[1] for seed in range(20)]
    later = [e for one in first for e in one[2:]]
    # 80 estimates at 95 %: three standard deviations are 7 points.
    assert sum(e.low <= 0 <= e.high for e in later) / len(later) > 0.88
    assert all(one[1].value == one[1].low == one[1].high == 0 for one in first)


def test_a_layer_that_reads_captions_gains_over_both_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    by_heart, first = gains(monkeypatch, 0, 5.0)
    assert by_heart[-1].low > 0.1
    assert first[-1].low > 0.1
