"""Ridge regression on all layers at once: all penalties and targets and exact cross-validation from one decomposition.

Data flow: features (L, N, D) and targets (N, C) -> ``Ridge.fit`` -> the penalty that leave-one-out prefers in each
layer, the residuals there, and weights for new rows.

Shapes: L layers, N samples, D features, C targets, V penalties, R = min(N, D) directions, G groups of S samples each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mm.geometry.gram import exact_products
from lightning_mm.geometry.threads import one_thread
from lightning_mm.probes.cross_entropy import real


@dataclass(frozen=True, eq=False)
class Ridge:
    """Fitted ridge regressions with a free bias; features are taken as they are.

    Args:
        weight: (L, D, C).
        bias: (L, C).
        penalty: (L,) the chosen one.
        left_out: (L, N, C) residuals of each sample in the fit that left it (or its group) out, at the chosen penalty.
        errors: (L, V) mean square of such residuals for every penalty.
    """

    weight: Tensor
    bias: Tensor
    penalty: Tensor
    left_out: Tensor
    errors: Tensor

    @classmethod
    @exact_products()
    def fit(cls, x_LND: Tensor, y_NC: Tensor, penalties: Sequence[float], *, groups_N: Tensor | None = None) -> "Ridge":
        """Minimise ||y - x w - b||^2 + penalty * ||w||^2 and choose the penalty, per layer, by leave-one-out.

        The residual of a left-out sample is r / (1 - h), of a left-out group (I - H)^-1 r, with residuals r and hat
        matrix H (diagonal h) of the fit to all samples (Hastie et al. 2009, section 7.10); H has 1 / N for the bias.

        Args:
            x_LND: Float64 is solved in float64, anything else in float32.
            y_NC: Targets.
            penalties: Positive.
            groups_N: If given, whole groups are left out: within one, samples tell each other's targets.

        Example:
            >>> x = torch.arange(4.0, dtype=torch.float64)[None, :, None]
            >>> fitted = Ridge.fit(x, 2 * x[0] + 1, [1e-9])
            >>> round(float(fitted.weight), 6), round(float(fitted.bias), 6)
            (2.0, 1.0)
        """
        assert min(penalties) > 0, "without a penalty the fit is not unique"
        assert groups_N is None or len(torch.unique(groups_N)) > 1, "nothing is left when the only group is left out"
        x_LND = real(x_LND)
        x_mean_LD, y_NC = x_LND.mean(1), y_NC.to(x_LND)
        y_mean_C = y_NC.mean(0)
        scores_LNR, squares_LR, basis_LDR = _decomposition(x_LND - x_mean_LD[:, None])
        along_LRC = scores_LNR.mT @ (y_NC - y_mean_C)
        shrinks = [1 / (squares_LR + penalty) for penalty in penalties]
        left_out = [_left_out(scores_LNR, shrink, y_NC - y_mean_C, along_LRC, groups_N) for shrink in shrinks]
        errors_LV = torch.stack([residual.square().mean((1, 2)) for residual in left_out], 1)
        best_L, layers_L = errors_LV.argmin(1), torch.arange(len(x_LND), device=x_LND.device)
        weight_LDC = basis_LDR @ (along_LRC * torch.stack(shrinks, 1)[layers_L, best_L][..., None])
        bias_LC = y_mean_C - (x_mean_LD[:, None] @ weight_LDC)[:, 0]
        penalty_L = torch.tensor(penalties, dtype=x_LND.dtype, device=x_LND.device)[best_L]
        return cls(weight_LDC, bias_LC, penalty_L, torch.stack(left_out, 1)[layers_L, best_L], errors_LV)

    @exact_products()
    def predict(self, x_LND: Tensor) -> Tensor:
        """(L, N, C) for new rows."""
        return x_LND.to(self.weight.dtype) @ self.weight + self.bias[:, None]


@one_thread()
def _decomposition(x_LND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x = scores @ basis', from the smaller of x'x and xx'; squares are the squared singular values."""
    if x_LND.shape[2] <= x_LND.shape[1]:
        squares_LR, basis_LDR = torch.linalg.eigh(x_LND.mT @ x_LND)
        return x_LND @ basis_LDR, squares_LR.clamp_min(0), basis_LDR
    squares_LR, left_LNR = torch.linalg.eigh(x_LND @ x_LND.mT)
    # Centred rows have at least one direction without length: nothing is there to be divided by it.
    rounding_L1 = squares_LR.amax(1, keepdim=True) * len(left_LNR[0]) * torch.finfo(x_LND.dtype).eps
    squares_LR = torch.where(squares_LR > rounding_L1, squares_LR, 0.0)
    lengths_LR = squares_LR.sqrt()
    inverse_LR = torch.where(lengths_LR > 0, 1 / lengths_LR, 0.0)
    return left_LNR * lengths_LR[:, None], squares_LR, (x_LND.mT @ left_LNR) * inverse_LR[:, None]


@one_thread()
def _left_out(
    scores_LNR: Tensor, shrink_LR: Tensor, y_NC: Tensor, along_LRC: Tensor, groups_N: Tensor | None
) -> Tensor:
    """(L, N, C) residuals of left-out samples or groups, at one penalty; y is centred."""
    n = len(y_NC)
    residual_LNC = y_NC - scores_LNR @ (shrink_LR[..., None] * along_LRC)
    if groups_N is None:
        hat_LN = (scores_LNR.square() @ shrink_LR[..., None])[..., 0] + 1 / n
        return residual_LNC / (1 - hat_LN)[..., None]
    left_out_LNC = torch.empty_like(residual_LNC)
    for rows_GS in _rows_by_group(groups_N):
        scores_LGSR = scores_LNR[:, rows_GS]
        hat_LGSS = (scores_LGSR * shrink_LR[:, None, None]) @ scores_LGSR.mT + 1 / n
        kept_LGSS = torch.eye(rows_GS.shape[1]).to(hat_LGSS) - hat_LGSS
        left_out_LNC[:, rows_GS] = torch.linalg.solve(kept_LGSS, residual_LNC[:, rows_GS])
    return left_out_LNC


def _rows_by_group(groups_N: Tensor) -> Iterator[Tensor]:
    """(G, S) rows of all groups with S samples, for each S."""
    _, group_N, sizes_G = torch.unique(groups_N, return_inverse=True, return_counts=True)
    order_N = torch.argsort(group_N, stable=True)
    for size in torch.unique(sizes_G).tolist():
        yield order_N[sizes_G[group_N[order_N]] == size].view(-1, size)
