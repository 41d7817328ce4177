"""The Gram matrix behind all measures: its products are exact, whatever the caller has set, and leave that alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_mm.geometry.representations import exact_products

KERNELS: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def precisions() -> list[str]:
    return [each.fp32_precision for each in KERNELS]


@pytest.fixture
def _as_before() -> Iterator[None]:
    before = precisions()
    yield
    torch.set_float32_matmul_precision("highest")
    for each, precision in zip(KERNELS, before, strict=True):
        each.fp32_precision = precision


def _error() -> float:
    """Of a product whose exact value bfloat16 and TF32 do not hold."""
    x = torch.full((64, 64), 1.0 + 2.0**-12)
    return float(((x @ x).double() - x.double() @ x.double()).abs().max())


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("way", ["highest", "high", "medium"])
def test_the_older_setting_is_given_back(way: str) -> None:
    torch.set_float32_matmul_precision(way)
    before = precisions()
    with exact_products():
        assert precisions() == ["ieee", "ieee"]
        assert torch.get_float32_matmul_precision() == "highest"
        assert _error() < 1e-4
    assert precisions() == before
    assert torch.get_float32_matmul_precision() == way
    assert torch.backends.cuda.matmul.allow_tf32 == (way != "highest")


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("way", ["none", "ieee", "tf32", "bf16"])
def test_the_newer_setting_is_given_back(way: str) -> None:
    cuda, cpu = KERNELS
    cuda.fp32_precision, cpu.fp32_precision = ("tf32" if way == "bf16" else way), way
    before = precisions()
    with exact_products():
        assert precisions() == ["ieee", "ieee"]
        assert _error() < 1e-4
    assert precisions() == before
    with pytest.raises(ArithmeticError), exact_products():
        raise ArithmeticError
    assert precisions() == before
