"""Hilbert-Schmidt independence criterion of two Gram matrices: unbiased, and with any samples left out.

U-centering makes HSIC_1 a plain inner product, so that all layer pairs are one matmul.

Data flow: Gram matrices of one layer -> ``u_center`` -> inner products -> ``cka``, ``streaming``, ``null_models``.

Shapes: N samples, B leave-out sets (the first leaves none out).
"""

import math

import torch
from torch import Tensor

MIN_SAMPLES = 4
"""HSIC_1 divides by n (n-3)."""


def u_center(gram_NN: Tensor) -> Tensor:
    """U-centered symmetric matrices (..., N, N): off-diagonal row and column means removed, diagonal zero.

    Szekely and Rizzo 2014, definition 2.
    """
    n = gram_NN.shape[-1]
    centered = gram_NN.clone()
    centered.diagonal(dim1=-2, dim2=-1).zero_()
    row_N1 = centered.sum(-1, keepdim=True) / (n - 2)
    centered -= row_N1
    centered -= row_N1.mT
    centered += row_N1.sum(-2, keepdim=True) / (n - 1)
    centered.diagonal(dim1=-2, dim2=-1).zero_()
    return centered


def hsic(first_NN: Tensor, second_NN: Tensor) -> Tensor:
    """Unbiased HSIC_1 (...) of Gram matrices (..., N, N), N >= 4; independent data give 0 on average.

    Song et al. 2012, equation 5, as the inner product of the U-centered matrices over n (n-3).

    Example:
        >>> far = torch.eye(5) + 1  # all samples equally far from one another: no structure
        >>> float(hsic(far, far))
        0.0
    """
    n = first_NN.shape[-1]
    assert n >= MIN_SAMPLES, f"unbiased HSIC needs {MIN_SAMPLES} samples, not {n}"
    return (u_center(first_NN) * u_center(second_NN)).sum((-2, -1)) / (n * (n - 3))


def leave_out_hsic(first_NN: Tensor, second_NN: Tensor, kept_NB: Tensor, debiased: bool = True) -> Tensor:
    """(B,) float64 HSIC of the samples that each leave-out set keeps, from three thin matmuls on the whole matrices.

    Args:
        first_NN: Symmetric; with a zero diagonal if ``debiased``.
        second_NN: Symmetric; with a zero diagonal if ``debiased``.
        kept_NB: 1 for samples that are kept, 0 for those left out, as ``resampling.leave_out_masks`` makes them.
        debiased: HSIC_1; otherwise the biased tr(KHLH).
    """
    count_B = kept_NB.double().sum(0)
    products_B = (kept_NB * ((first_NN * second_NN) @ kept_NB)).double().sum(0)
    first_NB = (kept_NB * (first_NN @ kept_NB)).double()
    second_NB = (kept_NB * (second_NN @ kept_NB)).double()
    rows_B, totals_B = (first_NB * second_NB).sum(0), first_NB.sum(0) * second_NB.sum(0)
    if not debiased:
        return products_B - 2 * rows_B / count_B + totals_B / count_B**2
    whole_B = products_B - 2 * rows_B / (count_B - 2) + totals_B / ((count_B - 1) * (count_B - 2))
    return torch.where(count_B >= MIN_SAMPLES, whole_B / (count_B * (count_B - 3)), math.nan)
