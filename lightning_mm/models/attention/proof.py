"""The proof that a block without padding computes what it computes with it, on a batch of the run's own rows.

Data flow: input of a block (B, L, D) -> its forward on padded rows, and on the real tokens alone -> outputs and
gradients compared token by token -> ``BlockProof.failed``: the blocks that stay padded, and why.

Outputs of real tokens are compared, and the gradients of the block's input under one random gradient of its output. A
block whose tokens see more than their own row (a convolution, a recurrence that begins anew at each row) differs by as
much as it does at the first tokens of a row; rounding differs by the last bits.

Shapes: B rows, L tokens after padding, T real tokens, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from lightning_mm.core.errors import first_line

_ULPS_OF_STREAM, _ULPS_OF_UPDATE = 4, 64
"""Units in the last place by which a token may differ: of the residual stream, which is rounded once or twice, and of
what the block adds to it, which went through sums over D and over the row."""
_SEED = 0


class BlockProof:
    """Compares blocks while a batch runs through the model; see ``proving_blocks``.

    Args:
        precision: Type in which the step multiplies matrices.

    Attributes:
        failed: Module name of a block -> why it is not the same without padding.
        largest: Largest difference found, as a share of what rounding may make; 1 and more fails.
        compared: Number of blocks compared.
    """

    def __init__(self, precision: torch.dtype) -> None:
        self.failed: dict[str, str] = {}
        self.largest, self.compared = 0.0, 0
        self._unit = torch.finfo(precision).eps

    def run(
        self,
        name: str,
        hidden: Tensor,
        index: Tensor,
        padded: Callable[[Tensor], Tensor],
        bare: Callable[[Tensor], Tensor],
    ) -> bool:
        """Whether a block gives the same without padding; recorded.

        Args:
            name: Module name of the block.
            hidden: (B, L, D) its input.
            index: (T,) flat indices of the real tokens into B * L.
            padded: Its output (B, L, D) on padded rows.
            bare: Its output (B, L, D) computed without padding, zeros there.
        """
        self.compared += 1
        try:
            one, other = (self._computed(forward, hidden, index) for forward in (padded, bare))
        except torch.OutOfMemoryError:
            raise  # it says nothing of the block
        except Exception as error:  # of any kind: a mixer may refuse one long row in any way
            self.failed[name] = f"it cannot run without padding: {first_line(error)}"
            return False
        start = hidden.detach().flatten(0, 1)[index]
        for what, a, b, before in (("output", one[0], other[0], start), ("gradient", one[1], other[1], one[2])):
            a, b, before = a.float(), b.float(), before.float()
            allowed = _ULPS_OF_STREAM * a.norm(dim=-1) + _ULPS_OF_UPDATE * (a - before).norm(dim=-1)
            gap = (a - b).norm(dim=-1) / (self._unit * allowed).clamp_min(1e-30)
            worst = float(gap.nan_to_num(torch.inf).max())
            self.largest = max(self.largest, worst)
            if worst >= 1:
                self.failed[name] = f"the {what} of a token differs by {worst:.3g} times what rounding may make"
                return False
        return True

    def _computed(
        self, forward: Callable[[Tensor], Tensor], hidden: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) output, gradient of the input, and the gradient of the output that this is of."""
        with torch.enable_grad():  # some kernels run only where gradients flow
            given = hidden.detach().clone().requires_grad_()
            output = forward(given)
            drawn = torch.randn(len(index), output.shape[-1], generator=torch.Generator().manual_seed(_SEED))
            scale = output.detach().float().flatten(0, 1)[index].std().clamp_min(1e-6)
            drawn = (drawn.to(output.device) * scale).to(output.dtype)
            real = output.flatten(0, 1)[index]
            (gradient,) = torch.autograd.grad(real, given, drawn)
        return real.detach(), gradient.flatten(0, 1)[index], drawn


_proof: ContextVar[BlockProof | None] = ContextVar("proof that runs", default=None)


def current_proof() -> BlockProof | None:
    """The proof that ``proving_blocks`` has begun; None outside of it."""
    return _proof.get()


@contextmanager
def proving_blocks(precision: torch.dtype) -> Iterator[BlockProof]:
    """While active, blocks that leave padding out run on padded rows, and are compared with themselves without it.

    Blocks that differ stay padded from then on.

    Args:
        precision: Type in which the step multiplies matrices.
    """
    proof = BlockProof(precision)
    held = _proof.set(proof)
    try:
        yield proof
    finally:
        _proof.reset(held)
