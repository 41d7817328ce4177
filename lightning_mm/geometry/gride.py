"""The intrinsic dimension from ratios of neighbour distances alone; nothing here knows where they come from.

Data flow: ln(r_n2 / r_n1) of each sample -> an estimator -> a dimension per layer, for ``dimension`` and
``calibration``. In a locally uniform cloud of dimension d the ratio of the distances of neighbours n1 < n2 has a law
that depends on d only: (r_n1 / r_n2)^d is Beta(n1, n2 - n1).

Shapes: L layers, N samples. NaN marks a sample without a ratio.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_BRACKET = (1e-3, 1e5)
"""Between which dimensions the likelihood equation is solved."""
_HALVINGS = 40
"""Of the logarithm of the bracket: 2e-11 relative."""


@dataclass(frozen=True)
class TwoNN:
    """Second over first neighbour: ln(r2/r1) is exponential with rate d (Facco et al. 2017).

    Args:
        method: 'fit' draws the line of Facco et al. through the empirical distribution; 'ml' is the unbiased maximum
            likelihood (N-1) / sum ln(r2/r1) (Denti et al. 2022).
        fraction: Share of the samples that the line is drawn through, smallest ratios first; the rest are outliers.
    """

    method: Literal["fit", "ml"] = "fit"
    fraction: float = 0.9
    n1: int = 1
    n2: int = 2

    def __call__(self, log_ratios: Tensor) -> Tensor:
        """(L,) dimensions of (L, N) log ratios; NaN or infinite where they do not determine one.

        Example:
            >>> ratios = torch.linspace(0.0005, 0.9995, 1000).log().neg()[None] / 3  # quantiles of the law for d = 3
            >>> round(float(TwoNN()(ratios)), 2), round(float(TwoNN("ml")(ratios)), 2)
            (3.0, 3.0)
        """
        known_LN = log_ratios.double().masked_fill(log_ratios.isnan(), math.inf).sort(1).values
        count_L1 = known_LN.isfinite().sum(1, keepdim=True)
        rank_N = torch.arange(1, known_LN.shape[1] + 1, device=known_LN.device)
        if self.method == "ml":
            return (count_L1[:, 0] - 1) / known_LN.masked_fill(rank_N > count_L1, 0).sum(1)
        used_LN = rank_N <= (count_L1 * self.fraction).long().clamp(max=count_L1 - 1)
        x_LN = known_LN.where(used_LN, 0)
        y_LN = -torch.log1p(-(rank_N / count_L1).where(used_LN, 0))
        return (x_LN * y_LN).sum(1) / x_LN.square().sum(1)


@dataclass(frozen=True)
class Gride:
    """Any two neighbours by maximum likelihood (Denti et al. 2022): a larger scale, less noise in the coordinates.

    Args:
        n1: The nearer neighbour.
        n2: The farther one.
    """

    n1: int = 16
    n2: int = 32

    def __call__(self, log_ratios: Tensor) -> Tensor:
        """(L,) dimensions of (L, N) log ratios: the root of the score, with N - 1 for N as in DADApy and ``TwoNN``.

        (N-1)/d + (n2-n1-1) sum ln(mu)/(1-mu^-d) - (n2-1) sum ln(mu) = 0; its second term falls with d, so that there
        is one root. NaN where it is outside 0.001 to 100000.
        """
        mu_LN = log_ratios.double().nan_to_num(0.0)
        used_LN, count_L = mu_LN > 0, (~log_ratios.isnan()).sum(1)
        low_L, high_L = (torch.full_like(mu_LN[:, 0], end) for end in _BRACKET)
        for _ in range(_HALVINGS):
            middle_L = (low_L * high_L).sqrt()
            shares_LN = -torch.expm1(-middle_L[:, None] * mu_LN)  # 1 - mu^-d
            inner_LN = (mu_LN / shares_LN).where(used_LN, 1 / middle_L[:, None])  # its limit where the two tie
            score_L = (count_L - 1) / middle_L + (self.n2 - self.n1 - 1) * inner_LN.where(~log_ratios.isnan(), 0).sum(1)
            above_L = score_L < (self.n2 - 1) * mu_LN.sum(1)
            low_L, high_L = low_L.where(above_L, middle_L), middle_L.where(above_L, high_L)
        found_L = (low_L * high_L).sqrt()
        inside_L = (found_L > 1.01 * _BRACKET[0]) & (found_L < 0.99 * _BRACKET[1])
        return found_L.where(inside_L, math.nan)

    def fisher_error(self, log_ratios: Tensor, dimension: Tensor) -> Tensor:
        """(L,) standard error of ``dimension`` (L,) from the observed information, as if samples were independent."""
        mu_LN = log_ratios.double().nan_to_num(0.0)
        decay_LN = torch.exp(-dimension[:, None] * mu_LN)
        curvature_LN = ((mu_LN / (1 - decay_LN)).square() * decay_LN).where(mu_LN > 0, 1 / dimension[:, None].square())
        known_LN = ~log_ratios.isnan()
        information_L = known_LN.sum(1) / dimension.square()
        information_L += (self.n2 - self.n1 - 1) * curvature_LN.where(known_LN, 0).sum(1)
        return information_L.rsqrt()


RatioEstimator = TwoNN | Gride
"""Turns log ratios of the distances of neighbours ``n1`` and ``n2`` into a dimension per layer."""
