"""The failure predictor against scikit-learn, and on questions whose answers are foreseen or not."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lightning_mm.causal.effects.failure_predictor import _cross_scores, _risk, fit_l1, predict_failure
from lightning_mm.causal.questions.question import Question
from lightning_mm.probes.cross_validation import stratified_group_folds


def questions(groups: Sequence[str]) -> list[Question]:
    return [Question(f"q{i}", "What is it?", (Path("a.png"),), (), group=group) for i, group in enumerate(groups)]


def alone(count: int) -> list[Question]:
    return questions([""] * count)


@pytest.mark.parametrize("c", [0.05, 0.5, 5.0])
def test_weights_are_those_of_liblinear(c: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 25, generator=generator, dtype=torch.float64)
    right = (x[:, 0] - x[:, 3] + 0.5 * torch.randn(60, generator=generator) > 0.3).long()
    with_bias = torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], 1)
    own = fit_l1(with_bias, right, c)
    other = LogisticRegression(l1_ratio=1.0, solver="liblinear", C=c, tol=1e-10, max_iter=100000, random_state=0)
    other.fit(x.numpy(), right.numpy())
    expected = np.append(other.coef_[0], other.intercept_[0])
    np.testing.assert_allclose(own.numpy(), expected, atol=2e-4)
    assert (own == 0).sum() > 0, "L1 leaves features out"


def test_contributions_that_tell_are_found_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    right = torch.rand(80, generator=generator) < 0.6
    features = torch.randn(80, 30, generator=generator).abs()
    features[:, 7] += 3 * right
    noise = torch.rand(80, generator=generator)
    found = predict_failure(features, noise, right, alone(80))
    contributions, confidence = found.contributions, found.confidence
    assert contributions.value is not None
    assert contributions.value > 0.95
    assert contributions.low is not None
    assert contributions.low > 0.9
    assert confidence.low is not None
    assert confidence.high is not None
    assert confidence.low < 0.5 < confidence.high
    assert found.difference.low is not None
    assert found.difference.low > 0
    assert found.risk_contributions.value is not None
    assert found.risk_contributions.value < 0.05
    assert found.risk_contributions.null == pytest.approx(float((~right).double().mean()))
    assert 0 < found.kept < 30
    table = found.table()
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    reverse = predict_failure(torch.randn(80, 30, generator=generator), right + 0.1 * noise, right, alone(80))
    assert reverse.confidence.value == 1
    assert reverse.difference.high is not None
    assert reverse.difference.high < 0


def test_no_score_comes_from_a_regression_that_saw_the_answer() -> None:
    generator = torch.Generator().manual_seed(2)
    features, right = torch.randn(40, 5, generator=generator).double(), torch.arange(40) % 2
    part = stratified_group_folds(right, torch.arange(40), 2, 0)
    flipped = torch.where(part == 0, 1 - right, right)
    own, other = (_cross_scores(features, labels, part, 0.5)[0] for labels in (right, flipped))
    # Answers of the tested half do not matter to its scores.
    assert torch.equal(own[part == 0], other[part == 0])
    for half in (0, 1):
        assert (right[part == half].float().mean() - 0.5).abs() < 0.06, "halves have as many right answers"


def test_questions_about_one_picture_stay_together() -> None:
    generator = torch.Generator().manual_seed(3)
    picture = torch.arange(40) // 2
    right = (torch.arange(20) % 2 == 0)[picture]
    # Each picture has a feature of its own: whoever has seen it once knows its other question.
    features = torch.nn.functional.one_hot(picture).float() * (right[:, None] * 2 - 1)
    found = predict_failure(
        features, torch.rand(40, generator=generator), right, questions([str(int(p)) for p in picture])
    )
    assert found.contributions.value == pytest.approx(0.5, abs=0.15)


def test_equal_scores_are_trusted_alike() -> None:
    right, part = torch.tensor([1, 1, 0, 1, 0, 1, 0, 0, 1, 1] * 2), torch.arange(20) // 10
    weight = torch.ones(1, 20, dtype=torch.float64)
    assert float(_risk(torch.zeros(20).double(), right, weight, part)) == pytest.approx(0.4)
    ordered = -torch.arange(10).repeat(2).double()
    assert float(_risk(ordered, right, weight, part)) == 0
    assert float(_risk(-ordered, right, weight, part)) == 0
    ordered[[2, 12]] = 5
    assert float(_risk(ordered, right, weight, part)) == pytest.approx(0.5)


def test_confidence_is_scored_as_elsewhere() -> None:
    generator = torch.Generator().manual_seed(4)
    right = torch.rand(60, generator=generator) < 0.5
    known = torch.rand(60, generator=generator) + 0.3 * right
    found = predict_failure(torch.randn(60, 4, generator=generator), known, right, alone(60), splits=40)
    # Pairs are formed within halves; over many splits they are pairs of all.
    assert found.confidence.value == pytest.approx(roc_auc_score(right.numpy(), known.numpy()), abs=0.02)


@pytest.mark.parametrize(
    ("right", "why"),
    [
        ([True] * 20, "none of 20 answers is wrong"),
        ([False] * 20, "none of 20 answers is right"),
        ([True] * 17 + [False] * 3, "too few"),
    ],
)
def test_without_both_kinds_of_answers_nothing_is_said(right: list[bool], why: str) -> None:
    found = predict_failure(torch.randn(20, 3), torch.rand(20), torch.tensor(right), alone(20))
    for estimate in (found.contributions, found.confidence, found.difference, found.risk_contributions):
        assert estimate.undefined.startswith(why)
    assert all(row[2] is None and row[-1].startswith(why) for row in found.table()["rows"])


def test_features_that_never_vary_say_nothing() -> None:
    right = torch.arange(20) % 2 == 0
    found = predict_failure(torch.full((20, 3), math.pi), right.float(), right, alone(20))
    assert (found.contributions.value, found.kept) == (0.5, 0)
