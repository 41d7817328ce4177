"""CKA from sums equals CKA of everything at once, in any order, on any number of ranks."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lightning_mm.core.estimate import values
from lightning_mm.geometry.cka import cka, cka_biased, cka_matrix
from lightning_mm.geometry.hsic import hsic
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.streaming import MinibatchCKA, StreamingCKA


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(layers: int = 3, n: int = 90, features: int = 20, other: int = 30) -> tuple[Tensor, Tensor]:
    """More and fewer features than samples, means far from zero, an uneven spectrum."""
    x = noise(layers, n, features) * torch.linspace(0.1, 3, features) + 5
    y = noise(layers, n, other, seed=1) + 0.5 * x[..., :1] - 2
    return x, y


def stream(metric: StreamingCKA | MinibatchCKA, x: Tensor, y: Tensor, size: int) -> None:
    for a, b in zip(x.split(size, 1), y.split(size, 1), strict=True):
        metric.update(a, b)


@pytest.mark.parametrize("size", [1, 7, 90])
@pytest.mark.parametrize("features", [20, 200])
def test_one_pass_is_exact(size: int, features: int) -> None:
    """1e-10 in float64."""
    x, y = pair(features=features)
    metric = StreamingCKA(3, features, 30)
    stream(metric, x, y, size)
    expected = cka(Representations.of(x), Representations.of(y))
    assert metric.compute().tolist() == pytest.approx(values(expected), abs=1e-10)
    for found, whole in zip(metric.estimates(), expected, strict=True):
        assert found.value == pytest.approx(whole.value, abs=1e-10)
        assert (found.n, found.null) == (90, 0.0)
        # The skewness of the band is read from the covariance here, from the U-centered Gram matrix there.
        assert (found.null_low, found.null_high) == pytest.approx((whole.null_low, whole.null_high), rel=0.05)


def test_the_order_of_the_samples_does_not_matter() -> None:
    x, y = pair()
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    there, back = StreamingCKA(3, 20, 30), StreamingCKA(3, 20, 30)
    stream(there, x, y, 16)
    stream(back, x[:, order], y[:, order], 13)
    torch.testing.assert_close(there.compute(), back.compute(), atol=1e-12, rtol=0)


def test_half_precision_is_summed_in_float64() -> None:
    """As if the rounded numbers had been given in float64, under autocast too."""
    x, y = (z.bfloat16() for z in pair())
    metric = StreamingCKA(3, 20, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream(metric, x, y, 16)
    assert metric.compute().tolist() == pytest.approx(
        values(cka(Representations.of(x.double()), Representations.of(y.double()))), abs=1e-10
    )


def test_an_origin_saves_the_digits_that_a_far_mean_costs() -> None:
    """All features 1e5 from zero: float64 sums of fourth powers keep nothing, and that is told."""
    x, y = pair()
    expected = values(cka(Representations.of(x), Representations.of(y)))
    far = StreamingCKA(3, 20, 30)
    stream(far, x + 1e5, y + 1e5, 16)
    assert far.compute().isnan().all()
    near = StreamingCKA(3, 20, 30, origin=x[:, 0] + 1e5, other_origin=y[:, 0] + 1e5)
    stream(near, x + 1e5, y + 1e5, 16)
    assert near.compute().tolist() == pytest.approx(expected, abs=1e-8)  # 1e5 itself costs the input five digits


def test_a_layer_without_structure_is_undefined_beside_sound_ones() -> None:
    x, y = pair(n=20)
    x[0] = 3.3
    x[1] = torch.eye(20)
    metric = StreamingCKA(3, 20, 30)
    stream(metric, x, y, 7)
    assert metric.compute().isnan().tolist() == [True, True, False]
    assert [bool(estimate.undefined) for estimate in metric.estimates()] == [True, True, False]


def test_too_few_samples() -> None:
    metric = StreamingCKA(3, 20, 30)
    metric.update(*(z[:, :3] for z in pair()))
    assert metric.compute().isnan().all()
    assert "too few: 3" in metric.estimates()[0].undefined


def test_a_single_layer_works() -> None:
    x, y = (z[:1] for z in pair())
    metric = StreamingCKA(1, 20, 30)
    stream(metric, x, y, 30)
    assert metric.estimates()[0].value == pytest.approx(float(metric.compute()), abs=1e-12)


def test_reset_forgets() -> None:
    x, y = pair()
    metric = StreamingCKA(3, 20, 30)
    stream(metric, y[..., :20], y, 30)
    metric.reset()
    stream(metric, x, y, 30)
    assert metric.compute().tolist() == pytest.approx(
        values(cka(Representations.of(x), Representations.of(y))), abs=1e-10
    )


def test_minibatches_sum_the_three_terms_before_they_are_divided() -> None:
    """Nguyen et al. 2020: from the HSIC_1 of the batches; one batch is exact."""
    x, y = pair()
    metric = MinibatchCKA(3, 3)
    stream(metric, x, y, 30)
    one = MinibatchCKA(3, 3)
    one.update(x, y)
    torch.testing.assert_close(
        one.compute(), cka_matrix(Representations.of(x), Representations.of(y)), atol=1e-10, rtol=0
    )
    terms = torch.zeros(3, 3, dtype=torch.float64)
    for a, b in zip(x.split(30, 1), y.split(30, 1), strict=True):
        k, m = a @ a.mT, b @ b.mT
        terms += torch.stack([hsic(k, m), hsic(k, k), hsic(m, m)])
    expected = terms[0] / (terms[1] * terms[2]).sqrt()
    torch.testing.assert_close(metric.compute().diagonal(), expected, atol=1e-10, rtol=0)


def test_the_mean_of_biased_cka_over_batches_says_0_94_of_unrelated_data_and_the_sum_ratio_0() -> None:
    """Batches of 8, many features: the trap of averaging CKA. The sum-ratio is 0 within 3 sd of its own band."""
    x, y = noise(1, 800, 100), noise(1, 800, 100, seed=1)
    metric = MinibatchCKA(1, 1)
    stream(metric, x, y, 8)
    averaged = [
        values(cka_biased(Representations.of(a), Representations.of(b)))[0]
        for a, b in zip(x.split(8, 1), y.split(8, 1), strict=True)
    ]
    assert sum(averaged) / 100 == pytest.approx(0.937, abs=0.01)
    (estimate,) = metric.estimates()
    assert abs(estimate.value or 0) < 3 * math.sqrt(2 / (8 * 5) / 100)
    assert estimate.null_high == pytest.approx(1.96 * math.sqrt(2 / (8 * 5) / 100), rel=0.05)


def test_batches_too_small_are_told() -> None:
    x, y = pair(n=33)
    metric = MinibatchCKA(3, 3)
    stream(metric, x, y, 10)
    estimate = metric.estimates()[0]
    assert estimate.n == 30
    assert estimate.notes == ("3 samples skipped, in batches of fewer than 4",)


def test_a_constant_layer_is_undefined_in_minibatches() -> None:
    x, y = pair()
    x[1] = 0.1
    metric = MinibatchCKA(3, 3)
    stream(metric, x, y, 30)
    assert metric.compute().isnan().all(1).tolist() == [False, True, False]
    assert metric.estimates()[1].undefined


def _one_of_two(rank: int, folder: str) -> None:
    """A rank sees 50 or 40 of the 90 samples and writes what it computes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, y = (z[:, :50] if rank == 0 else z[:, 50:] for z in pair())
    exact, estimate = StreamingCKA(3, 20, 30), MinibatchCKA(3, 3)
    stream(exact, x, y, 10)
    stream(estimate, x, y, 10)
    found = {
        "exact": exact.compute(),
        "again": torch.tensor(values(exact.estimates())),
        "batched": estimate.compute(),
        "n": torch.tensor([exact.estimates()[0].n, estimate.estimates()[0].n]),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)
    x, y = pair()
    exact, estimate = StreamingCKA(3, 20, 30), MinibatchCKA(3, 3)
    stream(exact, x, y, 10)
    stream(estimate, x, y, 10)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["exact"], exact.compute(), atol=1e-12, rtol=0)
        torch.testing.assert_close(found["again"], exact.compute().float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(found["batched"], estimate.compute(), atol=1e-12, rtol=0)
        assert found["n"].tolist() == [90, 90]


def test_samples_that_are_not_finite_are_counted() -> None:
    x, y = pair()
    x[1, 5, 2], y[1, 70, 0], y[2, 3, 0] = math.nan, math.inf, math.nan
    exact, estimate = StreamingCKA(3, 20, 30), MinibatchCKA(3, 3)
    stream(exact, x, y, 30)
    stream(estimate, x, y, 30)
    for found in (exact.estimates(), estimate.estimates()):
        reasons = [one.undefined for one in found]
        assert reasons == ["", "not finite: 2 of 90 samples", "not finite: 1 of 90 samples"]


def test_padding_can_be_told_from_new_samples() -> None:
    x, y = pair()
    padded = [torch.cat([z, z[:, :10]], 1) for z in (x, y)]
    fresh = torch.arange(100) < 90
    for metric, plain in ((StreamingCKA(3, 20, 30), StreamingCKA(3, 20, 30)), (MinibatchCKA(3, 3), MinibatchCKA(3, 3))):
        metric.update(*padded, fresh)
        plain.update(x, y)
        torch.testing.assert_close(metric.compute(), plain.compute(), rtol=0, atol=0)
        assert metric.estimates()[0].n == 90
