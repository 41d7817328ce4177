"""Scores against scikit-learn and torchmetrics, with ties, absent classes, weights and strata."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics
from torchmetrics.functional import calibration_error as reference_calibration_error

from lightning_mm.probes import scores

K = 4


def predictions(n: int = 80, layers: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, N, K) log-probabilities and labels; the last class never occurs."""
    generator = torch.Generator().manual_seed(seed)
    log_p_LNK = torch.randn(layers, n, K, generator=generator, dtype=torch.float64).log_softmax(2)
    return log_p_LNK, torch.randint(K - 1, (n,), generator=generator)


def ranked(n: int = 60, layers: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, N) scores with many ties and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = (torch.rand(n, generator=generator) < 0.3).long()
    noise_LN = torch.randn(layers, n, generator=generator, dtype=torch.float64)
    return (2 * (noise_LN + labels_N)).round() / 2, labels_N


def test_scores_of_classes_equal_scikit_learn() -> None:
    log_p_LNK, labels_N = predictions()
    predicted_LN = log_p_LNK.argmax(2)
    for layer, predicted in enumerate(predicted_LN.numpy()):
        truth = labels_N.numpy()
        found = float(scores.accuracy(predicted_LN, labels_N)[layer])
        assert found == pytest.approx(metrics.accuracy_score(truth, predicted), rel=1e-12)
        found = float(scores.balanced_accuracy(predicted_LN, labels_N, K)[layer])
        recalls = metrics.recall_score(truth, predicted, average=None, labels=range(K - 1))
        assert found == pytest.approx(recalls.mean(), rel=1e-12)
        found = float(scores.macro_f1(predicted_LN, labels_N, K)[layer])
        assert found == pytest.approx(metrics.f1_score(truth, predicted, average="macro"), rel=1e-12)
        found = float(scores.nll(log_p_LNK, labels_N)[layer])
        expected = metrics.log_loss(truth, log_p_LNK[layer].exp().numpy(), labels=range(K))
        assert found == pytest.approx(expected, rel=1e-10)


def test_classes_that_neither_occur_nor_are_predicted_do_not_count() -> None:
    predicted_LN, labels_N = torch.tensor([[0, 1, 1, 0]]), torch.tensor([0, 1, 0, 0])
    for score in (scores.balanced_accuracy, scores.macro_f1):
        torch.testing.assert_close(score(predicted_LN, labels_N, 9), score(predicted_LN, labels_N, 2))


def test_calibration_error_equals_torchmetrics() -> None:
    log_p_LNK, labels_N = predictions(n=300)
    found = scores.calibration_error(log_p_LNK, labels_N)
    for layer, log_p_NK in enumerate(log_p_LNK):
        expected = reference_calibration_error(log_p_NK.exp(), labels_N, task="multiclass", num_classes=K, n_bins=15)
        # torchmetrics works in float32.
        assert float(found[layer]) == pytest.approx(float(expected), abs=1e-6)


def test_ranking_equals_scikit_learn_with_ties() -> None:
    scores_LN, labels_N = ranked()
    areas, precisions = scores.auroc(scores_LN, labels_N), scores.average_precision(scores_LN, labels_N)
    for layer, row in enumerate(scores_LN.numpy()):
        assert float(areas[layer]) == pytest.approx(metrics.roc_auc_score(labels_N.numpy(), row), rel=1e-12)
        expected = metrics.average_precision_score(labels_N.numpy(), row)
        assert float(precisions[layer]) == pytest.approx(expected, rel=1e-12)


def test_weights_are_repetitions() -> None:
    log_p_LNK, labels_N = predictions()
    scores_LN, truth_N = ranked(80)
    times_BN = torch.randint(0, 4, (5, 80), generator=torch.Generator().manual_seed(3)).double()
    predicted_LN = log_p_LNK.argmax(2)
    weighted = [
        scores.accuracy(predicted_LN, labels_N, times_BN),
        scores.balanced_accuracy(predicted_LN, labels_N, K, times_BN),
        scores.macro_f1(predicted_LN, labels_N, K, times_BN),
        scores.nll(log_p_LNK, labels_N, times_BN),
        scores.calibration_error(log_p_LNK, labels_N, times_BN),
        scores.auroc(scores_LN, truth_N, times_BN),
        scores.average_precision(scores_LN, truth_N, times_BN),
    ]
    for draw, times_N in enumerate(times_BN.long()):
        rows = torch.repeat_interleave(torch.arange(80), times_N)
        repeated = [
            scores.accuracy(predicted_LN[:, rows], labels_N[rows]),
            scores.balanced_accuracy(predicted_LN[:, rows], labels_N[rows], K),
            scores.macro_f1(predicted_LN[:, rows], labels_N[rows], K),
            scores.nll(log_p_LNK[:, rows], labels_N[rows]),
            scores.calibration_error(log_p_LNK[:, rows], labels_N[rows]),
            scores.auroc(scores_LN[:, rows], truth_N[rows]),
            scores.average_precision(scores_LN[:, rows], truth_N[rows]),
        ]
        for by_weight, by_row in zip(weighted, repeated, strict=True):
            torch.testing.assert_close(by_weight[:, draw], by_row, rtol=1e-10, atol=1e-12)


def test_only_pairs_of_a_stratum_are_ranked() -> None:
    scores_LN, labels_N = ranked(90)
    strata_N = torch.arange(90) % 3
    moved_LN = scores_LN + 100.0 * strata_N
    for score in (scores.auroc, scores.average_precision):
        plain = score(scores_LN, labels_N, None, strata_N)
        torch.testing.assert_close(score(moved_LN, labels_N, None, strata_N), plain)
        parts = [score(scores_LN[:, strata_N == s], labels_N[strata_N == s]) for s in range(3)]
        positives = torch.stack([labels_N[strata_N == s].sum() for s in range(3)]).double()
        pairs = positives * (30 - positives) if score is scores.auroc else positives
        expected = (torch.stack(parts) * (pairs / pairs.sum())[:, None]).sum(0)
        torch.testing.assert_close(plain, expected)


def test_what_nothing_can_be_said_about_is_nan() -> None:
    scores_LN, ones_N = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), torch.ones(5, dtype=torch.long)
    assert all(math.isnan(value) for value in scores.auroc(scores_LN, ones_N).tolist())
    assert all(math.isnan(value) for value in scores.auroc(scores_LN, 0 * ones_N).tolist())
    assert all(math.isnan(value) for value in scores.average_precision(scores_LN, 0 * ones_N).tolist())


def test_sizes_of_results() -> None:
    scores_LN, labels_N = ranked()
    assert scores.auroc(scores_LN, labels_N).shape == (3,)
    assert scores.auroc(scores_LN, labels_N, torch.ones(1, 60)).shape == (3, 1)
    assert np.isclose(scores.auroc(scores_LN, labels_N, torch.ones(2, 60))[0, 1], scores.auroc(scores_LN, labels_N)[0])


def test_information_is_the_entropy_that_the_probe_takes_away() -> None:
    """Xu et al. 2020, in bits; drawn samples have the entropy of the draw."""
    log_p_LNK, labels_N = predictions()
    shares = np.bincount(labels_N.numpy(), minlength=K) / len(labels_N)
    entropy = -sum(share * math.log2(share) for share in shares if share > 0)
    expected = [entropy - loss / math.log(2) for loss in scores.nll(log_p_LNK, labels_N).tolist()]
    assert scores.v_information(log_p_LNK, labels_N).tolist() == pytest.approx(expected, rel=1e-12)
    times_BN = torch.randint(0, 4, (3, 80), generator=torch.Generator().manual_seed(3)).double()
    for draw, times_N in enumerate(times_BN.long()):
        rows = torch.repeat_interleave(torch.arange(80), times_N)
        by_row = scores.v_information(log_p_LNK[:, rows], labels_N[rows])
        torch.testing.assert_close(scores.v_information(log_p_LNK, labels_N, times_BN)[:, draw], by_row)
    certain = torch.full((1, 80, K), -60.0).double().scatter(2, labels_N[None, :, None], 0.0)
    assert float(scores.v_information(certain, labels_N)) == pytest.approx(entropy, rel=1e-9)


def test_ranking_many_samples_takes_little_memory() -> None:
    """3000 of 6000 positives: all pairs would be 9 million numbers a layer and 72 MB; what is allocated is told."""
    generator = torch.Generator().manual_seed(0)
    scores_LN, labels_N = torch.randn(2, 6000, generator=generator), torch.arange(6000) % 2
    for score, reference in (
        (scores.auroc, metrics.roc_auc_score),
        (scores.average_precision, metrics.average_precision_score),
    ):
        with torch.profiler.profile(profile_memory=True) as profiled:
            found = score(scores_LN, labels_N)
        assert max(event.self_cpu_memory_usage for event in profiled.events()) < 1 << 20
        expected = [reference(labels_N.numpy(), row.numpy()) for row in scores_LN]
        assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_mid_ranks_equal_scipy() -> None:
    values = torch.randint(0, 6, (3, 2, 25), generator=torch.Generator().manual_seed(0)).float()
    assert scores.mid_ranks(values).tolist() == stats.rankdata(values.numpy(), axis=2).tolist()


def test_unweighted_ranking_is_that_of_weights_of_one() -> None:
    scores_LN, labels_N = ranked()
    ones, strata_N = torch.ones(len(labels_N), dtype=torch.float64), torch.arange(len(labels_N)) % 3
    for score in (scores.auroc, scores.average_precision):
        torch.testing.assert_close(
            score(scores_LN, labels_N, None, strata_N), score(scores_LN, labels_N, ones, strata_N)
        )


def test_each_row_may_have_labels_of_its_own() -> None:
    scores_LN, labels_N = ranked()
    labels_LN = torch.stack([labels_N, labels_N.roll(1), labels_N.roll(7)])
    for score in (scores.auroc, scores.accuracy, partial(scores.balanced_accuracy, num_classes=2)):
        given_LN = scores_LN if score is scores.auroc else (scores_LN > 0).long()
        alone = [score(given_LN[row : row + 1], labels)[0] for row, labels in enumerate(labels_LN)]
        torch.testing.assert_close(score(given_LN, labels_LN), torch.stack(alone))
