"""The training objective: negative log-likelihood of the answers' tokens, and nothing computed for any other token.

Data flow: model + Batch -> hidden states of all positions -> gathered at the supervised ones, just before the output
head -> logits (S, V) -> summed NLL. The sum is divided once, by the supervised tokens of all ranks and micro-batches.

Shapes: B samples, L tokens, D hidden size, S supervised positions of the batch, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mm.data.batch import Batch
from lightning_mm.errors import UserError


@dataclass(frozen=True)
class Objective:
    """Summed over the supervised tokens of a batch.

    Args:
        nll: () summed negative log-likelihood in nats, with its graph.
        num_tokens: S.
        num_correct: () how many were the most likely token.
    """

    nll: Tensor
    num_tokens: int
    num_correct: Tensor


def supervised_nll(model: nn.Module, head: nn.Module, batch: Batch) -> Objective:
    """Loss of a batch.

    Equal to transformers' own ``labels=`` loss times S: whatever the model does behind its head (soft-capping, scaling)
    is done by the model itself, on S rows instead of B * L.

    Args:
        model: Any image-text-to-text model of transformers.
        head: Its output projection.
        batch: Teacher-forced conversations.
    """
    with gathered_before(head, batch.supervised):
        logits = model(**batch.inputs, use_cache=False).logits  # (1, S, V)
    logits_SV = logits.reshape(-1, logits.shape[-1]).float()
    nll = F.cross_entropy(logits_SV, batch.targets, reduction="sum")
    with torch.no_grad():
        correct = (logits_SV.argmax(-1) == batch.targets).sum()
    return Objective(nll, batch.num_supervised, correct)


@contextmanager
def gathered_before(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """While active, ``head`` gets only the hidden states at ``positions``.

    Args:
        head: Output projection, called by the model with (B, L, D).
        positions: (S,) flat indices into B * L.
    """

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BLD, *rest = args
        return (hidden_BLD.flatten(0, -2)[positions].unsqueeze(0), *rest)

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def anchored(nll: Tensor, parameters: Iterator[nn.Parameter]) -> Tensor:
    """The same loss, with a zero term of parameters that this batch does not reach.

    A text-only batch gives the connector no gradient; a DDP rank that met one would leave the others waiting.
    """
    return nll + sum((p.flatten()[0] * 0.0 for p in parameters), torch.zeros_like(nll))


class Window:
    """Loss and supervised tokens of this rank since the last optimizer step."""

    def __init__(self) -> None:
        self._nll: Tensor | None = None
        self._tokens = 0

    def add(self, objective: Objective) -> None:
        """Count a micro-batch; nothing is read back from the device."""
        nll = objective.nll.detach()
        self._nll = nll if self._nll is None else self._nll + nll
        self._tokens += objective.num_tokens

    def close(self, total: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Mean loss per token and number of tokens over all ranks; the next window begins.

        Args:
            total: Sums a tensor over ranks.
        """
        assert self._nll is not None
        held = torch.stack([self._nll.double(), self._nll.new_tensor(self._tokens, dtype=torch.float64)])
        nll, tokens = total(held).tolist()
        self._nll, self._tokens = None, 0
        return nll / max(tokens, 1.0), tokens


def scale_gradients(parameters: Mapping[str, nn.Parameter], scale: float) -> Tensor:
    """Multiply all gradients, in place.

    Returns:
        () norm of the scaled gradient, over all parameters.

    Raises:
        UserError: A parameter has no gradient, or the gradient is not finite: nothing has been stepped yet.
    """
    if missing := [name for name, parameter in parameters.items() if parameter.grad is None]:
        raise UserError(
            f"{len(missing)} planned tensors got no gradient.",
            f"Nothing in this step depended on them, such as {', '.join(missing[:3])}.",
            "Freeze their region, or give the run data that uses it (pictures for vision and connector).",
        )
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    torch._foreach_mul_(gradients, scale)
    norm = torch.nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        raise UserError(
            "The gradient is not finite.",
            "Some loss or activation overflowed; the weights are as they were before this step.",
            "Lower model.optimizer.lr, set trainer.gradient_clip_val, or use trainer.precision 32-true.",
        )
    return norm
