"""Centered kernel alignment (CKA) of two representations of the same samples; rotation and scale change nothing.

Prefer the debiased form: the biased one is 0.6 for independent noise when there are fewer samples than features
(Murphy et al. 2024, arXiv:2405.01012). A debiased value may be negative and is returned as it is.

Data flow: two ``Representations`` of the same samples -> Gram matrices -> ``hsic`` -> one Estimate per layer, or a
matrix of all layer pairs.

Shapes: L layers, N samples, D features, B leave-out sets (the first leaves none out), R rows of a piece.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.hsic import MIN_SAMPLES, leave_out_hsic, u_center
from lightning_mm.geometry.null_models import MantelTerms, permutation_band
from lightning_mm.geometry.peak import with_left_out
from lightning_mm.geometry.representations import Representations, exact_products, pair_problems
from lightning_mm.geometry.resampling import jackknife_interval, leave_out_masks, permutation_problem, without_null

_ROUNDING = 64
"""U-centered entries below this many roundings of the mean squared norm are rounding."""

_PIECE = 1 << 18
"""Gram entries of one layer per piece of the all-pairs product: short float32 sums are accurate to 1e-6."""

_MEDIAN_ROWS = 256
"""Rows of the distance matrix that the median distance is computed from."""

Kernel = Callable[[Representations, int], Tensor | str]
"""(N, N) Gram matrix of one layer with a mean diagonal of 1, or why there is none."""


def cka(a: Representations, b: Representations, groups: Tensor | None = None) -> list[Estimate]:
    """Debiased linear CKA layer by layer; chance is 0.

    HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L)) (Song et al. 2012; Kornblith et al. 2019; Murphy et al. 2024,
    arXiv:2405.01012), with a delete-group jackknife interval and the band of random pairings.

    Args:
        a: L layers of N samples.
        b: As many layers of the same samples; the features may differ.
        groups: (N,) int ids, equal for samples that share a picture; None: all are independent.

    Example:
        >>> x = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0))
        >>> rotated_scaled_shifted = Representations.of(2 * x.flip(2) + 1)
        >>> round(cka(Representations.of(x), rotated_scaled_shifted)[0].value, 4)
        1.0
    """
    return _layerwise(a, b, groups, _linear, debiased=True)


def cka_rbf(a: Representations, b: Representations, scale: float = 1.0, groups: Tensor | None = None) -> list[Estimate]:
    """Debiased CKA with the kernel exp(-d^2 / (2 sigma^2)): near neighbors count, far ones do not.

    Args:
        a: L layers of N samples.
        b: As many layers of the same samples.
        scale: sigma as a multiple of the layer's median distance.
        groups: (N,) int ids, equal for samples that share a picture; None: all are independent.
    """
    return _layerwise(a, b, groups, lambda reps, layer: _gaussian(reps, layer, scale), debiased=True)


def cka_biased(a: Representations, b: Representations, groups: Tensor | None = None) -> list[Estimate]:
    """Biased linear CKA, as most papers report it; the null is its value for unrelated data.

    ||X'Y||^2 / (||X'X|| ||Y'Y||) of centered X and Y. The null is exact over random pairings,
    tr K tr L / ((N-1) ||K|| ||L||); for participation ratios PR that is [(1+(N-1)/PR_x)(1+(N-1)/PR_y)]^(-1/2).

    Args:
        a: L layers of N samples.
        b: As many layers of the same samples; the features may differ.
        groups: (N,) int ids, equal for samples that share a picture; None: all are independent.
    """
    return _layerwise(a, b, groups, _linear, debiased=False)


def cka_matrix(a: Representations, b: Representations | None = None) -> Tensor:
    """Debiased linear CKA of all layer pairs, from one matmul of the U-centered Gram matrices.

    Args:
        a: La layers.
        b: Lb layers of the same samples; None compares ``a`` with itself.

    Returns:
        (La, Lb) float64 on the CPU; NaN where a layer has no self-similarity.
    """
    all_reps, n = [a] if b is None else [a, b], a.num_samples
    assert all(reps.num_samples == n for reps in all_reps), "CKA compares the same samples"
    sound_L = torch.tensor([not problem for reps in all_reps for problem in reps.problems])
    product_LL = torch.full((len(sound_L), len(sound_L)), math.nan, dtype=torch.float64)
    if n >= MIN_SAMPLES:
        with exact_products():
            pieces = zip(*(_u_centred_pieces(reps) for reps in all_reps), strict=True)
            product_LL = torch.stack([(x_LE @ x_LE.T).double() for x_LE in map(torch.cat, pieces)]).sum(0).cpu()
    own_L = product_LL.diagonal()
    own_L = torch.where(sound_L & (own_L > _floor(a.centered.dtype) * n * (n - 3)), own_L, math.nan)
    matrix_LL = product_LL / own_L.outer(own_L).sqrt()
    return matrix_LL if b is None else matrix_LL[: a.num_layers, a.num_layers :]


def _layerwise(
    a: Representations, b: Representations, groups: Tensor | None, kernel: Kernel, debiased: bool
) -> list[Estimate]:
    estimates = []
    with exact_products():
        for layer, problem in enumerate(pair_problems(a, b, MIN_SAMPLES)):
            first, second = (problem, problem) if problem else (kernel(a, layer), kernel(b, layer))
            if isinstance(first, Tensor) and isinstance(second, Tensor):
                estimates.append(_ratio(first, second, groups, debiased))
            else:
                reason = first if isinstance(first, str) else str(second)
                estimates.append(Estimate.undefined_because(reason, a.num_samples))
    return without_null(estimates, permutation_problem(groups))


def _ratio(first_NN: Tensor, second_NN: Tensor, groups: Tensor | None, debiased: bool) -> Estimate:
    n = len(first_NN)
    kept_NB = leave_out_masks(first_NN, groups)
    if debiased:
        first_NN, second_NN = u_center(first_NN), u_center(second_NN)
    pairs = ((first_NN, second_NN), (first_NN, first_NN), (second_NN, second_NN))
    shared_B, own_B, other_B = (leave_out_hsic(x_NN, y_NN, kept_NB, debiased) for x_NN, y_NN in pairs)
    if debiased and float(torch.minimum(own_B[0], other_B[0])) <= _floor(first_NN.dtype):
        return Estimate.undefined_because("no self-similarity: all samples are equally far from one another", n)
    # A block that holds all the structure leaves a self-term of zero: that deletion, and the interval, is undefined.
    own_B, other_B = (torch.where(term_B > 0, term_B, math.nan) for term_B in (own_B, other_B))
    ratio_B = shared_B / (own_B.sqrt() * other_B.sqrt())
    low, high = jackknife_interval(ratio_B, -1.0, 1.0)
    if debiased:
        first, second = (MantelTerms(x_NN, norm=float(x_NN.norm())) for x_NN in (first_NN, second_NN))
        band = permutation_band(first, second, groups)
    else:
        first, second = MantelTerms.of_gram(first_NN), MantelTerms.of_gram(second_NN)
        traces = float(first_NN.trace()) * float(second_NN.trace())
        band = permutation_band(first, second, groups, constant=traces / ((n - 1) * first.norm * second.norm))
    return with_left_out(Estimate.of(float(ratio_B[0]), n, low=float(low), high=float(high), **band), ratio_B[1:])


def _linear(reps: Representations, layer: int) -> Tensor | str:
    gram_NN = reps.gram(layer)
    return gram_NN / gram_NN.diagonal().mean()


def _gaussian(reps: Representations, layer: int, scale: float) -> Tensor | str:
    squared_NN = reps.squared_distances(layer)
    step = -(-len(squared_NN) // _MEDIAN_ROWS)
    others_MN = ~torch.eye(len(squared_NN), dtype=torch.bool, device=squared_NN.device)[::step]
    median = squared_NN[::step][others_MN].median()
    if float(median) == 0:
        return "no bandwidth: more than half of the samples coincide"
    return (squared_NN / (-2 * scale**2 * median)).exp_()


def _u_centred_pieces(reps: Representations) -> Iterator[Tensor]:
    """The rows of all layers' U-centered Gram matrices, a few at a time: (L, rows * N)."""
    n, layers = reps.num_samples, range(reps.num_layers)
    sums = ((gram_NN.diagonal(), gram_NN.sum(1)) for gram_NN in map(reps.gram, layers))
    own_LN, sum_LN = (torch.stack(part) for part in zip(*sums, strict=True))
    scale_L11 = own_LN.mean(1)[:, None, None]
    row_LN1 = (sum_LN - own_LN)[:, :, None] / (n - 2)
    total_L11 = row_LN1.sum(1, keepdim=True) / (n - 1)
    rows = max(1, _PIECE // n)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        piece_LRN = torch.stack([reps.gram(layer, part) for layer in layers])
        piece_LRN = piece_LRN - row_LN1[:, part] - row_LN1.mT + total_L11
        piece_LRN.diagonal(offset=start, dim1=1, dim2=2).zero_()
        yield (piece_LRN / scale_L11).flatten(1)


def _floor(dtype: torch.dtype) -> float:
    """HSIC_1 of a Gram matrix with mean diagonal 1 below which it is rounding."""
    return (_ROUNDING * torch.finfo(dtype).eps) ** 2
