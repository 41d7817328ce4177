"""The training loss: negative log-likelihood of the answer tokens, with logits at supervised positions only.

Data flow: model + Batch -> hidden states of all positions -> selected at the supervised ones, just before the output
head -> logits (S, V) -> summed NLL. The sum is divided once, by the supervised tokens of all ranks and micro-batches.

Shapes: B samples, L tokens, D hidden size, S supervised positions of the batch, C positions of a chunk, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.execution.balancing import can_balance
from lightning_mm.models.hooks import replace_forward

Chunk = int | Literal["auto", "off"]
_LOGIT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class LossOutput:
    """Loss of one batch, summed over its supervised tokens.

    Args:
        nll: () summed negative log-likelihood in nats, attached to the autograd graph.
        num_tokens: Number of supervised tokens S.
        token_nll: (S,) negative log-likelihood of each supervised token, detached.
        token_correct: (S,) whether each was the most likely token: an answer of which all are is the one that greedy
            decoding gives.
        balance: () auxiliary loss of a mixture's experts, times its coefficient and S; None where there is none.
    """

    nll: Tensor
    num_tokens: int
    token_nll: Tensor
    token_correct: Tensor
    balance: Tensor | None = None

    @property
    def objective(self) -> Tensor:
        """() what training minimizes, summed over supervised tokens as ``nll`` is."""
        return self.nll if self.balance is None else self.nll + self.balance

    @property
    def num_correct(self) -> Tensor:
        """() number of supervised tokens that were the model's most likely token."""
        return self.token_correct.sum()


def supervised_nll(
    model: nn.Module, head: nn.Module, batch: Batch, chunk: Chunk = "auto", balancing: float | None = None
) -> LossOutput:
    """Loss of a batch, summed over its supervised tokens.

    Equal to transformers' own ``labels=`` loss times S: what the model does after its head (soft-capping, scaling) is
    done by the model itself, on S rows instead of B * L.

    Args:
        model: Any image-text-to-text model of transformers.
        head: The model's output projection.
        batch: Teacher-forced conversations.
        chunk: Number of supervised positions whose logits are in memory at a time; the logits of each chunk are
            recomputed in backward. 'auto' (default): all positions if their logits take up to 256 MiB, else as many
            as fit into that; 'off': always all.
        balancing: Coefficient of the auxiliary loss of a mixture's experts; None (default): it is not computed.
    """
    options = {"use_cache": False}
    if can_balance(model):  # else its config would decide, also where padding is left out
        options["output_router_logits"] = balancing is not None
    rows = chunk_size(model, head, batch.num_supervised, chunk)
    if rows >= batch.num_supervised:
        with select_positions_before_head(head, batch.supervised):
            output = model(**batch.inputs, **options)
        terms = _loss_terms(output.logits, batch.targets)  # of logits (1, S, V)
        return LossOutput(*terms, _balance(output, balancing, batch))
    split = HeadSplit(model, head)
    with select_positions_before_head(head, batch.supervised), split.record_head_inputs() as held:
        output = model(**batch.inputs, **options)

    def scored(hidden_1CD: Tensor, targets_C: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
        return _loss_terms(split.logits(hidden_1CD, batch.inputs), targets_C)

    parts = zip(held[0].split(rows, 1), batch.targets.split(rows), strict=True)
    found = [LossOutput(*checkpoint(scored, *part, use_reentrant=False)) for part in parts]
    token_nll, correct = (
        torch.cat(each) for each in zip(*((f.token_nll, f.token_correct) for f in found), strict=True)
    )
    nll = torch.stack([f.nll for f in found]).sum()
    return LossOutput(nll, batch.num_supervised, token_nll, correct, _balance(output, balancing, batch))


def chunk_size(model: nn.Module, head: nn.Module, supervised: int, chunk: Chunk) -> int:
    """Number of supervised positions whose logits are computed at a time; an automatic choice is logged.

    Args:
        model: Any image-text-to-text model of transformers.
        head: The model's output projection.
        supervised: Number of supervised positions S of the batch.
        chunk: As in ``supervised_nll``.

    Raises:
        UserError: ``chunk`` is a number, and the head is not a direct child of the model.
    """
    whole = max(1, supervised)
    apart = len(list(model.children())) > 1 and any(child is head for child in model.children())
    if isinstance(chunk, int):
        if not apart:
            raise UserError(
                f"model.compute.loss_chunk: {chunk} is not available.",
                "This model's head is inside one of its parts, which may end in another way than the whole does.",
                "Set model.compute.loss_chunk off.",
            )
        return chunk
    rows = max(1, _LOGIT_BYTES // (4 * getattr(head, "out_features", 1)))
    if chunk == "off" or rows >= whole:
        return whole
    why = f"logits of a whole batch take more than {_LOGIT_BYTES // 2**20} MiB"
    log_decision(
        "model.compute.loss_chunk", f"{rows} positions at a time" if apart else "off: its head is inside a part", why
    )
    return rows if apart else whole


def _balance(output: Any, coefficient: float | None, batch: Batch) -> Tensor | None:
    """The auxiliary loss, times S: the sum over supervised tokens is divided by their number."""
    return None if coefficient is None else coefficient * output.aux_loss * batch.num_supervised


def _loss_terms(logits: Tensor, targets: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
    """The fields of a ``LossOutput``, of logits (..., V).

    The sum is that of ``F.cross_entropy``, bit for bit: these are its two steps, and backward keeps what is between
    them anyway.
    """
    logits_SV = logits.reshape(-1, logits.shape[-1]).float()
    log_p_SV = F.log_softmax(logits_SV, dim=-1)
    nll = F.nll_loss(log_p_SV, targets, reduction="sum")
    with torch.no_grad():
        token_nll = -log_p_SV.gather(1, targets.unsqueeze(1)).squeeze(1)
        return nll, len(targets), token_nll, logits_SV.argmax(-1) == targets


class HeadSplit:
    """A model's forward pass split before its head, so that the head can run on chunks of positions.

    Args:
        model: Calls its body (the child module with the most parameters), then its head.
        head: The model's output projection, a direct child of the model.
    """

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self.model, self.head = model, head
        others = [child for child in model.children() if child is not head]
        self.body: Any = max(others, key=lambda child: sum(1 for _ in child.parameters()))
        self._output: Any = None

    @contextmanager
    def record_head_inputs(self) -> Iterator[list[Tensor]]:
        """While active, the head gets no positions; its inputs (1, S, D) are appended to the list instead."""
        held: list[Tensor] = []

        def hold(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            held.append(args[0])
            return (args[0][:, :0], *args[1:])

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._output = type(output)(last_hidden_state=output.last_hidden_state.detach()[:, :1].clone())

        handles = [self.head.register_forward_pre_hook(hold), self.body.register_forward_hook(keep)]
        try:
            yield held
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, hidden_1SD: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits (1, S, V) of given states: the model's forward pass with its body skipped.

        Args:
            hidden_1SD: (1, S, D) input of the head.
            inputs: The model's inputs in the batch that the states come from.
        """
        with ExitStack() as undo:
            undo.callback(self.head.register_forward_pre_hook(lambda _, args: (hidden_1SD, *args[1:])).remove)
            replace_forward(undo, self.body, lambda _: lambda *_, **__: self._output)
            return self.model.forward(**inputs, use_cache=False).logits


@contextmanager
def select_positions_before_head(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """While active, ``head`` gets only the hidden states at ``positions``, as (1, S, D).

    Args:
        head: The model's output projection, called by the model with (B, L, D).
        positions: (S,) flat indices into B * L; may be empty.
    """

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BLD, *rest = args
        return (hidden_BLD.flatten(0, -2)[positions].unsqueeze(0), *rest)

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def add_zero_grad_term(nll: Tensor, parameters: Iterator[nn.Parameter]) -> Tensor:
    """The loss plus a zero term that gives every parameter a gradient, also one that the batch does not use.

    A text-only batch gives the connector no gradient; in DDP, the other ranks would wait for it.

    Args:
        nll: () loss.
        parameters: The trainable parameters.
    """
    return nll + sum((p.flatten()[0] * 0.0 for p in parameters), torch.zeros_like(nll))


class LossAccumulator:
    """Sums loss and supervised tokens of this rank between two optimizer steps."""

    def __init__(self) -> None:
        self._nll: Tensor | None = None
        self._tokens = self._pictures = 0

    def add(self, objective: LossOutput, has_images: bool) -> None:
        """Add a micro-batch, without synchronizing with the device."""
        self._pictures += has_images
        nll = objective.nll.detach()
        self._nll = nll if self._nll is None else self._nll + nll
        self._tokens += objective.num_tokens

    def close(self, total: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
        """Mean loss per token in nats, number of tokens and of micro-batches with images, over all ranks; resets them.

        Args:
            total: Sums a tensor (3,) over ranks.
        """
        assert self._nll is not None
        counts = self._nll.new_tensor([self._tokens, self._pictures], dtype=torch.float64)
        nll, tokens, pictures = total(torch.cat([self._nll.double().reshape(1), counts])).tolist()
        self._nll, self._tokens, self._pictures = None, 0, 0
        return nll / max(tokens, 1.0), tokens, pictures


def scale_gradients(parameters: Mapping[str, nn.Parameter], scale: float) -> Tensor:
    """Multiply all gradients by a factor, in place.

    Args:
        parameters: Trainable parameters by name.
        scale: Factor, such as 1 / number of supervised tokens.

    Returns:
        () norm of the scaled gradient, over all parameters; it may not be finite.

    Raises:
        UserError: A parameter has no gradient. The optimizer has not stepped yet.
    """
    if missing := [name for name, parameter in parameters.items() if parameter.grad is None]:
        raise UserError(
            f"{len(missing)} planned tensors got no gradient.",
            f"Nothing in this step depended on them, such as {', '.join(missing[:3])}.",
            "Freeze their region, or give the run data that uses it (pictures for vision and connector).",
        )
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    torch._foreach_mul_(gradients, scale)
    return torch.nn.utils.get_total_norm(gradients)
