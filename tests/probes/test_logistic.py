"""Batched logistic regression against scikit-learn, and under what must not change it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lightning_mm.probes import logistic
from lightning_mm.probes.batched_lbfgs import minimize
from lightning_mm.probes.cross_entropy import LogisticProblems, ProbeFeatures
from lightning_mm.probes.logistic import LinearProbes, fit_multilabel, fit_multinomial, fit_problems

C_VALUES = [1e-3, 1e-1, 10.0]

WEIGHTS = 1e-5
"""A gradient of 1e-9 * C * n, at a curvature of at least 1, leaves 1.2e-6; scikit-learn's share is of the same size."""


def data(
    classes: int, n: int = 120, d: int = 30, layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features with a steep spectrum and classes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    scale_D = 3.0 / torch.arange(1, d + 1, dtype=dtype)
    x_LND = torch.randn(layers, n, d, generator=generator, dtype=dtype) * scale_D
    score_NK = x_LND.mean(0) @ torch.randn(d, classes, generator=generator, dtype=dtype)
    labels_N = (score_NK + torch.randn(n, classes, generator=generator, dtype=dtype)).argmax(1)
    labels_N[:classes] = torch.arange(classes)
    return x_LND, labels_N


def with_constant(x_LND: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x_LND, (0, 1), value=1.0)


def objective(weight_HE: torch.Tensor, x_ND: torch.Tensor, labels_N: torch.Tensor, c: float) -> float:
    """C * cross-entropy + half the squared norm, in float64."""
    z_NH = with_constant(x_ND.double()) @ weight_HE.double().T
    z_NK = torch.cat([torch.zeros_like(z_NH), z_NH], 1) if z_NH.shape[1] == 1 else z_NH
    loss = torch.nn.functional.cross_entropy(z_NK, labels_N, reduction="sum")
    return float(c * loss + weight_HE[:, :-1].double().square().sum() / 2)


def scikit_learn(x_ND: torch.Tensor, labels_N: torch.Tensor, c: float) -> tuple[LogisticRegression, torch.Tensor]:
    model = LogisticRegression(C=c, tol=1e-10, max_iter=20000).fit(x_ND.double().numpy(), labels_N.numpy())
    return model, torch.tensor(np.concatenate([model.coef_, model.intercept_[:, None]], 1))


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_double_precision_reaches_the_optimum_of_scikit_learn(classes: int) -> None:
    x_LND, labels_N = data(classes)
    test_LMD, _ = data(classes, n=400, seed=1)
    probes = fit_multinomial(x_LND, labels_N, C_VALUES, tolerance=1e-9)
    assert probes.converged.all()
    predicted_LPM = probes.log_probabilities(with_constant(test_LMD)).argmax(3)
    for layer, x_ND in enumerate(x_LND):
        for index, c in enumerate(C_VALUES):
            model, weight_HE = scikit_learn(x_ND, labels_N, c)
            ours = objective(probes.weight[layer, index], x_ND, labels_N, c)
            # A gradient of 1e-9 leaves an error of its square: rounding of the sums is all that is seen.
            assert ours == pytest.approx(objective(weight_HE, x_ND, labels_N, c), rel=1e-10)
            assert ours == pytest.approx(float(probes.objective[layer, index]), rel=1e-10)
            assert (predicted_LPM[layer, index].numpy() == model.predict(test_LMD[layer].numpy())).all()


@pytest.mark.parametrize("classes", [2, 5])
def test_single_precision_comes_within_its_digits(classes: int) -> None:
    x_LND, labels_N = data(classes, dtype=torch.float32)
    probes = fit_multinomial(x_LND, labels_N, C_VALUES, tolerance=1e-5)
    assert probes.weight.dtype == torch.float32
    assert probes.converged.all()
    for index, c in enumerate(C_VALUES):
        _, weight_HE = scikit_learn(x_LND[0], labels_N, c)
        best = objective(weight_HE, x_LND[0], labels_N, c)
        assert objective(probes.weight[0, index], x_LND[0], labels_N, c) == pytest.approx(best, rel=1e-6)


def test_labels_are_independent_problems() -> None:
    x_LND, labels_N = data(4)
    labels_NK = torch.nn.functional.one_hot(labels_N)
    probes = fit_multilabel(x_LND, labels_NK, C_VALUES, tolerance=1e-9)
    weight_LVKE = probes.weight[:, :, 0].unflatten(1, (len(C_VALUES), 4))
    for index, c in enumerate(C_VALUES):
        for label in range(4):
            _, weight_HE = scikit_learn(x_LND[1], labels_NK[:, label], c)
            torch.testing.assert_close(weight_LVKE[1, index, label], weight_HE[0], rtol=0, atol=WEIGHTS)


def test_each_problem_standardises_with_its_own_training_rows() -> None:
    x_LND, labels_N = data(3, n=90)
    x_LND = x_LND * torch.logspace(-3, 3, 30, dtype=torch.float64) + 100
    x_LND[..., 4] = 7.0
    train_PN = torch.stack([torch.arange(90) % 3 != part for part in range(3)])
    features = ProbeFeatures.of(x_LND, standardize=True)
    problems = LogisticProblems(labels_N.expand(3, -1), train_PN, torch.full((1, 3), 0.05, dtype=torch.float64), 3)
    log_p_LPNK = fit_problems(features, problems, standardize=True, tolerance=1e-9).log_probabilities(features.x)
    for part, train_N in enumerate(train_PN.numpy()):
        scaler = StandardScaler().fit(x_LND[0].numpy()[train_N])
        scaled = scaler.transform(x_LND[0].numpy())
        model = LogisticRegression(C=0.05, tol=1e-10, max_iter=20000).fit(scaled[train_N], labels_N.numpy()[train_N])
        # Weights agree to about 1e-7, the root of the objective's digits.
        np.testing.assert_allclose(log_p_LPNK[0, part], model.predict_log_proba(scaled), rtol=1e-5, atol=1e-6)


def test_large_means_cost_no_digits() -> None:
    # A rogue dimension of size 1e4 with a spread of 1 has four digits less in float32; the probe must not lose more.
    x_LND, labels_N = data(2, dtype=torch.float32)
    shifted_LND = x_LND.double() + 1e4 * (torch.arange(30) == 3)
    plain, shifted = (ProbeFeatures.of(x.float(), standardize=True) for x in (x_LND, shifted_LND))
    problems = LogisticProblems(labels_N[None], torch.ones(1, 120, dtype=torch.bool), torch.tensor([[0.1]]), 1)
    found = [fit_problems(one, problems, standardize=True).log_probabilities(one.x) for one in (plain, shifted)]
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)


def test_how_work_is_cut_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x_LND, labels_N = data(3, layers=5)
    whole = fit_multinomial(x_LND, labels_N, C_VALUES, tolerance=1e-9)
    monkeypatch.setattr(logistic, "_COLUMNS", {"cpu": 1})
    monkeypatch.setattr(logistic, "_FEATURE_BYTES", {"cpu": 1})
    cut = fit_multinomial(x_LND, labels_N, C_VALUES, tolerance=1e-9)
    torch.testing.assert_close(cut.weight, whole.weight, rtol=0, atol=WEIGHTS)
    torch.testing.assert_close(cut.objective, whole.objective, rtol=1e-10, atol=0)


def test_c_may_differ_between_layers() -> None:
    x_LND, labels_N = data(2)
    features, everything = ProbeFeatures.of(x_LND, standardize=False), torch.ones(1, 120, dtype=torch.bool)
    mixed = LogisticProblems(labels_N[None], everything, torch.tensor([[0.01], [1.0]], dtype=torch.float64), 1)
    found = fit_problems(features, mixed, standardize=False, tolerance=1e-9)
    for layer, c in enumerate((0.01, 1.0)):
        alone = fit_multinomial(x_LND[layer : layer + 1], labels_N, [c], tolerance=1e-9)
        torch.testing.assert_close(found.objective[layer], alone.objective[0], rtol=1e-10, atol=0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 4))
def test_order_of_features_and_samples_changes_nothing(seed: int, classes: int) -> None:
    x_LND, labels_N = data(classes, n=40, d=12, layers=1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows_N, columns_D = torch.randperm(40, generator=generator), torch.randperm(12, generator=generator)
    plain = fit_multinomial(x_LND, labels_N, [0.1], tolerance=1e-10)
    changed = fit_multinomial(x_LND[:, rows_N][..., columns_D], labels_N[rows_N], [0.1], tolerance=1e-10)
    torch.testing.assert_close(changed.weight[..., :-1], plain.weight[..., columns_D], rtol=1e-6, atol=1e-7)


def probes_of_noise() -> LinearProbes:
    x_LND, labels_N = data(3, dtype=torch.float32)
    return fit_multinomial(x_LND, labels_N, C_VALUES)


def test_surroundings_neither_matter_nor_change() -> None:
    plain, state = probes_of_noise(), torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        inside = probes_of_noise()
    assert torch.equal(inside.weight, plain.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not plain.weight.requires_grad


def test_one_class_and_separable_classes_stop() -> None:
    # Without a finite optimum for the bias, or with a distant one, the gradient still falls below the tolerance.
    x_LND = torch.arange(20.0)[None, :, None] - 9.5
    for labels_N in (torch.ones(20, dtype=torch.long), (torch.arange(20) > 9).long()):
        probes = fit_multilabel(x_LND, labels_N[:, None], [1e-3, 1e3])
        assert probes.converged.all()
        assert probes.weight.isfinite().all()
        predicted_LPN = probes.logits(with_constant(x_LND))[..., 0] > 0
        assert (predicted_LPN == labels_N).all()


def test_a_problem_that_does_not_stop_says_so() -> None:
    x_LND, labels_N = data(2)
    features = ProbeFeatures.of(x_LND, standardize=False)
    problems = LogisticProblems(labels_N[None], torch.ones(1, 120, dtype=torch.bool), torch.tensor([[10.0]]), 1)
    found = fit_problems(features, problems, standardize=False, tolerance=1e-9, max_steps=3)
    assert not found.converged.any()
    assert (found.steps == 3).all()


def test_minimize_solves_quadratics_and_stops_each_on_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    root_BMM = torch.randn(4, 6, 6, generator=generator, dtype=torch.float64)
    hessian_BMM, target_BM = root_BMM @ root_BMM.mT + torch.eye(6), torch.randn(4, 6, generator=generator).double()

    def evaluate(point_BM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gradient_BM = (hessian_BMM @ (point_BM - target_BM)[..., None])[..., 0]
        return ((point_BM - target_BM) * gradient_BM).sum(1) / 2, gradient_BM

    start_BM = torch.zeros_like(target_BM)
    start_BM[0] = target_BM[0] + 1e-13
    found = minimize(evaluate, start_BM, lambda g: g.clone(), tolerance=1e-10, max_steps=200)
    assert found.converged.all()
    assert int(found.steps[0]) == 0
    assert torch.equal(found.point[0], start_BM[0])
    assert (found.steps[1:] > 3).all()
    torch.testing.assert_close(found.point, target_BM, rtol=0, atol=1e-9)


def test_minimize_leaves_a_problem_that_cannot_fall_where_it_is() -> None:
    asked = []

    def evaluate(point_BM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The first problem's gradient lies: no step along it falls.
        asked.append(point_BM)
        sign_B1 = torch.tensor([[-1.0], [1.0]])
        return point_BM.square().sum(1), 2 * point_BM * sign_B1

    found = minimize(evaluate, torch.ones(2, 3), lambda g: g.clone(), tolerance=1e-6, max_steps=50)
    assert found.converged.tolist() == [False, True]
    # Once no step is found, none is sought again. It may rise by as much as values are rounded.
    assert len(asked) < 60
    torch.testing.assert_close(found.point[0], torch.ones(3), rtol=0, atol=1e-4)
