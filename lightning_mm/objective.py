"""The training objective: negative log-likelihood of the answers' tokens, and nothing computed for any other token.

Data flow: model + Batch -> hidden states of all positions -> gathered at the supervised ones, just before the output
head -> logits (S, V) -> summed NLL. The sum is divided once, by the supervised tokens of all ranks and micro-batches.

Shapes: B samples, L tokens, D hidden size, S supervised positions of the batch, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mm.data.batch import Batch


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
