"""The protocol: finds what is planted, claims nothing else, leaks nothing, and says why where it cannot tell."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from lightning_mm.core.estimate import Estimate, values
from lightning_mm.probes.cross_validation import stratified_group_folds
from lightning_mm.probes.logistic import fit_problems
from lightning_mm.probes.probe import Kind, probe
from lightning_mm.probes.result import ProbeResult

C_VALUES = [1e-3, 1e-2, 1e-1]


def noise(layers: int, n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(layers, n, d, generator=torch.Generator().manual_seed(seed))


def planted(strengths: list[float], n: int = 240, d: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two samples a group, one of each class; the class shows in one direction, with another strength in each layer."""
    labels_N = torch.arange(n) % 2
    x_LND = noise(len(strengths), n, d)
    x_LND[..., 0] += torch.tensor(strengths)[:, None] * (labels_N - 0.5)
    return x_LND, labels_N, torch.arange(n) // 2


def test_equals_a_loop_over_scikit_learn() -> None:
    x_LND, labels_N, groups_N = planted([0.0, 1.0, 3.0], n=600)
    result = probe(x_LND, labels_N, groups_N, kind="multinomial", c_values=C_VALUES, cross_fit=False)
    part, labels = stratified_group_folds(labels_N, groups_N, 5, 0).numpy(), labels_N.numpy()
    test, choice = part == 0, part == 1
    for layer, x in enumerate(x_LND.numpy()):
        scaler = StandardScaler().fit(x[~test & ~choice])
        losses = {}
        for c in C_VALUES:
            model = LogisticRegression(C=c, tol=1e-8).fit(scaler.transform(x[~test & ~choice]), labels[~test & ~choice])
            losses[c] = log_loss(labels[choice], model.predict_proba(scaler.transform(x[choice])))
        best = min(losses, key=lambda c: losses[c])
        assert float(result.c[layer, 0]) == best
        scaler = StandardScaler().fit(x[~test])
        model = LogisticRegression(C=best, tol=1e-8).fit(scaler.transform(x[~test]), labels[~test])
        scaled = scaler.transform(x[test])
        assert result.estimates[layer].value == pytest.approx(model.score(scaled, labels[test]), abs=1e-9)
        loss = log_loss(labels[test], model.predict_proba(scaled))
        # At the default tolerance probabilities are good to three digits.
        assert result.scores["nll"][layer].value == pytest.approx(loss, rel=3e-3)


def test_cross_fitting_tests_every_sample_once() -> None:
    x_LND, labels_N, groups_N = planted([1.0])
    result = probe(x_LND, labels_N, groups_N, kind="multinomial", c_values=[0.01])
    part, labels, right = stratified_group_folds(labels_N, groups_N, 5, 0).numpy(), labels_N.numpy(), 0
    for fold in range(5):
        scaler = StandardScaler().fit(x_LND[0].numpy()[part != fold])
        scaled = scaler.transform(x_LND[0].numpy())
        model = LogisticRegression(C=0.01, tol=1e-8).fit(scaled[part != fold], labels[part != fold])
        right += (model.predict(scaled) == labels)[part == fold].sum()
    # One sample at the very boundary may fall the other way at the default tolerance.
    assert result.estimates[0].value == pytest.approx(right / 240, abs=1.5 / 240)
    assert result.estimates[0].n == 240
    assert "5-fold cross-fitted, groups kept together" in result.estimates[0].notes


def test_labels_are_ranked_within_parts_as_scikit_learn_ranks_them() -> None:
    generator = torch.Generator().manual_seed(0)
    x_LND, groups_N = noise(2, 200, 20), torch.arange(200)
    labels_NK = (x_LND[1, :, :3] + torch.randn(200, 3, generator=generator) > 0.8).long()
    result = probe(x_LND, labels_NK, groups_N, kind="multilabel", c_values=[0.05])
    part = stratified_group_folds(labels_NK, groups_N, 5, 0).numpy()
    for layer, x in enumerate(x_LND.numpy()):
        areas = []
        for labels in labels_NK.T.numpy():
            won = pairs = 0.0
            for fold in range(5):
                train, test = part != fold, part == fold
                scaler = StandardScaler().fit(x[train])
                model = LogisticRegression(C=0.05, tol=1e-8).fit(scaler.transform(x[train]), labels[train])
                ranks = model.decision_function(scaler.transform(x[test]))
                count = labels[test].sum() * (1 - labels[test]).sum()
                won += roc_auc_score(labels[test], ranks) * count
                pairs += count
            areas.append(won / pairs)
        # A handful of close pairs may change places at the default tolerance: each is 1 in about 1000.
        assert result.estimates[layer].value == pytest.approx(np.mean(areas), abs=3e-3)


def test_rare_labels_are_called_above_their_frequency() -> None:
    # A label of one in ten that shows weakly is never likelier than its absence, but likelier than usual.
    labels_N = (torch.arange(400) % 10 == 0).long()
    x_LND = noise(1, 400, 4)
    x_LND[..., 0] += labels_N
    result = probe(x_LND, labels_N[:, None], torch.arange(400), kind="multilabel")
    # The best threshold between means 1 apart is right with probability Phi(1/2) = 0.69 on either side.
    assert result.scores["balanced_accuracy"][0].value == pytest.approx(0.69, abs=0.08)
    assert result.scores["average_precision"][0].null == pytest.approx(0.1)


def test_peak_is_where_the_signal_was_planted() -> None:
    x_LND, labels_N, groups_N = planted([0.0, 1.0, 4.0, 1.0, 0.0, 0.0])
    result = probe(x_LND, labels_N, groups_N, kind="multinomial")
    assert result.peak == (2, 2, 2)
    assert result.plateau == (2, 2)
    assert result.p_values[2] < 0.01, "the least that 200 draws can say is 0.005"
    assert min(result.p_values[0], result.p_values[4], result.p_values[5]) > 0.05
    assert result.plateau is not None
    assert [one.is_clear for one in result.estimates][::2] == [False, True, False]
    found = result.estimates[2]
    # The best classifier is right with probability Phi(2) = 0.977; the sd at 240 samples is 0.01.
    assert found.value == pytest.approx(0.977, abs=0.04)
    assert found.low < found.value < found.high
    assert (found.null, found.k) == (0.5, 2)


def test_peak_in_doubt_has_a_wide_interval() -> None:
    x_LND, labels_N, groups_N = planted([1.5])
    x_LND = x_LND + 0.3 * noise(6, 240, 24, seed=1)
    result = probe(x_LND, labels_N, groups_N, kind="multinomial")
    assert result.peak is not None
    assert result.peak[2] - result.peak[1] >= 2
    assert result.plateau is not None
    assert result.plateau[1] - result.plateau[0] >= 2, values(result.estimates)


def test_separable_classes_are_read_without_error_but_not_with_certainty() -> None:
    x_LND, labels_N, groups_N = planted([30.0], n=60)
    found = probe(x_LND, labels_N, groups_N, kind="multinomial").estimates[0]
    assert found.value == found.high == 1
    assert found.low == pytest.approx(0.025 ** (1 / 30))


def near_copies(groups: int, copies: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples of a group are alike and share a label that means nothing."""
    x_LND = noise(1, groups, 64).repeat_interleave(copies, 1)
    labels_N = torch.randint(2, (groups,), generator=torch.Generator().manual_seed(5)).repeat_interleave(copies)
    return (
        x_LND + 0.05 * noise(1, groups * copies, 64, seed=1),
        labels_N,
        torch.arange(groups).repeat_interleave(copies),
    )


def test_a_picture_is_never_learned_from_and_tested_on() -> None:
    x_LND, labels_N, groups_N = near_copies(60, 4)
    leaking = probe(x_LND, labels_N, torch.arange(240), kind="multinomial", c_values=[1.0]).estimates[0]
    clean = probe(x_LND, labels_N, groups_N, kind="multinomial", c_values=[1.0]).estimates[0]
    assert leaking.value > 0.9
    assert clean.null_low <= clean.value <= clean.null_high
    # 60 groups say less than 240 samples, and the band knows it: twice as wide, within the 5 % error of 200 draws each.
    assert clean.null_high - clean.null_low > 1.7 * (leaking.null_high - leaking.null_low)


@pytest.mark.parametrize("kind", ["multinomial", "multilabel"])
def test_random_labels_stay_in_the_chance_band(kind: Kind) -> None:
    outside = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        groups_N = torch.arange(80)
        labels = torch.rand(80, 4, generator=generator) < 0.3
        labels = labels.long() if kind == "multilabel" else labels[:, 0].long()
        (found,) = probe(noise(1, 80, 40, seed), labels, groups_N, kind=kind, seed=seed).estimates
        outside += not found.null_low <= found.value <= found.null_high
    # 1 of 20 is expected: 4 or more have probability 0.016 if the band holds 95 %.
    assert outside <= 4


def test_control_task_is_learned_where_types_recur_and_selectivity_tells() -> None:
    # 20 words in 300 contexts: a word's vector can be memorised, and its control label with it.
    words_N, groups_N = torch.arange(300) % 20, torch.arange(300)
    x_LND = torch.cat([noise(1, 20, 40)[:, words_N] + 0.1 * noise(1, 300, 40, seed=1), noise(1, 300, 40, seed=2)])
    labels_N = (words_N < 10).long()
    result = probe(x_LND, labels_N, groups_N, kind="multinomial", control=True, types_N=words_N)
    assert result.control is not None
    assert result.selectivity is not None
    assert result.estimates[0].value > 0.97
    assert result.control[0].value > 0.97
    assert abs(result.selectivity[0].value) < 0.03
    # Draws are paired: what is common to both tasks does not widen the interval.
    assert -0.05 < result.selectivity[0].low <= result.selectivity[0].value <= result.selectivity[0].high < 0.05
    one_part = probe(x_LND, labels_N, groups_N, kind="multinomial", control=True, types_N=words_N, cross_fit=False)
    assert one_part.control is not None
    assert one_part.control[0].n == 60
    assert one_part.control[0].value > 0.9
    by_group = probe(x_LND, labels_N, groups_N, kind="multinomial", control=True)
    assert by_group.control is not None
    assert by_group.selectivity is not None
    assert by_group.control[0].value < 0.65
    chosen = by_group.selectivity[0]
    assert chosen.low < chosen.value == pytest.approx(values(by_group.estimates)[0] - by_group.control[0].value)
    assert chosen.low > 0.25
    # Asking for a control does not change the probe.
    assert values(by_group.estimates) == values(result.estimates)


def test_compression_follows_what_can_be_read() -> None:
    x_LND, labels_N, groups_N = planted([0.0, 8.0])
    result = probe(x_LND, labels_N, groups_N, kind="multinomial", compression=True)
    assert result.compression is not None
    none, much = values(result.compression)
    assert none < 1.05
    assert much > 4


def everything(result: ProbeResult) -> list[Estimate]:
    lists = [*result.scores.values(), result.control, result.selectivity, result.compression]
    return [one for found in lists if found is not None for one in found]


def test_undefined_layers_do_not_disturb_the_others() -> None:
    x_LND, labels_N, groups_N = planted([2.0, 0.0, 2.0, 3.0])
    x_LND[1], x_LND[2, 7, 3] = 5.0, torch.nan
    result = probe(x_LND, labels_N, groups_N, kind="multinomial", control=True, compression=True)
    alone = probe(x_LND[[0, 3]], labels_N, groups_N, kind="multinomial", control=True, compression=True)
    for whole, part in zip(result.scores.values(), alone.scores.values(), strict=True):
        assert whole[1].undefined == "constant: all 240 samples coincide"
        assert whole[2].undefined == "not finite: 1 of 240 samples"
        assert values([whole[0], whole[3]]) == pytest.approx(values(part), abs=1e-4)
    assert [math.isnan(p) for p in result.p_values] == [False, True, True, False]
    assert result.draws.isnan().all(1).tolist() == [False, True, True, False]
    assert result.c.isnan().all(1).tolist() == [False, True, True, False]
    assert result.peak is not None
    assert result.peak[0] == 3


@pytest.mark.parametrize("kind", ["multinomial", "multilabel"])
@pytest.mark.parametrize("case", ["one class", "too few", "too rare", "all constant"])
def test_what_allows_no_probe_is_undefined_with_the_reason(kind: Kind, case: str) -> None:
    n = 8 if case == "too few" else 60
    labels_N = {"one class": torch.zeros(n), "too rare": (torch.arange(n) < 2)}.get(case, torch.arange(n) % 2).long()
    labels = labels_N if kind == "multinomial" else labels_N[:, None]
    x_LND = torch.ones(2, n, 5) if case == "all constant" else noise(2, n, 5)
    result = probe(x_LND, labels, torch.arange(n), kind=kind, control=True, compression=True)
    found = everything(result)
    assert len(found) == 2 * (len(result.scores) + 3)
    assert all(one.undefined.startswith(case.removeprefix("all ")) for one in found)
    assert result.peak is None
    assert result.plateau is None


def test_few_pictures_are_enough() -> None:
    x_LND, labels_N, groups_N = planted([5.0], n=48)
    found = probe(x_LND, labels_N, groups_N, kind="multinomial", control=True, compression=True)
    assert found.estimates[0].value > 0.8
    assert found.estimates[0].null_high > 0.65


def test_rare_labels_are_left_out_aloud() -> None:
    x_LND, labels_N, groups_N = planted([3.0])
    labels_N = labels_N.clone()
    labels_N[:3] = 9
    result = probe(x_LND, labels_N, groups_N, kind="multinomial")
    assert result.estimates[0].n == 237
    assert any(note.startswith("left out: 3 samples") for note in result.estimates[0].notes)


def test_many_samples_are_tested_on_one_part() -> None:
    x_LND, labels_N, groups_N = planted([1.0], n=1200)
    found = probe(x_LND, labels_N, groups_N, kind="multinomial").estimates[0]
    assert found.n == 240
    assert "tested on one part in 5, groups kept together" in found.notes


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_scale_shift_and_order_change_nothing(seed: int) -> None:
    x_LND, labels_N, groups_N = planted([1.0, 2.0], n=80, d=8)
    generator = torch.Generator().manual_seed(seed)
    order_N, order_D = torch.randperm(80, generator=generator), torch.randperm(8, generator=generator)
    scale_D = torch.exp(2 * torch.randn(8, generator=generator))
    moved_LND = (x_LND * scale_D + 3 * torch.randn(8, generator=generator))[:, order_N][..., order_D]
    plain = probe(x_LND, labels_N, groups_N, kind="multinomial")
    moved = probe(moved_LND, labels_N[order_N], groups_N[order_N], kind="multinomial")
    for name, found in plain.scores.items():
        # At the default tolerance one sample at the boundary may fall the other way.
        assert values(moved.scores[name]) == pytest.approx(values(found), abs=0.02), name


def test_the_same_call_gives_the_same_numbers_whatever_surrounds_it() -> None:
    x_LND, labels_N, groups_N = planted([1.0, 2.0])
    plain = probe(x_LND, labels_N, groups_N, kind="multinomial", control=True, compression=True)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = probe(
            x_LND.clone().requires_grad_(), labels_N, groups_N, kind="multinomial", control=True, compression=True
        )
    torch.set_rng_state(state)
    assert everything(again) == everything(plain)
    assert torch.equal(again.draws, plain.draws)
    other = probe(x_LND, labels_N, groups_N, kind="multinomial", seed=1)
    assert everything(other) != everything(probe(x_LND, labels_N, groups_N, kind="multinomial"))


def test_half_precision_features_are_read_in_single() -> None:
    x_LND, labels_N, groups_N = planted([2.0])
    half = probe(x_LND.bfloat16(), labels_N, groups_N, kind="multinomial")
    single = probe(x_LND.bfloat16().float(), labels_N, groups_N, kind="multinomial")
    assert everything(half) == everything(single)
    assert torch.equal(x_LND, planted([2.0])[0])


def test_results_do_not_depend_on_threads_or_blocks() -> None:
    x_LND, labels_N, groups_N = planted([0.0, 1.0, 2.0, 3.0, 0.5])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = probe(x_LND, labels_N, groups_N, kind="multinomial", control=True, compression=True)
        torch.set_num_threads(2)
        together = probe(x_LND, labels_N, groups_N, kind="multinomial", control=True, compression=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together.c, alone.c)
    assert together.draws.shape == alone.draws.shape
    assert together.p_values == pytest.approx(alone.p_values, abs=0.05)
    # Two threads cut five layers into blocks of three: sums may be rounded otherwise, and a close sample turn.
    for name, row in alone.scores.items():
        assert values(together.scores[name]) == pytest.approx(values(row), abs=0.005), name


@pytest.mark.parametrize("compression", [False, True])
def test_probes_that_have_not_converged_are_told(monkeypatch: pytest.MonkeyPatch, compression: bool) -> None:
    x_LND, labels_N, groups_N = planted([0.0, 3.0])
    sound = probe(x_LND, labels_N, groups_N, kind="multinomial", c_values=[1.0], compression=compression)
    assert not any("converged" in note for one in sound.estimates for note in one.notes)
    for module in ("cross_validation", "description_length"):
        monkeypatch.setattr(f"lightning_mm.probes.{module}.fit_problems", partial(fit_problems, max_steps=1))
    hurried = probe(
        x_LND, labels_N, groups_N, kind="multinomial", c_values=[1.0], control=True, compression=compression
    )
    for row in (hurried.estimates, hurried.scores["nll"], hurried.control, hurried.selectivity, hurried.compression):
        assert row is None or all("of the probes have not converged" in one.notes[-1] for one in row)


def test_information_is_beside_the_other_scores() -> None:
    x_LND, labels_N, groups_N = planted([0.0, 6.0], n=400)
    none, most = probe(x_LND, labels_N, groups_N, kind="multinomial").scores["information"]
    assert none.null == most.null == 0
    assert none.low < 0.05
    assert 0.8 < most.low < most.value < most.high < 1.05
