"""Ridge against scikit-learn, against refits, and under what must not change it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SkRidge
from sklearn.linear_model import RidgeCV

from lightning_mm.probes.ridge import Ridge

PENALTIES = [0.01, 1.0, 30.0, 1000.0]


def data(n: int, d: int, layers: int = 2, targets: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_LND = torch.randn(layers, n, d, generator=generator, dtype=torch.float64) * 3 + 5
    weight_DC = torch.randn(d, targets, generator=generator, dtype=torch.float64)
    return x_LND, x_LND[0] @ weight_DC / d**0.5 + torch.randn(n, targets, generator=generator, dtype=torch.float64) + 2


@pytest.mark.parametrize(("n", "d"), [(60, 7), (25, 40), (30, 30)])
def test_equals_scikit_learn(n: int, d: int) -> None:
    # Both solve the same equations in float64: what is left is rounding.
    x_LND, y_NC = data(n, d)
    fitted = Ridge.fit(x_LND, y_NC, PENALTIES)
    new_LMD, _ = data(11, d, seed=1)
    for layer, x in enumerate(x_LND.numpy()):
        reference = RidgeCV(alphas=PENALTIES, store_cv_results=True).fit(x, y_NC.numpy())
        assert float(fitted.penalty[layer]) == reference.alpha_
        np.testing.assert_allclose(fitted.errors[layer], reference.cv_results_.mean((0, 1)), rtol=1e-8)
        np.testing.assert_allclose(fitted.weight[layer].T, reference.coef_, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(fitted.bias[layer], reference.intercept_, rtol=1e-8)
        np.testing.assert_allclose(fitted.predict(new_LMD)[layer], reference.predict(new_LMD[layer].numpy()), rtol=1e-8)


@pytest.mark.parametrize(("n", "d"), [(24, 5), (18, 40)])
def test_left_out_groups_equal_refits(n: int, d: int) -> None:
    x_LND, y_NC = data(n, d, layers=1)
    groups_N = torch.tensor([i * i % 7 for i in range(n)])
    fitted = Ridge.fit(x_LND, y_NC, [2.5], groups_N=groups_N)
    for group in groups_N.unique():
        out = (groups_N == group).numpy()
        refit = SkRidge(alpha=2.5).fit(x_LND[0].numpy()[~out], y_NC.numpy()[~out])
        expected = y_NC.numpy()[out] - refit.predict(x_LND[0].numpy()[out])
        np.testing.assert_allclose(fitted.loo_residuals[0][out], expected, rtol=1e-8, atol=1e-10)


def test_left_out_samples_are_groups_of_one() -> None:
    x_LND, y_NC = data(20, 6)
    alone = Ridge.fit(x_LND, y_NC, PENALTIES)
    grouped = Ridge.fit(x_LND, y_NC, PENALTIES, groups_N=torch.arange(20).flip(0))
    torch.testing.assert_close(alone.loo_residuals, grouped.loo_residuals, rtol=1e-10, atol=1e-12)


def test_within_groups_leave_one_out_leaks() -> None:
    # Two near copies of each picture with one random target: the copy tells the left-out sample's, other groups do not.
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(40, 60, generator=generator).repeat_interleave(2, 0)
    y_N1 = torch.randn(40, 1, generator=generator).repeat_interleave(2, 0)
    x_LND = (x_ND + 0.01 * torch.randn(80, 60, generator=generator))[None]
    leaking = Ridge.fit(x_LND, y_N1, [1.0])
    clean = Ridge.fit(x_LND, y_N1, [1.0], groups_N=torch.arange(80) // 2)
    variance = float(y_N1.var())
    assert float(leaking.errors) < 0.2 * variance
    assert float(clean.errors) > 0.8 * variance


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 20), d=st.integers(1, 20))
def test_rotations_and_order_change_nothing(seed: int, n: int, d: int) -> None:
    x_LND, y_NC = data(n, d, layers=1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    turn_DD = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    order_N = torch.randperm(n, generator=generator)
    plain = Ridge.fit(x_LND, y_NC, [0.5, 5.0])
    changed = Ridge.fit((x_LND @ turn_DD)[:, order_N], y_NC[order_N], [0.5, 5.0])
    # Condition numbers reach 1e4 here, float64 keeps 16 digits.
    torch.testing.assert_close(changed.loo_residuals, plain.loo_residuals[:, order_N], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(changed.predict(x_LND @ turn_DD), plain.predict(x_LND), rtol=1e-8, atol=1e-8)


def test_half_precision_and_autocast_give_float32_results() -> None:
    x_LND, y_NC = data(50, 8)
    exact = Ridge.fit(x_LND.half().double(), y_NC, PENALTIES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = Ridge.fit(x_LND.half(), y_NC, PENALTIES)
    assert half.weight.dtype == torch.float32
    torch.testing.assert_close(half.errors.double(), exact.errors, rtol=1e-4, atol=1e-6)


def test_constant_layer_predicts_the_mean() -> None:
    y_NC = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    fitted = Ridge.fit(torch.full((1, 12, 3), 7.0), y_NC, [1.0])
    torch.testing.assert_close(fitted.predict(torch.zeros(1, 4, 3)), y_NC.mean(0).expand(1, 4, 2))


@pytest.mark.parametrize("penalty", [1e-6, 1e-4, 1.0])
def test_more_features_than_samples_in_float32(penalty: float) -> None:
    """1 - h is 1e-8 here: residuals over it are those of float64, and no NaN is ever the best."""
    generator = torch.Generator().manual_seed(0)
    x_LND, y_NC = torch.randn(1, 50, 200, generator=generator), torch.randn(50, 1, generator=generator)
    reference = RidgeCV(alphas=[penalty], store_cv_results=True).fit(x_LND[0].double().numpy(), y_NC.double().numpy())
    for groups_N in (None, torch.arange(50)):
        fitted = Ridge.fit(x_LND, y_NC, [penalty, 100.0], groups_N=groups_N)
        assert float(fitted.errors[0, 0]) == pytest.approx(float(reference.cv_results_.mean()), rel=1e-4)
        assert float(fitted.penalty) == 100


def test_a_layer_that_is_not_finite_leaves_the_others_alone() -> None:
    x_LND, y_NC = data(20, 6)
    broken_LND = torch.cat([x_LND, x_LND[:1]])
    broken_LND[2, 3, 1] = torch.inf
    plain, found = Ridge.fit(x_LND, y_NC, PENALTIES), Ridge.fit(broken_LND, y_NC, PENALTIES)
    for name in ("weight", "bias", "penalty", "loo_residuals", "errors"):
        torch.testing.assert_close(getattr(found, name)[:2], getattr(plain, name), rtol=0, atol=0)
        assert getattr(found, name)[2].isnan().all()


def test_a_group_has_no_say_in_the_penalty_that_it_is_judged_by() -> None:
    """Each group's residual is at the penalty that is best for all others."""
    x_LND, y_NC = data(24, 5, layers=1, targets=1)
    groups_N = torch.arange(24) // 3
    fitted = Ridge.fit(x_LND, y_NC, PENALTIES, groups_N=groups_N)
    alone = [Ridge.fit(x_LND, y_NC, [penalty], groups_N=groups_N).loo_residuals[0] for penalty in PENALTIES]
    for group in range(8):
        others = [float(left_out[groups_N != group].square().sum()) for left_out in alone]
        chosen = alone[others.index(min(others))]
        torch.testing.assert_close(fitted.loo_residuals[0][groups_N == group], chosen[groups_N == group])
