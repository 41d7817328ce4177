"""Ridge regression on all layers at once: all penalties, targets and exact leave-one-out from one decomposition.

Data flow: features (L, N, D) and targets (N, C) -> ``Ridge.fit`` -> the penalty selected by leave-one-out in each
layer, leave-one-out residuals, and weights for new rows.

Shapes: L layers, N samples, D features, C targets, V penalties, R = min(N, D) directions, G groups of S samples each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mm.geometry.representations import exact_products, one_thread


@dataclass(frozen=True, eq=False)
class Ridge:
    """Fitted ridge regressions with an unpenalized bias, on unscaled features. A layer that is not finite has NaN.

    Args:
        weight: (L, D, C).
        bias: (L, C).
        penalty: (L,) the selected penalty.
        loo_residuals: (L, N, C) residuals of each sample in the fit without it (or its group), at the penalty selected
            by the other samples (groups), so that a sample does not affect the penalty it is tested with.
        errors: (L, V) mean squared residuals for every penalty; infinite where the fit lost its precision.
    """

    weight: Tensor
    bias: Tensor
    penalty: Tensor
    loo_residuals: Tensor
    errors: Tensor

    @classmethod
    @exact_products()
    def fit(cls, x_LND: Tensor, y_NC: Tensor, penalties: Sequence[float], *, groups_N: Tensor | None = None) -> "Ridge":
        """Minimize ||y - x w - b||^2 + penalty * ||w||^2 and select the penalty, per layer, by leave-one-out.

        The residual of a left-out sample is r / (1 - h), of a left-out group (I - H)^-1 r, with residuals r and hat
        matrix H (diagonal h) of the fit to all samples (Hastie et al. 2009, section 7.10); H has 1 / N for the bias.
        With more features than samples and a small penalty 1 - h is nearly zero: everything is solved in float64.

        Args:
            x_LND: Features; the results are float64 if these are, otherwise float32.
            y_NC: Targets.
            penalties: Positive candidates.
            groups_N: Group ids; whole groups are left out, whose samples would reveal each other's targets. None: each
                sample is left out alone.

        Example:
            >>> x = torch.arange(4.0, dtype=torch.float64)[None, :, None]
            >>> fitted = Ridge.fit(x, 2 * x[0] + 1, [1e-9])
            >>> round(float(fitted.weight), 6), round(float(fitted.bias), 6)
            (2.0, 1.0)
        """
        assert min(penalties) > 0, "without a penalty the fit is not unique"
        assert groups_N is None or len(torch.unique(groups_N)) > 1, "nothing is left when the only group is left out"
        device = x_LND.device
        rows = _rows_by_group(torch.arange(len(y_NC)) if groups_N is None else groups_N, device)
        y_NC, penalty_V = y_NC.to(device).double(), torch.tensor(penalties, dtype=torch.float64, device=device)
        fits = [_fit(x_ND.double(), y_NC, penalty_V, rows) for x_ND in x_LND.detach()]
        dtype = torch.float64 if x_LND.dtype == torch.float64 else torch.float32
        return cls(*(torch.stack(parts).to(dtype) for parts in zip(*fits, strict=True)))

    @exact_products()
    def predict(self, x_LND: Tensor) -> Tensor:
        """(L, N, C) predictions for new rows."""
        return x_LND.to(self.weight.dtype) @ self.weight + self.bias[:, None]


def _fit(x_ND: Tensor, y_NC: Tensor, penalty_V: Tensor, rows: list[Tensor]) -> tuple[Tensor, ...]:
    """Weight (D, C), bias (C,), penalty (), left-out residuals (N, C) and errors (V,) of one layer."""
    if not torch.isfinite(x_ND).all():
        sizes = ((x_ND.shape[1], y_NC.shape[1]), (y_NC.shape[1],), (), y_NC.shape, penalty_V.shape)
        return tuple(x_ND.new_full(size, math.nan) for size in sizes)
    x_mean_D, y_mean_C = x_ND.mean(0), y_NC.mean(0)
    scores_NR, squares_R, basis_DR = _decomposition(x_ND - x_mean_D)
    along_RC = scores_NR.mT @ (y_NC - y_mean_C)
    shrink_VR = 1 / (squares_R + penalty_V[:, None])
    left_out_VNC = torch.stack(
        [_left_out(scores_NR, shrink_R, y_NC - y_mean_C, along_RC, rows) for shrink_R in shrink_VR]
    )
    error_V = _nan_to_inf(left_out_VNC.square().mean((1, 2)))
    best, left_out_NC = error_V.argmin(), torch.empty_like(y_NC)
    weight_DC = basis_DR @ (along_RC * shrink_VR[best][:, None])
    for rows_GS in rows:
        own_VG = left_out_VNC[:, rows_GS].square().sum((2, 3)) / y_NC.numel()
        preferred_G1 = _nan_to_inf(error_V[:, None] - own_VG).argmin(0)[:, None]
        left_out_NC[rows_GS] = left_out_VNC[preferred_G1, rows_GS]
    return weight_DC, y_mean_C - x_mean_D @ weight_DC, penalty_V[best], left_out_NC, error_V


def _nan_to_inf(errors: Tensor) -> Tensor:
    """The errors with NaN replaced by infinity, so that they are never selected."""
    return errors.where(~errors.isnan(), math.inf)


@one_thread()
def _decomposition(x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x = scores @ basis', from the smaller of x'x and xx'; squares (R,) are the squared singular values."""
    if x_ND.shape[1] <= x_ND.shape[0]:
        squares_R, basis_DR = torch.linalg.eigh(x_ND.mT @ x_ND)
        return x_ND @ basis_DR, squares_R.clamp_min(0), basis_DR
    squares_R, left_NR = torch.linalg.eigh(x_ND @ x_ND.mT)
    # Centered rows have at least one direction of zero length, which must not be divided by.
    rounding = squares_R.amax() * len(left_NR) * torch.finfo(x_ND.dtype).eps
    squares_R = torch.where(squares_R > rounding, squares_R, 0.0)
    lengths_R = squares_R.sqrt()
    inverse_R = torch.where(lengths_R > 0, 1 / lengths_R, 0.0)
    return left_NR * lengths_R, squares_R, (x_ND.mT @ left_NR) * inverse_R


@one_thread()
def _left_out(scores_NR: Tensor, shrink_R: Tensor, y_NC: Tensor, along_RC: Tensor, rows: list[Tensor]) -> Tensor:
    """(N, C) residuals of left-out groups at one penalty, NaN where precision is lost; y is centered."""
    n = len(y_NC)
    residual_NC = y_NC - scores_NR @ (shrink_R[:, None] * along_RC)
    left_out_NC = torch.empty_like(residual_NC)
    for rows_GS in rows:
        scores_GSR = scores_NR[rows_GS]
        hat_GSS = (scores_GSR * shrink_R) @ scores_GSR.mT + 1 / n
        kept_GSS = torch.eye(rows_GS.shape[1]).to(hat_GSS) - hat_GSS
        solved_GSC, failed_G = torch.linalg.solve_ex(kept_GSS, residual_NC[rows_GS])
        left_out_NC[rows_GS] = solved_GSC.where(failed_G[:, None, None] == 0, math.nan)
    return left_out_NC


def _rows_by_group(groups_N: Tensor, device: torch.device) -> list[Tensor]:
    """For each group size S, (G, S) rows of all groups with S samples."""
    _, group_N, sizes_G = torch.unique(groups_N.cpu(), return_inverse=True, return_counts=True)
    order_N = torch.argsort(group_N, stable=True)
    sizes_N = sizes_G[group_N[order_N]]
    return [order_N[sizes_N == size].view(-1, size).to(device) for size in torch.unique(sizes_G).tolist()]
