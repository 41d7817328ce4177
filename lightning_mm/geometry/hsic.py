"""The Hilbert-Schmidt independence criterion of two Gram matrices, without bias and with any samples left out.

Data flow: Gram matrices of one layer -> ``u_centred`` -> products -> ``similarity``, ``streaming``. U-centring makes
HSIC_1 a plain inner product, so that all layer pairs are one matmul.

Shapes: N samples, B sets of samples that stay (the first is everyone).
"""

import math

import torch
from torch import Tensor

from lightning_mm.geometry.resampling import deletion_blocks

MIN_SAMPLES = 4
"""HSIC_1 divides by n (n-3)."""


def u_centred(gram_NN: Tensor) -> Tensor:
    """The off-diagonal part of symmetric matrices (..., N, N) without row and column effects; the diagonal is zero.

    Source: Szekely and Rizzo 2014, definition 2.
    """
    n = gram_NN.shape[-1]
    centred = gram_NN.clone()
    centred.diagonal(dim1=-2, dim2=-1).zero_()
    row_N1 = centred.sum(-1, keepdim=True) / (n - 2)
    centred -= row_N1
    centred -= row_N1.mT
    centred += row_N1.sum(-2, keepdim=True) / (n - 1)
    centred.diagonal(dim1=-2, dim2=-1).zero_()
    return centred


def hsic(first_NN: Tensor, second_NN: Tensor) -> Tensor:
    """Unbiased HSIC_1 (...) of Gram matrices (..., N, N), N >= 4; independent data give 0 on average.

    Source: Song et al. 2012, equation 5, as the inner product of the U-centred matrices over n (n-3).

    Example:
        >>> far = torch.eye(5) + 1  # all samples equally far from one another: no structure
        >>> float(hsic(far, far))
        0.0
    """
    n = first_NN.shape[-1]
    assert n >= MIN_SAMPLES, f"unbiased HSIC needs {MIN_SAMPLES} samples, not {n}"
    return (u_centred(first_NN) * u_centred(second_NN)).sum((-2, -1)) / (n * (n - 3))


def kept_sets(like_NN: Tensor, groups: Tensor | None) -> Tensor:
    """(N, B) ones and zeros of a delete-group jackknife: first everyone, then everyone but one block."""
    deleted = deletion_blocks(len(like_NN), groups)
    kept_NB = torch.ones(len(like_NN), 1 + len(deleted))
    for column, block in enumerate(deleted, start=1):
        kept_NB[block, column] = 0
    return kept_NB.to(like_NN)


def left_out_hsic(first_NN: Tensor, second_NN: Tensor, kept_NB: Tensor, debiased: bool = True) -> Tensor:
    """(B,) float64 HSIC of the samples that stay in each set, from three thin matmuls; no matrix is cut.

    Args:
        first_NN: Symmetric; with a zero diagonal if ``debiased``.
        second_NN: Likewise.
        kept_NB: Who stays.
        debiased: HSIC_1 rather than tr(KHLH).
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
