"""Effective dimension of a layer from its spectrum: participation ratio, entropies, decay of the eigenvalues.

Each null is the same measure of isotropic noise with as many samples and features, whose expected eigenvalues are known
(Marchenko and Pastur 1967). Intervals come from the influence of each sample on the eigenvalues, (v_j . x_i)^2 -
lambda_j.

Data flow: ``Representations`` -> ``Spectrum`` (one eigendecomposition per layer, of the smaller of Gram and covariance
matrix) -> one Estimate per layer; ``participation_ratio`` needs no decomposition.

Shapes: L layers, N samples, D features, R = min(N, D) eigenvalues, B leave-out sets, J eigenvalues of the fit, G grid
points.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.peak import with_left_out
from lightning_mm.geometry.representations import Representations, exact_products, one_thread
from lightning_mm.geometry.resampling import clustered_mean_interval, jackknife_interval, leave_out_masks

_MIN_SAMPLES = 4
"""The unbiased participation ratio divides by N - 3."""

_MIN_POINTS = 10
"""Fewest eigenvalues that a line is fitted to."""

_ROUNDING = 1e-13
"""Eigenvalues below this share of the largest are rounding errors and count as zero."""

_GRID = 20000
"""Quadrature points of the Marchenko-Pastur distribution."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of the second moments of each layer, largest first.

    Args:
        eigenvalues: (L, R) float64.
        squares: (L, N, R) squared coordinates of the samples along the eigenvectors; their means over N are the
            eigenvalues.
        width: D.
        centered: Whether the mean was subtracted.
        problems: Per layer, why no measure is defined there; empty where all are.
    """

    eigenvalues: Tensor
    squares: Tensor
    width: int
    centered: bool
    problems: tuple[str, ...]

    @classmethod
    def of(cls, reps: Representations, centered: bool = True, unit_rows: bool = False) -> "Spectrum":
        """Decompose every layer in float64.

        Args:
            reps: The representations.
            centered: Eigenvalues of the covariance; otherwise of the second moments about zero, as in RankMe.
            unit_rows: Normalize each row to length 1 first, as in the dataset entropy of Palacios et al. 2026,
                arXiv:2606.03871.
        """
        parts = []
        for layer in range(reps.num_layers):
            x_ND = reps.centered[layer] if centered else reps.centered[layer] + reps.mean[layer]
            x_ND = torch.nn.functional.normalize(x_ND, dim=1) if unit_rows else x_ND
            parts.append(_decompose(torch.zeros_like(x_ND) if reps.problems[layer] else x_ND))
        eigenvalues, squares = (torch.stack(part) for part in zip(*parts, strict=True))
        return cls(eigenvalues, squares, reps.centered.shape[2], centered, reps.problems)


def participation_ratio(reps: Representations, debiased: bool = True, groups: Tensor | None = None) -> list[Estimate]:
    """(sum lambda)^2 / sum lambda^2: the effective number of directions, from the pairwise distances.

    Args:
        reps: L layers.
        debiased: The ratio of the U-statistics of (tr S)^2 and tr S^2, which does not grow with N; otherwise that of
            the sample eigenvalues, (N-1) D / (N-1+D) for isotropic noise (Murphy et al. 2024, arXiv:2405.01012).
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
    """
    n, width = reps.centered.shape[1:]
    null = float(width) if debiased else (n - 1) * width / (n - 1 + width)
    kept_NB = leave_out_masks(reps.centered[0].double(), groups)

    def measure(layer: int) -> Estimate:
        if reps.problems[layer] or n < _MIN_SAMPLES:
            return Estimate.undefined_because(reps.problems[layer] or f"too few: {n} samples", n)
        values_B = _participation(reps.squared_distances(layer), kept_NB, debiased)
        if not values_B[0] > 0:
            return Estimate.undefined_because(
                "no variance beyond what noise of this size has: tr S^2 is not above 0", n
            )
        low, high = jackknife_interval(values_B, 0)
        found = Estimate.of(float(values_B[0]), n, low=float(low), high=float(high), null=null)
        return with_left_out(found, values_B[1:])

    return [measure(layer) for layer in range(reps.num_layers)]


def effective_rank(spectrum: Spectrum, groups: Tensor | None = None) -> list[Estimate]:
    """exp of the entropy of the singular values of the centered data (Roy and Vetterli 2007), layer by layer."""
    return _layerwise(spectrum, lambda values: _exponential(*_entropy(values, 0.5)), groups)


def rankme(reps: Representations, groups: Tensor | None = None) -> list[Estimate]:
    """``effective_rank`` of the uncentered data, with 1e-7 added to each share (RankMe, Garrido et al. 2023)."""
    spectrum = Spectrum.of(reps, centered=False)
    return _layerwise(spectrum, lambda values: _exponential(*_entropy(values, 0.5, 1e-7)), groups)


def entropy(spectrum: Spectrum, groups: Tensor | None = None) -> list[Estimate]:
    """von Neumann entropy of the eigenvalues over ln min(N, D): 1 for a flat spectrum, 0 for one direction."""
    scale = 1 / math.log(max(2, spectrum.eigenvalues.shape[1]))

    def measure(values: Tensor) -> tuple[Tensor, Tensor]:
        value, slope_R = _entropy(values, 1.0)
        return value * scale, slope_R * scale

    return _layerwise(spectrum, measure, groups)


def alpha_req(spectrum: Spectrum, first: int = 11, last: int = 100, groups: Tensor | None = None) -> list[Estimate]:
    """Decay alpha of lambda_j ~ j^-alpha: minus the slope of ln lambda_j on ln j (Agrawal et al. 2022).

    Args:
        spectrum: Spectrum of the centered data.
        first: First eigenvalue of the fitted line, counted from 1. The range matters: a note states it.
        last: Last eigenvalue; the last one above zero where the spectrum ends before.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
    """
    measured = []
    for layer, values_R in enumerate(spectrum.eigenvalues):
        n = spectrum.squares.shape[1]
        end = min(last, n - 1, int((values_R > 0).sum()))  # centered data have at most N - 1 directions
        if spectrum.problems[layer] or end - first + 1 < _MIN_POINTS:
            few = f"too few: {end} eigenvalues above 0 for a line from number {first}"
            measured.append(Estimate.undefined_because(spectrum.problems[layer] or few, n))
            continue
        line = _PowerLaw(first, end)
        estimate = _estimate(spectrum, layer, line, groups)
        measured.append(estimate.noted(f"R^2 {line.fit(values_R):.3f} over eigenvalues {first} to {end}"))
    return measured


def marchenko_pastur_eigenvalues(n: int, width: int) -> Tensor:
    """(R,) expected eigenvalues of isotropic noise, largest first: quantiles of the Marchenko-Pastur distribution.

    Example:
        >>> x = marchenko_pastur_eigenvalues(1000, 500)
        >>> round(float(x.sum() ** 2 / x.square().sum()))  # (N-1) D / (N-1+D)
        333
    """
    aspect, most = width / n, min(n, width)
    low, high = (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2
    angle_G = (torch.arange(_GRID).double() + 0.5) * math.pi / _GRID
    value_G = (low + high) / 2 + (high - low) / 2 * angle_G.cos()
    mass_G = (angle_G.sin().square() / value_G).cumsum(0)
    share_R = (torch.arange(most).double() + 0.5) / most
    return value_G[torch.searchsorted(mass_G / mass_G[-1], share_R).clamp(max=_GRID - 1)]


SpectralMeasure = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Eigenvalues (R,) -> a number and its derivative by each of them (R,)."""


@dataclass(frozen=True)
class _PowerLaw:
    """Minus the slope of ln lambda_j on ln j for first <= j <= last, as a ``SpectralMeasure``."""

    first: int
    last: int

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        x_J, slope_R = self._log_rank(values), torch.zeros_like(values)
        weight_J = -x_J / x_J.square().sum()
        slope_R[self.first - 1 : self.last] = weight_J / values[self.first - 1 : self.last]
        return weight_J @ values[self.first - 1 : self.last].log(), slope_R

    def fit(self, values: Tensor) -> float:
        """R^2 of the fitted line."""
        pair = torch.stack([self._log_rank(values), values[self.first - 1 : self.last].log()])
        return float(torch.corrcoef(pair)[0, 1].square())

    def _log_rank(self, values: Tensor) -> Tensor:
        x_J = torch.arange(self.first, self.last + 1, device=values.device).double().log()
        return x_J - x_J.mean()


def _decompose(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (R,) float64 and squared coordinates (N, R) of the rows."""
    n, width = x_ND.shape
    with exact_products():
        exact_ND = x_ND.double()
        moments = exact_ND.T @ exact_ND / n if width <= n else exact_ND @ exact_ND.T / n
        with one_thread():
            values_R, vectors = torch.linalg.eigh(moments)
        squares_NR = (x_ND @ vectors.to(x_ND)).square() if width <= n else vectors.square() * values_R * n
    values_R = values_R.flip(0)
    kept_R = values_R > _ROUNDING * values_R[:1]
    return values_R.where(kept_R, 0), squares_NR.flip(1).where(kept_R, 0).float()


def _entropy(values: Tensor, power: float, extra: float = 0.0) -> tuple[Tensor, Tensor]:
    """Entropy of values^power / sum + extra, and its derivative by each value; zeros contribute nothing."""
    positive_R = values > 0
    weight_R = values.pow(power).where(positive_R, 0)
    share_R = weight_R / weight_R.sum() + extra
    log_R = share_R.where(share_R > 0, 1).log()
    slope_R = (((share_R - extra) * log_R).sum() - log_R) / weight_R.sum() * power * values.pow(power - 1)
    return -(share_R * log_R).sum(), slope_R.where(positive_R, 0)


def _exponential(value: Tensor, slope_R: Tensor) -> tuple[Tensor, Tensor]:
    return value.exp(), value.exp() * slope_R


def _layerwise(spectrum: Spectrum, measure: SpectralMeasure, groups: Tensor | None) -> list[Estimate]:
    n = spectrum.squares.shape[1]
    return [
        Estimate.undefined_because(problem, n) if problem else _estimate(spectrum, layer, measure, groups)
        for layer, problem in enumerate(spectrum.problems)
    ]


def _estimate(spectrum: Spectrum, layer: int, measure: SpectralMeasure, groups: Tensor | None) -> Estimate:
    """The measure of one layer, with the interval from its influence function and its value for isotropic noise."""
    n = spectrum.squares.shape[1]
    values_R = spectrum.eigenvalues[layer]
    value, slope_R = measure(values_R)
    influence_N = (spectrum.squares[layer].double() - values_R) @ slope_R
    _, below, above = clustered_mean_interval(influence_N[None], groups)
    null = float(measure(marchenko_pastur_eigenvalues(n - spectrum.centered, spectrum.width))[0])
    return Estimate.of(float(value), n, low=float(value + below), high=float(value + above), null=null)


def _participation(squared_NN: Tensor, kept_NB: Tensor, debiased: bool) -> Tensor:
    """(B,) from sums of squared distances d: E d_12 d_34 = 4 (tr S)^2, and HSIC_1 of d is 4 tr S^2."""
    squared_NN, n_B = squared_NN.double(), kept_NB.sum(0)
    rows_NB = (squared_NN @ kept_NB) * kept_NB
    total_B, rows_B = rows_NB.sum(0), rows_NB.square().sum(0)
    pairs_B = ((squared_NN.square() @ kept_NB) * kept_NB).sum(0)
    if not debiased:
        return total_B.square() / (n_B.square() * pairs_B - 2 * n_B * rows_B + total_B.square())
    traces_B = (total_B.square() - 4 * rows_B + 2 * pairs_B) / ((n_B - 1) * (n_B - 2))
    squares_B = pairs_B + total_B.square() / ((n_B - 1) * (n_B - 2)) - 2 * rows_B / (n_B - 2)
    return traces_B / squares_B
