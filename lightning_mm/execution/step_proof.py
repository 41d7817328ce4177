"""The proof at the start of a run that a prepared step computes what the family's own forward pass does.

Data flow: rows of the run -> each block with and without padding (``models.attention.proof``) -> the loss of each
supervised token by the prepared step, and by transformers' own code on padded rows with logits of all positions ->
``StepProof``. ``TrainingStep.prove`` switches off what fails.

Two losses that agree in their sum prove little; tokens are compared one by one, since a fault that touches one row, or
the first token of each row, is lost in a sum.

Shapes: B rows, L tokens after padding, S supervised positions, V vocabulary.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import LossOutput, select_positions_before_head
from lightning_mm.models.attention.proof import proving_blocks
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import plain_forwards

_UNITS = {torch.float32: 64.0, torch.float64: 64.0}
_FEW_UNITS = 2.0
"""Root mean square of what tokens may differ by, in units of the type's epsilon times the largest logit: in float32,
what sums in another order come to over all blocks; in 16 bits every logit is rounded by half a unit itself."""
_MOST_LOGITS = 2**28
"""Largest number of logits that are computed at all positions. Where there would be more, the plain forward pass too
computes them at supervised positions only, and the selection of positions is not proved."""


@dataclass(frozen=True)
class StepProof:
    """How far a prepared step is from the family's own forward pass.

    Args:
        gap: Root mean square difference of the loss of a token, in nats; NaN where one of them is not finite.
        allowed: What rounding may make of it.
        tokens: Number of tokens compared.
        blocks: Number of blocks compared with and without padding.
        padded: Blocks that have to stay padded, and why.
        whole: Whether plain logits were computed at all positions.
        finite: Whether the family's own losses are finite; nothing is proved where they are not.
    """

    gap: float
    allowed: float
    tokens: int
    blocks: int = 0
    padded: dict[str, str] = field(default_factory=dict)
    whole: bool = True
    finite: bool = True

    @property
    def holds(self) -> bool:
        """Whether the losses agree."""
        return self.gap <= self.allowed or not self.finite


@torch.no_grad()
def plain_token_nll(mm: MultimodalModel, batch: Batch) -> tuple[Tensor, float, bool]:
    """(S,) loss of each supervised token by transformers' own code, the largest logit, and whether all were computed.

    Args:
        mm: The model; what prepares it is left out.
        batch: Rows on its device.
    """
    head: Any = mm.head
    vocabulary = int(head.weight.shape[0])
    whole = batch.regions.numel() * vocabulary <= _MOST_LOGITS
    selected = nullcontext() if whole else select_positions_before_head(head, batch.supervised)
    with plain_forwards(mm.model), selected:
        logits = mm.model(**batch.inputs, use_cache=False).logits.flatten(0, 1)
    logits_SV = (logits[batch.supervised] if whole else logits).float()
    nll_S = F.cross_entropy(logits_SV, batch.targets, reduction="none")
    return nll_S, float(logits_SV.abs().max()), whole


def compare_losses(prepared_S: Tensor, plain_S: Tensor, largest: float, precision: torch.dtype) -> tuple[float, float]:
    """Root mean square difference of token losses, and what rounding may make of it.

    Args:
        prepared_S: (S,) losses of the prepared step, in nats.
        plain_S: (S,) losses of the plain forward pass.
        largest: Largest absolute logit.
        precision: Type in which matrices are multiplied.
    """
    gap = float((prepared_S.double() - plain_S.double()).square().mean().sqrt())
    allowed = _UNITS.get(precision, _FEW_UNITS) * torch.finfo(precision).eps * max(1.0, largest)
    return gap, allowed


def compute_precision(mm: MultimodalModel, device: torch.device) -> torch.dtype:
    """Type in which a step multiplies matrices here: autocast's, or the model's."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    found: torch.dtype = mm.transformers.dtype
    return found


def prove_step(mm: MultimodalModel, batch: Batch, objective: Callable[[Batch], LossOutput]) -> StepProof:
    """Compare a prepared step with the family's own forward pass on one batch.

    Args:
        mm: The prepared model, in eval mode.
        batch: Rows of the run on the model's device, padded and with answers.
        objective: The prepared step's loss.
    """
    precision = compute_precision(mm, batch.regions.device)
    with proving_blocks(precision) as blocks, torch.no_grad():
        objective(batch)
    # Kernels for CPUs run where gradients flow only; elsewhere the graph would only take memory.
    with torch.set_grad_enabled(batch.regions.device.type == "cpu"):
        prepared_S = objective(batch).token_nll.float()
    plain_S, largest, whole = plain_token_nll(mm, batch)
    torch.clear_autocast_cache()  # training must not reuse a weight that was cast here without a graph
    gap, allowed = compare_losses(prepared_S, plain_S, largest, precision)
    finite = bool(plain_S.isfinite().all())
    return StepProof(gap, allowed, len(plain_S), blocks.compared, blocks.failed, whole, finite)
