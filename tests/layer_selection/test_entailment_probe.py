"""The closed-form probe behind the entailment criterion: what it reads, and what it must not."""

import torch

from lightning_mm.layer_selection.entailment_probe import leave_group_out_accuracy


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
