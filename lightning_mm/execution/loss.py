"""The training objective: negative log-likelihood of the answers' tokens, and nothing computed for any other token.

Data flow: model + Batch -> hidden states of all positions -> gathered at the supervised ones, just before the output
head -> logits (S, V) -> summed NLL. The sum is divided once, by the supervised tokens of all ranks and micro-batches.

Shapes: B samples, L tokens, D hidden size, S supervised positions of the batch, V vocabulary.
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
from lightning_mm.models.hooks import replace_forward

Chunk = int | Literal["auto", "off"]
_LOGIT_BYTES = 256 * 2**20


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


def supervised_nll(model: nn.Module, head: nn.Module, batch: Batch, chunk: Chunk = "auto") -> Objective:
    """Loss of a batch.

    Equal to transformers' own ``labels=`` loss times S: whatever the model does behind its head (soft-capping, scaling)
    is done by the model itself, on S rows instead of B * L.

    Args:
        model: Any image-text-to-text model of transformers.
        head: Its output projection.
        batch: Teacher-forced conversations.
        chunk: Supervised positions whose logits are in memory at a time; those of others are computed again in
            backward. 'auto': all where their logits take up to 256 MiB, else as many as do; 'off': always all.
    """
    rows = chunk_size(model, head, batch.num_supervised, chunk)
    if rows >= batch.num_supervised:
        with gathered_before(head, batch.supervised):
            logits = model(**batch.inputs, use_cache=False).logits  # (1, S, V)
        return Objective(*_scored(logits, batch.targets))
    ends = Ends(model, head)
    with gathered_before(head, batch.supervised), ends.held_back() as held:
        model(**batch.inputs, use_cache=False)

    def scored(hidden_1CD: Tensor, targets_C: Tensor) -> tuple[Tensor, int, Tensor]:
        return _scored(ends.logits(hidden_1CD, batch.inputs), targets_C)

    parts = zip(held[0].split(rows, 1), batch.targets.split(rows), strict=True)
    found = [Objective(*checkpoint(scored, *part, use_reentrant=False)) for part in parts]
    nll, correct = (torch.stack(each).sum() for each in zip(*((f.nll, f.num_correct) for f in found), strict=True))
    return Objective(nll, batch.num_supervised, correct)


def chunk_size(model: nn.Module, head: nn.Module, supervised: int, chunk: Chunk) -> int:
    """Supervised positions whose logits are computed at a time; no automatic choice goes unsaid.

    Raises:
        UserError: A number was asked for, and the model does not call its head itself.
    """
    whole = max(1, supervised)
    apart = len(list(model.children())) > 1 and any(child is head for child in model.children())
    if isinstance(chunk, int):
        if not apart:
            raise UserError(
                f"model.compute.loss_chunk: {chunk} cannot be had.",
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


def _scored(logits: Tensor, targets: Tensor) -> tuple[Tensor, int, Tensor]:
    """The fields of an ``Objective``."""
    logits_SV = logits.reshape(-1, logits.shape[-1]).float()
    nll = F.cross_entropy(logits_SV, targets, reduction="sum")
    with torch.no_grad():
        return nll, len(targets), (logits_SV.argmax(-1) == targets).sum()


class Ends:
    """The two ends of a model's forward pass: its body, and its head with whatever the model does behind that.

    Args:
        model: Calls its body (the child that holds the most tensors), then its head.
        head: Output projection.
    """

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self.model, self.head = model, head
        others = [child for child in model.children() if child is not head]
        self.body: Any = max(others, key=lambda child: sum(1 for _ in child.parameters()))
        self._output: Any = None

    @contextmanager
    def held_back(self) -> Iterator[list[Tensor]]:
        """While active, the head gets nothing to do; what it would have got (1, S, D) comes into the list instead."""
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
        """(1, S, V): the model's forward pass with its body passed by and these states before the head."""
        with ExitStack() as undo:
            undo.callback(self.head.register_forward_pre_hook(lambda _, args: (hidden_1SD, *args[1:])).remove)
            replace_forward(undo, self.body, lambda _: lambda *_, **__: self._output)
            return self.model.forward(**inputs, use_cache=False).logits


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
